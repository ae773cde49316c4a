/* What a process does to a disk and says through a socket, counted in the order in which it does
 * so. It can end before one of these operations, or after half the bytes of a write; or the disk
 * takes nothing from one on. Linux loads this before the C library: LD_PRELOAD. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long done = -1; /* nothing is counted before faults_begin */
static long last, from;       /* die at this operation; refuse from this one on; 0: never */
static int half;

/* die_at, deny_at: the first operation is 1, and none is 0. torn: a write is half done before. */
void faults_begin(long die_at, int torn, long deny_at) {
  last = die_at, half = torn, from = deny_at;
  done = 0;
}

/* How many there were; nothing is counted from here. */
long faults_end(void) {
  long count = done;
  done = -1;
  return count;
}

/* Count an operation, and say whether it is refused. bytes: how many it writes, or NULL. Before the
 * last one the process ends, or else only half of the bytes are left to write. disk: or a socket. */
static int refused(size_t *bytes, int disk) {
  if (done < 0) return 0;
  long n = ++done;
  if (n == last) {
    if (!half || !bytes || *bytes < 2) kill(getpid(), SIGKILL);
    *bytes /= 2;
  }
  if (!from || n < from || !disk) return 0;
  errno = EROFS;
  return 1;
}

static void end_after_half(void) {
  if (last && done >= last) kill(getpid(), SIGKILL);
}

/* 1: a file, 0: a socket, -1: a stream, a pipe or a device, which are nothing to us. */
static int kind(int fd) {
  struct stat s;
  if (done < 0 || fd < 3 || fstat(fd, &s)) return -1;
  return S_ISREG(s.st_mode) ? 1 : S_ISSOCK(s.st_mode) ? 0 : -1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define PATHS(name, parameters, ...)            \
  int name parameters {                         \
    if (refused(NULL, 1)) return -1;            \
    return REAL(name)(__VA_ARGS__);             \
  }

PATHS(rename, (const char *a, const char *b), a, b)
PATHS(renameat, (int d, const char *a, int e, const char *b), d, a, e, b)
PATHS(renameat2, (int d, const char *a, int e, const char *b, unsigned f), d, a, e, b, f)
PATHS(link, (const char *a, const char *b), a, b)
PATHS(linkat, (int d, const char *a, int e, const char *b, int f), d, a, e, b, f)
PATHS(symlink, (const char *a, const char *b), a, b)
PATHS(symlinkat, (const char *a, int d, const char *b), a, d, b)
PATHS(unlink, (const char *a), a)
PATHS(unlinkat, (int d, const char *a, int f), d, a, f)
PATHS(rmdir, (const char *a), a)
PATHS(mkdir, (const char *a, mode_t m), a, m)
PATHS(mkdirat, (int d, const char *a, mode_t m), d, a, m)
PATHS(truncate, (const char *a, off_t n), a, n)
PATHS(truncate64, (const char *a, off64_t n), a, n)

#define FILES(name, parameters, ...)                                \
  int name parameters {                                             \
    if (kind(fd) == 1 && refused(NULL, 1)) return -1;               \
    return REAL(name)(__VA_ARGS__);                                 \
  }

FILES(ftruncate, (int fd, off_t n), fd, n)
FILES(ftruncate64, (int fd, off64_t n), fd, n)
FILES(fsync, (int fd), fd)
FILES(fdatasync, (int fd), fd)

#define WRITES(name, parameters, ...)                               \
  ssize_t name parameters {                                         \
    int disk = kind(fd);                                            \
    if (disk >= 0 && refused(&n, disk)) return -1;                  \
    ssize_t written = REAL(name)(__VA_ARGS__);                      \
    if (disk >= 0) end_after_half();                                \
    return written;                                                 \
  }

WRITES(write, (int fd, const void *b, size_t n), fd, b, n)
WRITES(pwrite, (int fd, const void *b, size_t n, off_t o), fd, b, n, o)
WRITES(pwrite64, (int fd, const void *b, size_t n, off64_t o), fd, b, n, o)
WRITES(send, (int fd, const void *b, size_t n, int f), fd, b, n, f)
WRITES(sendfile, (int fd, int in, off_t *o, size_t n), fd, in, o, n)
WRITES(sendfile64, (int fd, int in, off64_t *o, size_t n), fd, in, o, n)

/* Of several pieces the first is half of it. */
ssize_t writev(int fd, const struct iovec *pieces, int count) {
  int disk = kind(fd);
  struct iovec first = pieces[0];
  if (disk >= 0 && refused(&first.iov_len, disk)) return -1;
  if (disk >= 0 && last && done >= last) REAL(writev)(fd, &first, 1), end_after_half();
  return REAL(writev)(fd, pieces, count);
}

/* Whether a file is made or changed: not a device. */
static int makes(const char *path, int flags) {
  struct stat s;
  if (done < 0 || !(flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))) return 0;
  return stat(path, &s) || S_ISREG(s.st_mode);
}

#define OPENS(name, parameters, ...)                                \
  int name parameters {                                             \
    va_list more;                                                   \
    va_start(more, flags);                                          \
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; \
    va_end(more);                                                   \
    if (makes(path, flags) && refused(NULL, 1)) return -1; \
    return REAL(name)(__VA_ARGS__, flags, mode);                    \
  }

OPENS(open, (const char *path, int flags, ...), path)
OPENS(open64, (const char *path, int flags, ...), path)
OPENS(openat, (int d, const char *path, int flags, ...), d, path)
OPENS(openat64, (int d, const char *path, int flags, ...), d, path)

#define STREAMS(name)                                               \
  FILE *name(const char *path, const char *mode) {                  \
    if (strpbrk(mode, "wa+") && refused(NULL, 1)) return NULL;      \
    return REAL(name)(path, mode);                                  \
  }

STREAMS(fopen)
STREAMS(fopen64)
