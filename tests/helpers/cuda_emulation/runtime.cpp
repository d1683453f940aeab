// The functions of the CUDA runtime, for devices that do not exist.
#include <atomic>
#include <cstring>
#include <utility>

#include "emulator.h"

// Of the interpreter that loads this.
extern "C" int PyGILState_Check();

namespace cuda_emulation {
namespace {

constexpr int kRuntime = 13000;

int multiprocessors = 3;
int devices = 1;
int driver = kRuntime;
cudaError_t loading = cudaSuccess;  // how loading a kernel ends
std::atomic<int> calls_with_lock{0};
cudaError_t last_error = cudaSuccess;

// Every function that may wait for a driver starts here.
void entered() { calls_with_lock += PyGILState_Check(); }

cudaError_t readiness() {
  if (driver / 1000 < kRuntime / 1000) return noted(cudaErrorInsufficientDriver);
  return devices > 0 ? cudaSuccess : noted(cudaErrorNoDevice);
}

}  // namespace

cudaError_t noted(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace cuda_emulation

using namespace cuda_emulation;

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "cudaError";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    default:
      return "unrecognized error code";
  }
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kRuntime;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  entered();
  *count = devices;
  return readiness();
}

cudaError_t cudaGetDevice(int* device) {  // all threads have the first one
  entered();
  *device = 0;
  return readiness();
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  entered();
  if (kernel == nullptr) return noted(cudaErrorInvalidDeviceFunction);
  *attributes = {};
  return noted(loading);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  entered();
  if (device < 0 || device >= devices) return noted(cudaErrorInvalidDevice);
  if (attribute != cudaDevAttrMultiProcessorCount) return noted(cudaErrorInvalidValue);
  *value = multiprocessors;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int byte, size_t count, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};  // as a kernel, whose accesses are watched
  config.stream = stream;
  return cuda_emulation::launch(config, [=] { std::memset(memory, byte, count); });
}

// How the next launches run.
extern "C" __attribute__((visibility("default"))) void cuda_emulation_configure(int count,
                                                                                unsigned order) {
  multiprocessors = count;
  schedule = order;
}

// What the next calls find.
extern "C" __attribute__((visibility("default"))) void cuda_emulation_machine(int device_count,
                                                                              int driver_version,
                                                                              int load_error) {
  devices = device_count;
  driver = driver_version;
  loading = static_cast<cudaError_t>(load_error);
}

// Calls so far during which no other thread of the interpreter could run.
extern "C" __attribute__((visibility("default"))) int cuda_emulation_calls_with_lock() {
  return calls_with_lock;
}
