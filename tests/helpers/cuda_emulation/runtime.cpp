// The functions of the CUDA runtime, for one device that does not exist.
#include <cstring>
#include <utility>

#include "emulator.h"

namespace cuda_emulation {
namespace {

int multiprocessors = 3;
cudaError_t last_error = cudaSuccess;

}  // namespace

cudaError_t noted(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace cuda_emulation

using cuda_emulation::noted;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(cuda_emulation::last_error, cudaSuccess); }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return noted(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return noted(cudaErrorInvalidDevice);
  if (attribute != cudaDevAttrMultiProcessorCount) return noted(cudaErrorInvalidValue);
  *value = cuda_emulation::multiprocessors;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int byte, size_t count, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};  // as a kernel, whose accesses are watched
  config.stream = stream;
  return cuda_emulation::launch(config, [=] { std::memset(memory, byte, count); });
}

// How the next launches run.
extern "C" __attribute__((visibility("default"))) void cuda_emulation_configure(int multiprocessors,
                                                                                unsigned schedule) {
  cuda_emulation::multiprocessors = multiprocessors;
  cuda_emulation::schedule = schedule;
}
