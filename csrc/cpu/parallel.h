// Fork-join on the thread pool that torch already has, so that two pools never compete for the cores.
#pragma once

namespace peftkern {

// Runs body(data, index, count) once for each index in [0, count); count is at most `threads`.
void parallel_run(int threads, void (*body)(void *data, int index, int count), void *data);

// Whether to use torch's OpenMP runtime where there is one (the default); for tests of the other path.
void parallel_use_openmp(bool use);

// "openmp" where torch's own OpenMP runtime was found in the process, else "std::thread".
const char *parallel_runtime();

}  // namespace peftkern
