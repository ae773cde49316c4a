// The emulated GPU: one fiber per GPU thread, one threadgroup at a time, one OS thread.
//
// Kernels are compiled with -fsanitize=thread but linked with this file instead of the
// sanitizer's runtime: each of their loads and stores arrives here as __tsan_readN/__tsan_writeN.
#include "runtime.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <string>

using namespace emu;

// ------------------------------------------------------------------ stack switch
// Saves the callee-saved registers on the stack and goes on where `to` was saved.
extern "C" void emu_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  popq %rcx
  jmp *%rcx
.size emu_switch,.-emu_switch
.section .note.GNU-stack,"",@progbits
.text
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emu_switch,.-emu_switch
.section .note.GNU-stack,"",@progbits
.text
)");
#else
#error "the emulator switches stacks by hand: x86-64 and aarch64 only"
#endif

// ------------------------------------------------------------------ state
namespace {

constexpr uint32_t MAX_THREADS = 1024;  // per threadgroup, as in Metal
constexpr uint32_t MAX_THREADGROUP_BYTES = 32768;
constexpr size_t PAGE = 4096;
// Each stack ends in a guard; kernels are compiled to probe it (-fstack-clash-protection).
constexpr size_t GUARD = 64 << 10, STACK = (256 << 10) + GUARD;

enum State : uint8_t { READY, IN_COLLECTIVE, IN_BARRIER, RETURNED };

struct Fiber {
  void* sp;
  uint32_t thread, simdgroup, lane;
  uint32_t id;  // unique over the dispatch: threadgroup * MAX_THREADS + thread
  State state;
  uint32_t kind;  // what it waits in, and where
  uint64_t site;
};

struct Simdgroup {
  uint32_t all, alive, arrived, ready;  // lane masks
  uint32_t epoch[2];                    // bumped by simdgroup barriers, per address space
  uint32_t kind;
  uint64_t site;
  bool mixed;  // lanes have arrived at different places
  Combine combine;
  alignas(64) unsigned char in[32][SLOT];
  alignas(64) unsigned char out[32][SLOT];
  uint32_t arg[32];
};

enum Space { DEVICE, THREADGROUP, CONSTANT };

// Who touched a granule last, and after how many barriers (threadgroup's, simdgroup's).
struct Access {
  uint32_t by;  // Fiber::id + 1, 0 is nobody
  uint32_t epoch, simd_epoch;
  uint32_t pc;  // offset in the kernel's object
};
struct Shadow {
  Access write, read, read2;  // read2: the last reader that is not `read`
  uint32_t tg_read, sg_read, tg_written, sg_written;  // stamps for the unique-byte counters
  bool atomic, ever_read, ever_written, initialised;
};

// Keep in step with Traffic in runtime.py.
enum Counter {
  READS, READ_BYTES, WRITES, WRITTEN_BYTES,
  READ_PER_SIMDGROUP, READ_PER_THREADGROUP, READ_UNIQUE,
  WRITTEN_PER_SIMDGROUP, WRITTEN_PER_THREADGROUP, WRITTEN_UNIQUE, COUNTERS
};

struct Region {
  char name[64];
  uint64_t base, size, map_base, map_size;
  uint32_t grain;  // bytes per shadow cell
  Space space;
  bool writable;
  Shadow* shadow;  // null: slot not in use
  uint64_t cells;
  uint64_t counter[COUNTERS];
};

// Each buffer lies in the middle of its own slot, so that a stray address tells its buffer.
constexpr uint64_t SLOT_BITS = 31, SLOT_BYTES = 1ull << SLOT_BITS;
constexpr int SLOTS = 128, FIRST_TG_SLOT = 64;

struct Global {
  uint64_t base = 0, span = 0;
  Region region[SLOTS];
  int buffers = 0, tg_variables = 0;
  uint64_t tg_bytes = 0;

  char* stacks = nullptr;
  Fiber fiber[MAX_THREADS];
  Simdgroup simdgroup[32];
  Fiber* current = nullptr;
  void* main_sp = nullptr;

  uint32_t threads, simdgroups, alive, returned, ready, at_barrier, tg_index;
  uint64_t barrier_site;
  bool barrier_mixed;
  uint32_t epoch[2];  // device, threadgroup
  uint32_t tg_first_epoch, sg_stamp;

  bool descending = false, allow_partial = false, running = false;
  uint64_t collectives[K_COUNT];
  uint64_t same_value_writes;

  std::string error;
  uint64_t error_pc, other_pc;
  std::string error_place;  // file:line when known without a pc

  // Two lanes that store the same value do no harm: whether they did is known at the
  // thread's next event, when the store has happened.
  struct {
    uint64_t address;
    uint32_t size;
    unsigned char old[16];
    uint64_t pc, other_pc;
    std::string message;
  } pending;

  Entry entry;
  uint64_t kernel_base;
  void** args;
  Attributes proto;
  uint32_t block[3];
  sigjmp_buf escape;
} G;

const char* const KIND_NAME[K_COUNT] = {
  "simd_sum", "simd_product", "simd_max", "simd_min", "simd_and", "simd_or", "simd_xor",
  "simd_prefix", "simd_shuffle", "simd_broadcast", "simd_vote", "simdgroup_multiply",
  "simdgroup_load", "simdgroup_store", "simdgroup_barrier", "threadgroup_barrier"};

// ------------------------------------------------------------------ errors
[[noreturn]] void leave() {
  void* unused;
  emu_switch(&unused, G.main_sp);
  __builtin_unreachable();
}

std::string who(const Fiber* f) {
  char b[160];
  snprintf(b, sizeof b, " [threadgroup %u, thread %u (simdgroup %u, lane %u)]", G.tg_index,
           f->thread, f->simdgroup, f->lane);
  return b;
}

[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(uint64_t pc, const char* format, ...) {
  char b[4096];
  va_list list;
  va_start(list, format);
  vsnprintf(b, sizeof b, format, list);
  va_end(list);
  G.error = b;
  if (G.current) G.error += who(G.current);
  G.error_pc = pc;
  leave();
}

// A site is header bit << 63 | line << 16 | column, see exec/metal_stdlib.
std::string place(uint32_t kind, uint64_t site) {
  char b[128];
  snprintf(b, sizeof b, "%s at %s line %u", KIND_NAME[kind], site >> 63 ? "header" : "source",
           (unsigned)(site >> 16 & 0x7fffffff));
  return b;
}

// What the lanes of each simdgroup are doing: the body of every divergence report.
std::string standings() {
  std::string report;
  int rows = 0;
  for (uint32_t i = 0; i < G.simdgroups; i++) {
    std::map<std::string, uint32_t> at;
    for (uint32_t lane = 0; lane < 32 && i * 32 + lane < G.threads; lane++) {
      Fiber& f = G.fiber[i * 32 + lane];
      std::string what = f.state == RETURNED ? "returned"
                         : f.state == READY  ? "elsewhere"
                                             : "in " + place(f.kind, f.site);
      at[what] |= 1u << lane;
    }
    for (auto& [what, mask] : at) {
      if (rows++ == 12) return report + "\n    ...";
      char b[256];
      snprintf(b, sizeof b, "\n    simdgroup %u: %d lanes (mask %08x) %s", i,
               __builtin_popcount(mask), mask, what.c_str());
      report += b;
    }
  }
  return report;
}

// ------------------------------------------------------------------ scheduler
void settle_slow() {
  auto& p = G.pending;
  bool same = memcmp((void*)p.address, p.old, p.size) == 0;
  p.address = 0;
  if (same) {
    G.same_value_writes++;
    return;
  }
  G.other_pc = p.other_pc;
  fail(p.pc, "%s", p.message.c_str());
}
inline void settle() {
  if (__builtin_expect(G.pending.address != 0, 0)) settle_slow();
}

inline int first(uint32_t mask) {
  return G.descending ? 31 - __builtin_clz(mask) : __builtin_ctz(mask);
}

[[noreturn]] void stalled() {
  G.current = nullptr;
  bool gone = G.returned && G.at_barrier;
  std::string s = standings();
  fail(0, "%s%s",
       gone ? "threadgroup_barrier not reached by every thread, some have returned:"
            : "divergence: threads of one threadgroup wait at different places and none can go on:",
       s.c_str());
}

Fiber* next_fiber() {
  if (Fiber* c = G.current) {  // stay in the simdgroup: its slots are warm
    uint32_t ready = G.simdgroup[c->simdgroup].ready;
    if (ready) return &G.fiber[c->simdgroup * 32 + first(ready)];
  }
  if (!G.ready) stalled();
  int i = first(G.ready);
  return &G.fiber[i * 32 + first(G.simdgroup[i].ready)];
}

inline void jump(Fiber* to) {
  Fiber* from = G.current;
  if (to == from) return;
  G.current = to;
  emu_switch(&from->sp, to->sp);
}

inline void block(Fiber* f, State state) {
  Simdgroup& s = G.simdgroup[f->simdgroup];
  f->state = state;
  s.ready &= ~(1u << f->lane);
  if (!s.ready) G.ready &= ~(1u << f->simdgroup);
  jump(next_fiber());
}

void complete_collective(Simdgroup& s) {
  uint32_t mask = s.arrived, i = &s - G.simdgroup;
  if (mask != s.all && !G.allow_partial) {
    G.current = nullptr;
    std::string at = place(s.kind, s.site), rest = standings();
    fail(0, "%s in divergent control flow: only %d of %d lanes of simdgroup %u of threadgroup %u "
         "take part:%s", at.c_str(), __builtin_popcount(mask), __builtin_popcount(s.all), i,
         G.tg_index, rest.c_str());
  }
  Collective c{mask, s.in, s.out, s.arg};
  if (s.combine) s.combine(c);
  G.collectives[s.kind]++;
  if (s.kind == K_SIMDGROUP_BARRIER) {
    uint32_t flags = s.arg[__builtin_ctz(mask)];
    s.epoch[0] += flags & 1;
    s.epoch[1] += flags >> 1 & 1;
  }
  for (uint32_t m = mask; m; m &= m - 1) G.fiber[i * 32 + __builtin_ctz(m)].state = READY;
  s.arrived = 0;
  s.mixed = false;
  s.ready |= mask;
  G.ready |= 1u << i;
}

void fiber_main() {
  for (;;) {
    Fiber* f = G.current;
    Attributes a = G.proto;
    uint32_t dx = a.threads_per_threadgroup[0], dy = a.threads_per_threadgroup[1];
    uint32_t p[3] = {f->thread % dx, f->thread / dx % dy, f->thread / (dx * dy)};
    for (int i = 0; i < 3; i++) {
      a.thread_position_in_threadgroup[i] = p[i];
      a.thread_position_in_grid[i] = a.threadgroup_position_in_grid[i] * G.block[i] + p[i];
    }
    a.thread_index_in_threadgroup = f->thread;
    a.lane = f->lane;
    a.simdgroup_index = f->simdgroup;
    G.entry(G.args, &a);
    settle();

    Simdgroup& s = G.simdgroup[f->simdgroup];
    f->state = RETURNED;
    s.alive &= ~(1u << f->lane);
    s.ready &= ~(1u << f->lane);
    if (!s.ready) G.ready &= ~(1u << f->simdgroup);
    G.alive--;
    G.returned++;
    if (s.arrived && s.arrived == s.alive && !s.mixed) complete_collective(s);
    if (!G.alive) leave();
    jump(next_fiber());
  }
}

// ------------------------------------------------------------------ memory checks
inline bool ordered(int space, const Access& before, const Fiber* f, const Simdgroup& s) {
  uint32_t other = before.by - 1;
  if (other == f->id) return true;
  if (other / MAX_THREADS != f->id / MAX_THREADS) return false;  // nothing orders threadgroups
  if (before.epoch != G.epoch[space]) return true;               // a threadgroup barrier between
  return other % MAX_THREADS / 32 == f->simdgroup && before.simd_epoch != s.epoch[space];
}

void race(const char* what, Region& r, uint64_t cell, const Access& before, uint64_t pc,
          uint64_t address, uint32_t size) {
  uint32_t o = before.by - 1;
  char b[512];
  snprintf(b, sizeof b,
           "data race (%s) on %s, %s %llu: thread %u of threadgroup %u came first, then this "
           "thread, no barrier between them",
           what, r.name, r.space == THREADGROUP ? "byte" : "element", (unsigned long long)cell,
           o % MAX_THREADS, o / MAX_THREADS);
  uint64_t other_pc = before.pc ? G.kernel_base + before.pc : 0;
  if (address && size <= sizeof G.pending.old) {
    auto& p = G.pending;
    p.address = address;
    p.size = size;
    p.pc = pc;
    p.other_pc = other_pc;
    p.message = b;
    memcpy(p.old, (void*)address, size);
    return;
  }
  G.other_pc = other_pc;
  fail(pc, "%s", b);
}

void check_access(uint64_t address, uint32_t size, bool write, bool atomic, uint64_t pc) {
  Region& r = G.region[(address - G.base) >> SLOT_BITS];
  Fiber* f = G.current;
  if (!f) return;
  if (!r.shadow)
    fail(pc, "%s of %u bytes at an address in no buffer", write ? "write" : "read", size);
  uint64_t offset = address - r.base;
  if (offset >= r.size || offset + size > r.size)
    fail(pc, "out of bounds %s of %u bytes on %s buffer %s: byte offset %lld, the buffer has %llu bytes",
         write ? "write" : "read", size,
         r.space == DEVICE ? "device" : r.space == CONSTANT ? "constant" : "threadgroup", r.name,
         (long long)offset, (unsigned long long)r.size);
  if (write && !r.writable)
    fail(pc, "write to %s buffer %s", r.space == CONSTANT ? "constant" : "input", r.name);

  r.counter[write ? WRITES : READS]++;
  r.counter[write ? WRITTEN_BYTES : READ_BYTES] += size;
  int space = r.space == THREADGROUP;
  Simdgroup& s = G.simdgroup[f->simdgroup];
  uint32_t tg = G.tg_index + 1, sg = G.sg_stamp + f->simdgroup;
  Access now{f->id + 1, G.epoch[space], s.epoch[space], (uint32_t)(pc - G.kernel_base)};
  // Threadgroup memory starts afresh with each threadgroup.
  auto live = [&](const Access& a) { return a.by && !(space && a.epoch < G.tg_first_epoch); };

  for (uint64_t i = offset / r.grain, end = (offset + size - 1) / r.grain; i <= end; i++) {
    Shadow& h = r.shadow[i];
    if (write) {
      if (live(h.write) && !(atomic && h.atomic) && !ordered(space, h.write, f, s))
        race("write after write", r, i, h.write, pc, atomic ? 0 : address, size);
      if (!atomic) {
        if (live(h.read) && !ordered(space, h.read, f, s))
          race("write after read", r, i, h.read, pc, 0, 0);
        if (live(h.read2) && !ordered(space, h.read2, f, s))
          race("write after read", r, i, h.read2, pc, 0, 0);
      }
      h.write = now;
      h.atomic = atomic;
      h.initialised = true;
      if (h.tg_written != tg) h.tg_written = tg, r.counter[WRITTEN_PER_THREADGROUP] += r.grain;
      if (h.sg_written != sg) h.sg_written = sg, r.counter[WRITTEN_PER_SIMDGROUP] += r.grain;
      if (!h.ever_written) h.ever_written = true, r.counter[WRITTEN_UNIQUE] += r.grain;
    } else {
      if (r.space != CONSTANT) {
        if (!h.initialised || (space && !live(h.write)))
          fail(pc, "read of uninitialised memory: %s buffer %s, %s %llu",
               space ? "threadgroup" : "output", r.name, space ? "byte" : "element",
               (unsigned long long)i);
        if (live(h.write) && !(atomic && h.atomic) && !ordered(space, h.write, f, s))
          race("read after write", r, i, h.write, pc, 0, 0);
        if (!atomic) {
          if (h.read.by != now.by) h.read2 = h.read;
          h.read = now;
        }
      }
      if (h.tg_read != tg) h.tg_read = tg, r.counter[READ_PER_THREADGROUP] += r.grain;
      if (h.sg_read != sg) h.sg_read = sg, r.counter[READ_PER_SIMDGROUP] += r.grain;
      if (!h.ever_read) h.ever_read = true, r.counter[READ_UNIQUE] += r.grain;
    }
  }
}

inline void access(const volatile void* p, uint64_t size, bool write, void* pc) {
  uint64_t a = (uint64_t)p;
  if (a - G.base >= G.span) return;  // the thread's own stack, tables, ...
  settle();
  check_access(a, size, write, false, (uint64_t)pc);
}

// ------------------------------------------------------------------ buffers
bool reserve() {
  if (G.base) return true;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* p = mmap(nullptr, SLOT_BYTES * SLOTS, PROT_NONE, flags, -1, 0);
  void* stacks = mmap(nullptr, STACK * MAX_THREADS, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (p == MAP_FAILED || stacks == MAP_FAILED) return false;
  G.stacks = (char*)stacks;
  for (uint32_t i = 0; i < MAX_THREADS; i++) mprotect(G.stacks + STACK * i, GUARD, PROT_NONE);
  G.base = (uint64_t)p;
  G.span = SLOT_BYTES * SLOTS;
  return true;
}

Region& map_region(int slot, const char* name, uint64_t size, uint32_t grain, Space space) {
  Region& r = G.region[slot];
  memset((void*)&r, 0, sizeof r);
  snprintf(r.name, sizeof r.name, "%s", name);
  r.map_size = std::max<uint64_t>((size + PAGE - 1) & ~(PAGE - 1), PAGE);
  r.map_base = G.base + SLOT_BYTES * slot + SLOT_BYTES / 2;
  mprotect((void*)r.map_base, r.map_size, PROT_READ | PROT_WRITE);
  r.base = r.map_base + ((r.map_size - size) & ~15ull);  // the end touches a guard page
  r.size = size;
  r.grain = grain;
  r.space = space;
  r.cells = size / grain + 2;
  r.shadow = (Shadow*)mmap(nullptr, r.cells * sizeof(Shadow), PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return r;
}

void unmap_region(Region& r) {
  if (!r.shadow) return;
  madvise((void*)r.map_base, r.map_size, MADV_DONTNEED);
  mprotect((void*)r.map_base, r.map_size, PROT_NONE);
  munmap(r.shadow, r.cells * sizeof(Shadow));
  memset((void*)&r, 0, sizeof r);
}

// ------------------------------------------------------------------ one threadgroup
void run_threadgroup() {
  for (uint32_t i = 0; i < G.simdgroups; i++) {
    Simdgroup& s = G.simdgroup[i];
    uint32_t n = std::min(32u, G.threads - i * 32);
    s.all = s.alive = s.ready = n == 32 ? ~0u : (1u << n) - 1;
    s.arrived = 0;
    s.mixed = false;
    s.combine = nullptr;
  }
  G.ready = G.simdgroups == 32 ? ~0u : (1u << G.simdgroups) - 1;
  G.alive = G.threads;
  G.at_barrier = G.returned = 0;
  G.epoch[0]++;
  G.tg_first_epoch = ++G.epoch[1];
  for (int i = 0; i < G.tg_variables; i++) {
    Region& r = G.region[FIRST_TG_SLOT + i];
    if (r.shadow) memset((void*)r.base, 0xFF, r.size);  // poison: NaN
  }
  for (uint32_t t = 0; t < G.threads; t++) {
    Fiber& f = G.fiber[t];
    f.thread = t;
    f.simdgroup = t / 32;
    f.lane = t % 32;
    f.id = G.tg_index * MAX_THREADS + t;
    f.state = READY;
    // Stacks a multiple of the cache's way size apart would fight for the same sets.
    uint64_t top = ((uint64_t)G.stacks + STACK * (t + 1) - t % 61 * 64) & ~15ull;
#if defined(__x86_64__)
    void** sp = (void**)(top - 16);
    *sp = (void*)fiber_main;  // return address of the first switch
    f.sp = sp - 6;
#else
    void** sp = (void**)(top - 160);
    sp[11] = (void*)fiber_main;  // x30
    f.sp = sp;
#endif
  }
  G.current = nullptr;
  G.current = next_fiber();
  emu_switch(&G.main_sp, G.current->sp);
  G.current = nullptr;
}

void on_signal(int sig, siginfo_t* info, void* context) {
  uint64_t a = (uint64_t)info->si_addr;
  char b[256];
  if (sig == SIGFPE) {
    snprintf(b, sizeof b, "integer division by zero");
  } else if (sig == SIGILL) {
    snprintf(b, sizeof b, "undefined behaviour: the compiler's trap was reached");
  } else if (a - G.base < G.span) {
    Region& r = G.region[(a - G.base) >> SLOT_BITS];
    snprintf(b, sizeof b,
             "out of bounds access near buffer %s: byte offset %lld, the buffer has %llu bytes",
             r.shadow ? r.name : "?", (long long)(a - r.base), (unsigned long long)r.size);
  } else if (a - (uint64_t)G.stacks < STACK * MAX_THREADS) {
    snprintf(b, sizeof b, "stack overflow of a GPU thread: recursion or large local arrays");
  } else {
    snprintf(b, sizeof b, "access to address %p, which is in no buffer", (void*)a);
  }
  G.error = b;
  if (G.current) G.error += who(G.current);
#if defined(__x86_64__)
  G.error_pc = ((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP] + 1;
#else
  G.error_pc = ((ucontext_t*)context)->uc_mcontext.pc + 1;
#endif
  siglongjmp(G.escape, 1);
}

// The process (pytest's faulthandler, for one) gets its own handlers back after a launch.
class Signals {
 public:
  Signals() {
    stack_t stack{};
    stack.ss_sp = alternate;
    stack.ss_size = sizeof alternate;
    sigaltstack(&stack, &old_stack);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 4; i++) sigaction(SIGNAL[i], &action, &old[i]);
  }
  ~Signals() {
    for (int i = 0; i < 4; i++) sigaction(SIGNAL[i], &old[i], nullptr);
    sigaltstack(&old_stack, nullptr);
  }

 private:
  static constexpr int SIGNAL[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
  static char alternate[1 << 16];
  stack_t old_stack;
  struct sigaction old[4];
};
char Signals::alternate[1 << 16];

}  // namespace

// ------------------------------------------------------------------ called by kernels
extern "C" {

static inline void copy(void* to, const void* from, uint32_t n) {
  if (n == 4) memcpy(to, from, 4);  // the common size, without a call
  else memcpy(to, from, n);
}

void emu_collective(uint32_t kind, uint64_t site, const void* in, void* out, uint32_t size,
                    uint32_t arg, Combine combine) {
  settle();
  Fiber* f = G.current;
  Simdgroup& s = G.simdgroup[f->simdgroup];
  copy(s.in[f->lane], in, size);
  s.arg[f->lane] = arg;
  f->kind = kind;
  f->site = site;
  if (!s.arrived) {
    s.kind = kind;
    s.site = site;
    s.combine = combine;
    s.mixed = false;
  } else if (s.site != site || s.kind != kind) {
    s.mixed = true;
  }
  s.arrived |= 1u << f->lane;
  if (s.arrived == s.alive && !s.mixed) {
    f->state = IN_COLLECTIVE;
    complete_collective(s);
  } else {
    block(f, IN_COLLECTIVE);
  }
  copy(out, s.out[f->lane], size);
}

void emu_barrier(uint64_t site, uint32_t flags) {
  if (flags & B_SIMDGROUP) {
    uint32_t unused = 0;
    emu_collective(K_SIMDGROUP_BARRIER, site, &unused, &unused, 4, flags & 3, nullptr);
    return;
  }
  settle();
  Fiber* f = G.current;
  f->kind = K_THREADGROUP_BARRIER;
  f->site = site;
  if (!G.at_barrier) {
    G.barrier_site = site;
    G.barrier_mixed = false;
  } else if (G.barrier_site != site) {
    G.barrier_mixed = true;
  }
  if (++G.at_barrier < G.threads) {
    block(f, IN_BARRIER);
    return;
  }
  f->state = IN_BARRIER;
  if (G.barrier_mixed) stalled();
  G.epoch[0] += flags & 1;
  G.epoch[1] += flags >> 1 & 1;
  G.collectives[K_THREADGROUP_BARRIER]++;
  G.at_barrier = 0;
  for (uint32_t t = 0; t < G.threads; t++) G.fiber[t].state = READY;
  for (uint32_t i = 0; i < G.simdgroups; i++) G.simdgroup[i].ready = G.simdgroup[i].alive;
  G.ready = G.simdgroups == 32 ? ~0u : (1u << G.simdgroups) - 1;
}

void* emu_threadgroup_variable(uint32_t id, uint64_t size, const char* name) {
  if (FIRST_TG_SLOT + id >= (uint32_t)SLOTS) fail(0, "more than %d threadgroup variables", SLOTS - FIRST_TG_SLOT);
  Region& r = G.region[FIRST_TG_SLOT + id];
  if (!r.shadow) {
    G.tg_bytes += (size + 15) & ~15ull;
    if (G.tg_bytes > MAX_THREADGROUP_BYTES)
      fail((uint64_t)__builtin_return_address(0), "%llu bytes of threadgroup memory, the limit is %u",
           (unsigned long long)G.tg_bytes, MAX_THREADGROUP_BYTES);
    map_region(FIRST_TG_SLOT + id, name, size, 1, THREADGROUP).writable = true;
    G.tg_variables = std::max(G.tg_variables, (int)id + 1);
    memset((void*)r.base, 0xFF, size);
  }
  return (void*)r.base;
}

void emu_atomic(const volatile void* p, uint32_t size, int kind) {
  uint64_t a = (uint64_t)p, pc = (uint64_t)__builtin_return_address(0);
  if (a - G.base >= G.span) return;
  settle();
  if (kind != A_STORE) check_access(a, size, false, true, pc);
  if (kind != A_LOAD) check_access(a, size, true, true, pc);
}

uint32_t emu_lane() { return G.current->lane; }
void emu_fail(const char* message) { fail(0, "%s", message); }

#define PC __builtin_return_address(0)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define ACCESS(prefix, N)                                               \
  void __tsan_##prefix##read##N(void* p) { access(p, N, false, PC); }   \
  void __tsan_##prefix##write##N(void* p) { access(p, N, true, PC); }
#define ACCESSES(N) \
  ACCESS(, N) ACCESS(volatile_, N) ACCESS(unaligned_, N) ACCESS(unaligned_volatile_, N)
ACCESSES(1) ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16)
void __tsan_read_range(void* p, unsigned long n) { access(p, n, false, PC); }
void __tsan_write_range(void* p, unsigned long n) { access(p, n, true, PC); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// The undefined-behaviour sanitizer's reports; their first field is a source location.
struct Place { const char* file; uint32_t line, column; };
[[noreturn]] static void undefined(const Place* at, const char* what, void* pc) {
  G.error_place = std::string(at->file) + ":" + std::to_string(at->line);
  fail((uint64_t)pc, "%s", what);
}
void __ubsan_handle_out_of_bounds(Place* at, void* index) {
  char b[96];
  snprintf(b, sizeof b, "index %lld outside a thread array", (long long)index);
  undefined(at, b, PC);
}
void __ubsan_handle_shift_out_of_bounds(Place* at, void*, void*) {
  undefined(at, "shift by a negative count or by at least the type's width", PC);
}
void __ubsan_handle_divrem_overflow(Place* at, void*, void*) {
  undefined(at, "integer division by zero or overflow", PC);
}
// Also the report for null pointers, which no buffer is.
struct Mismatch { Place at; void* type; unsigned char log_alignment, kind; };
void __ubsan_handle_type_mismatch_v1(Mismatch* m, void* pointer) {
  uint64_t a = (uint64_t)pointer, slot = (a - G.base) >> SLOT_BITS;
  char b[128];
  snprintf(b, sizeof b, "misaligned access to %s: the address is no multiple of %u",
           a - G.base < G.span ? G.region[slot].name : "thread memory", 1u << m->log_alignment);
  undefined(&m->at, b, PC);
}

// ------------------------------------------------------------------ called by runtime.py
int emu_reset() {
  if (!reserve()) return 1;
  for (auto& r : G.region) unmap_region(r);
  G.buffers = G.tg_variables = 0;
  G.tg_bytes = G.same_value_writes = 0;
  memset(G.collectives, 0, sizeof G.collectives);
  G.error.clear();
  G.error_place.clear();
  G.error_pc = G.other_pc = 0;
  G.pending.address = 0;
  return 0;
}

// data: the content, or null for a poisoned buffer. Returns where the kernel finds it.
void* emu_buffer(const char* name, const void* data, uint64_t size, uint32_t grain, int space,
                 int writable) {
  if (G.buffers >= FIRST_TG_SLOT || size > SLOT_BYTES / 2 - PAGE) return nullptr;
  Region& r = map_region(G.buffers++, name, size, grain, (Space)space);
  r.writable = writable;
  if (data) {
    memcpy((void*)r.base, data, size);
    for (uint64_t i = 0; i < r.cells; i++) r.shadow[i].initialised = true;
  } else {
    memset((void*)r.base, 0xFF, size);
  }
  return (void*)r.base;
}

int emu_launch(Entry entry, void** args, const uint32_t* grid, const uint32_t* threadgroup,
               int descending, int allow_partial) {
  Dl_info info;
  G.kernel_base = dladdr((void*)entry, &info) ? (uint64_t)info.dli_fbase : 0;
  G.entry = entry;
  G.args = args;
  G.descending = descending;
  G.allow_partial = allow_partial;
  uint32_t n[3];
  uint64_t total = 1, threads = 1;
  for (int i = 0; i < 3; i++) {
    G.block[i] = std::min(threadgroup[i], grid[i]);  // as MLX does
    if (!G.block[i]) {
      G.error = "a grid or threadgroup dimension is 0";
      return 1;
    }
    n[i] = (grid[i] + G.block[i] - 1) / G.block[i];
    total *= n[i];
    threads *= G.block[i];
  }
  if (threads > MAX_THREADS) {
    G.error = "threadgroup of " + std::to_string(threads) + " threads, the limit is 1024";
    return 1;
  }
  if (total >= 1ull << 22) {
    G.error = "more than 2^22 threadgroups: thread numbers would not fit the race detector";
    return 1;
  }
  Signals signals;
  G.current = nullptr;
  if (sigsetjmp(G.escape, 1) == 0) {
    for (uint64_t k = 0; k < total && G.error.empty(); k++) {
      uint64_t g = descending ? total - 1 - k : k;
      uint32_t p[3] = {(uint32_t)(g % n[0]), (uint32_t)(g / n[0] % n[1]), (uint32_t)(g / n[0] / n[1])};
      Attributes& a = G.proto;
      memset(&a, 0, sizeof a);
      G.threads = 1;
      for (int i = 0; i < 3; i++) {
        a.threadgroup_position_in_grid[i] = p[i];
        a.threads_per_grid[i] = grid[i];
        a.dispatch_threads_per_threadgroup[i] = G.block[i];
        a.threadgroups_per_grid[i] = n[i];
        a.threads_per_threadgroup[i] = std::min(G.block[i], grid[i] - p[i] * G.block[i]);
        G.threads *= a.threads_per_threadgroup[i];
      }
      G.simdgroups = (G.threads + 31) / 32;
      a.simdgroups = G.simdgroups;
      a.dispatch_simdgroups = (threads + 31) / 32;
      G.tg_index = g;
      G.sg_stamp = 1 + g * 32;
      run_threadgroup();
    }
  }
  G.current = nullptr;
  return !G.error.empty();
}

const char* emu_error() { return G.error.c_str(); }
const char* emu_error_place() { return G.error_place.c_str(); }

// Offset of the failing access (other = 0) or of the one it clashes with in the kernel's object.
uint64_t emu_error_offset(int other) {
  uint64_t pc = other ? G.other_pc : G.error_pc;
  Dl_info info;
  if (!pc || !dladdr((void*)(pc - 1), &info) || (uint64_t)info.dli_fbase != G.kernel_base) return 0;
  return pc - 1 - G.kernel_base;  // a return address is one instruction too far
}

// First element of a buffer that nobody wrote, and how many there are.
uint64_t emu_unwritten(int buffer, uint64_t* where) {
  Region& r = G.region[buffer];
  uint64_t n = 0;
  for (uint64_t i = 0; i < r.size / r.grain; i++)
    if (!r.shadow[i].initialised && !n++) *where = i;
  return n;
}

void emu_traffic(int slot, uint64_t* out) { memcpy(out, G.region[slot].counter, sizeof G.region[slot].counter); }
const char* emu_region_name(int slot) { return G.region[slot].name; }
int emu_threadgroup_variables(int* first_slot) { *first_slot = FIRST_TG_SLOT; return G.tg_variables; }
void emu_totals(uint64_t* out) {
  memcpy(out, G.collectives, sizeof G.collectives);
  out[K_COUNT] = G.tg_bytes;
  out[K_COUNT + 1] = G.same_value_writes;
}
}  // extern "C"
