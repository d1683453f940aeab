// What stands between this module and the kernels on a device.
#include "cuda/device.cuh"

namespace gapo {
namespace cuda {
namespace {

// Compiled as all others are, for the same architectures.
__global__ void sample() {}

std::string words(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

Obstacle obstacle_of(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return Obstacle::kNone;
    case cudaErrorInsufficientDriver:
    case cudaErrorCallRequiresNewerDriver:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
      return Obstacle::kDriver;
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
      return Obstacle::kImage;
    case cudaErrorNoDevice:
      throw std::runtime_error("no CUDA device: " + words(error));
    default:  // of something that went wrong before
      throw std::runtime_error("CUDA device: " + words(error));
  }
}

// Clears the error of a call, which later ones must not see again.
cudaError_t cleared(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

cudaError_t load_sample() {
  cudaFuncAttributes attributes = {};
  return cudaFuncGetAttributes(&attributes, sample);
}

}  // namespace

void require_device(int device) {
  int count = 0;
  cudaError_t error = cleared(cudaGetDeviceCount(&count));
  if (error != cudaSuccess) throw std::runtime_error("no CUDA device: " + words(error));
  if (device < 0 || device >= count)
    throw std::runtime_error("no CUDA device " + std::to_string(device) + ": found " +
                             std::to_string(count));
  int current = 0;
  error = cleared(cudaGetDevice(&current));
  check(error, "cudaGetDevice");
  if (current != device)
    throw std::runtime_error("CUDA device " + std::to_string(device) + ": the current one is " +
                             std::to_string(current));
}

Probe probe(int device) {
  Probe found = {};
  check(cleared(cudaDriverGetVersion(&found.driver)), "cudaDriverGetVersion");
  check(cleared(cudaRuntimeGetVersion(&found.runtime)), "cudaRuntimeGetVersion");
  int count = 0;
  cudaError_t error = cleared(cudaGetDeviceCount(&count));
  // Without any driver the runtime says the same, and then there is no device to compute on.
  if (error == cudaErrorInsufficientDriver && found.driver == 0)
    throw std::runtime_error("no CUDA device: " + words(error));
  if (error == cudaSuccess) {
    require_device(device);
    error = cleared(load_sample());
  }
  found.obstacle = obstacle_of(error);
  if (error != cudaSuccess) found.error = words(error);
  return found;
}

}  // namespace cuda
}  // namespace gapo
