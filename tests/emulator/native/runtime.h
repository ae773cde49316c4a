// What a compiled kernel and the runtime (runtime.cpp) say to each other.
#pragma once
#include <stdint.h>

namespace emu {

// Keep in step with COLLECTIVES in runtime.py.
enum Kind : uint32_t {
  K_SUM, K_PRODUCT, K_MAX, K_MIN, K_AND, K_OR, K_XOR, K_PREFIX, K_SHUFFLE, K_BROADCAST,
  K_VOTE, K_MATRIX_MULTIPLY, K_MATRIX_LOAD, K_MATRIX_STORE, K_SIMDGROUP_BARRIER,
  K_THREADGROUP_BARRIER, K_COUNT
};

constexpr int SLOT = 64;  // bytes a lane may bring to a collective

// What a combine function sees; the last lane to arrive calls it, once.
struct Collective {
  uint32_t active;            // mask of the lanes that take part
  unsigned char (*in)[SLOT];  // one slot per lane
  unsigned char (*out)[SLOT];
  uint32_t* arg;              // one number per lane: shuffle source, ...
};
typedef void (*Combine)(Collective&);

// Everything behind [[thread_position_in_grid]] and its relatives.
struct Attributes {
  uint32_t thread_position_in_grid[3], thread_position_in_threadgroup[3];
  uint32_t threadgroup_position_in_grid[3], threads_per_grid[3], threads_per_threadgroup[3];
  uint32_t dispatch_threads_per_threadgroup[3], threadgroups_per_grid[3];
  uint32_t thread_index_in_threadgroup, lane, simdgroup_index;
  uint32_t simdgroups, dispatch_simdgroups;
};
typedef void (*Entry)(void** args, const Attributes*);

enum BarrierFlags : uint32_t { B_DEVICE = 1, B_THREADGROUP = 2, B_SIMDGROUP = 256 };
enum AtomicAccess : int { A_LOAD, A_READ_MODIFY_WRITE, A_STORE };

}  // namespace emu

extern "C" {
// site: where the call stands in the source, see emu_site in exec/metal_stdlib.
void emu_collective(uint32_t kind, uint64_t site, const void* in, void* out, uint32_t size,
                    uint32_t arg, emu::Combine combine);
void emu_barrier(uint64_t site, uint32_t flags);
void* emu_threadgroup_variable(uint32_t id, uint64_t size, const char* name);
void emu_atomic(const volatile void* p, uint32_t size, int access);
void emu_fail(const char* message);
uint32_t emu_lane();
}
