// torch's Linux builds bring libgomp (or a runtime with its entry points) into the process. Linking a second OpenMP runtime
// would start a second pool whose spinning threads fight torch's, so the entry points are looked up instead of linked.
#include "parallel.h"

#include <system_error>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace peftkern {
namespace {

struct OpenMP {
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  OpenMP() {
#ifndef _WIN32
    parallel = reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    thread_num = reinterpret_cast<decltype(thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    num_threads = reinterpret_cast<decltype(num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
#endif
  }
  bool found() const { return parallel && thread_num && num_threads; }
};

const OpenMP &openmp() {
  static const OpenMP instance;
  return instance;
}

struct Region {
  void (*body)(void *, int, int);
  void *data;
};

void openmp_entry(void *argument) {
  const Region *region = static_cast<const Region *>(argument);
  region->body(region->data, openmp().thread_num(), openmp().num_threads());
}

bool use_openmp = true;

}  // namespace

void parallel_use_openmp(bool use) { use_openmp = use; }

void parallel_run(int threads, void (*body)(void *, int, int), void *data) {
  if (threads <= 1) return body(data, 0, 1);
  if (use_openmp && openmp().found()) {
    Region region{body, data};
    return openmp().parallel(openmp_entry, &region, static_cast<unsigned>(threads), 0);
  }
  std::vector<std::thread> workers;
  workers.reserve(threads);
  int started = 1;
  try {
    for (; started < threads; ++started) workers.emplace_back(body, data, started, threads);
  } catch (const std::system_error &) {  // no more threads: their shares are done here
  }
  body(data, 0, threads);
  for (int index = started; index < threads; ++index) body(data, index, threads);
  for (std::thread &worker : workers) worker.join();
}

const char *parallel_runtime() { return use_openmp && openmp().found() ? "openmp" : "std::thread"; }

}  // namespace peftkern
