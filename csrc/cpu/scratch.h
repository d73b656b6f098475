// A thread's memory and its share of the work.
#pragma once
#include <stdlib.h>
#ifdef _WIN32
#include <malloc.h>
#endif

#include "../include/vec.h"

namespace peftkern {
namespace PEFTKERN_ISA {

// Memory on a cache line; Windows has no aligned_alloc, and frees what it aligns by another name.
#ifdef _WIN32
static inline void *take_lines(int64_t bytes) { return _aligned_malloc(bytes, 64); }
static inline void free_lines(void *memory) { _aligned_free(memory); }
#else
static inline void *take_lines(int64_t bytes) { return aligned_alloc(64, bytes); }
static inline void free_lines(void *memory) { free(memory); }
#endif

// A thread's scratch memory; it grows to the largest call and is reused.
struct Scratch {
  char *memory = nullptr;
  int64_t capacity = 0, used = 0;
  ~Scratch() { free_lines(memory); }
  void reserve(int64_t bytes) {
    used = 0;
    if (bytes <= capacity) return;
    free_lines(memory);
    capacity = round_up(bytes, 4096);
    memory = static_cast<char *>(take_lines(capacity));
    if (!memory) abort();  // a thread of the pool has nobody to throw to
  }
  template <class T> T *take(int64_t count) {
    T *result = reinterpret_cast<T *>(memory + used);
    used += bytes<T>(count);
    return result;
  }
  template <class T> static int64_t bytes(int64_t count) { return round_up(count * int64_t(sizeof(T)), 64); }
};

// What a thread works with, and what a calling thread holds for all of them.
static inline Scratch &worker_scratch() {
  static thread_local Scratch instance;
  return instance;
}
static inline Scratch &caller_scratch() {
  static thread_local Scratch instance;
  return instance;
}

struct Range { int64_t begin, end; };
static inline Range share(int64_t total, int64_t grain, int index, int count) {
  const int64_t blocks = (total + grain - 1) / grain;
  return {smaller(total, blocks * index / count * grain), smaller(total, blocks * (index + 1) / count * grain)};
}

}  // namespace PEFTKERN_ISA
}  // namespace peftkern
