// What the emulator (emulator.cpp), the runtime's functions (runtime.cpp) and the compiler's checks
// (checks.cpp) share.
#pragma once

#include "cuda_runtime.h"

namespace cuda_emulation {

extern unsigned schedule;  // 0 ascending, 1 descending, else the seed of random orders

// Ends the launch from within a thread. No object with a destructor may be alive in the caller.
[[noreturn]] void fail(const char* what, const Site& site);

// Keeps an error for cudaGetLastError.
cudaError_t noted(cudaError_t error);

}  // namespace cuda_emulation
