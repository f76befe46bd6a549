// Stands before the C library's allocator (LD_PRELOAD) and fails where it is told to: for tests of
// what happens when memory runs out. Only torch's allocator of CPU tensors is failed, which is in
// libc10: oneDNN does not survive to be refused a buffer of its own.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

static atomic_long count;
static atomic_long failing = -1;

// Counts from now on; allocation number `at` (from 1) fails, or none if it is 0.
void arm(long at) {
  atomic_store(&count, 0);
  atomic_store(&failing, at);
}

// Stops counting; returns how many allocations there were.
long disarm(void) {
  atomic_store(&failing, -1);
  return atomic_load(&count);
}

static int is_of_tensors(void* caller) {
  Dl_info info;
  return dladdr(caller, &info) && info.dli_fname && strstr(info.dli_fname, "libc10.so");
}

int posix_memalign(void** out, size_t alignment, size_t size) {
  static int (*real)(void**, size_t, size_t);
  if (!real) real = (int (*)(void**, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
  const long at = atomic_load(&failing);
  if (at >= 0 && is_of_tensors(__builtin_return_address(0)) &&
      atomic_fetch_add(&count, 1) + 1 == at)
    return ENOMEM;
  return real(out, alignment, size);
}
