// What the kernels' launchers share: errors, the current device, loads of element vectors.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "api.h"
#include "cuda/layout.h"

namespace gapo {
namespace cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes `device` current for a scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    require_device(device);
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(previous_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int previous_ = 0;
};

// kernel<<<blocks, threads, 0, stream>>>(arguments), in the spelling of a function call.
template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), int64_t blocks, int threads,
            cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(Bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }

__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(float x, Bf16& out) {  // to nearest even; NaN stays NaN
  const uint32_t bits = __float_as_uint(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  out.bits = uint16_t(x != x ? bits >> 16 | 0x40u : rounded);
}
__device__ __forceinline__ void narrow(float x, Half& out) {
  out.bits = __half_as_ushort(__float2half_rn(x));
}

// 16 aligned bytes of elements as they are in memory. Each is read once: the data goes past the
// caches.
template <class T>
struct Vector {
  static constexpr int kElements = 16 / sizeof(T);
  uint32_t words[4];

  static __device__ __forceinline__ Vector load(const T* p) {
    const uint4 v = __ldcs(reinterpret_cast<const uint4*>(p));
    return {{v.x, v.y, v.z, v.w}};
  }
  __device__ __forceinline__ float element(int k) const {
    if constexpr (sizeof(T) == 4)
      return __uint_as_float(words[k]);
    else
      return widen(T{uint16_t(k % 2 == 0 ? words[k / 2] : words[k / 2] >> 16)});
  }
};

// N floats from N consecutive, N-element aligned elements.
template <int N, class T>
__device__ __forceinline__ void load_vector(const T* p, float (&x)[N]) {
  static_assert(N % Vector<T>::kElements == 0, "whole vectors");
#pragma unroll
  for (int k = 0; k < N; k += Vector<T>::kElements) {
    const Vector<T> v = Vector<T>::load(p + k);
#pragma unroll
    for (int e = 0; e < Vector<T>::kElements; ++e) x[k + e] = v.element(e);
  }
}

template <int N>
__device__ __forceinline__ void store_vector(const float (&x)[N], float* p) {
#pragma unroll
  for (int k = 0; k < N; k += 4)
    *reinterpret_cast<float4*>(p + k) = make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
}

template <int N, class T>
__device__ __forceinline__ void store_vector(const float (&x)[N], T* p) {
  uint32_t words[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    T low, high;
    narrow(x[2 * k], low);
    narrow(x[2 * k + 1], high);
    words[k] = low.bits | uint32_t(high.bits) << 16;
  }
  *reinterpret_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Elements before the first that is aligned to N elements.
template <int N, class T>
__device__ __forceinline__ int head_length(const T* p) {
  return int((N - reinterpret_cast<uintptr_t>(p) / sizeof(T) % N) % N);
}

}  // namespace cuda
}  // namespace gapo
