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

// N floats from N consecutive, N-element aligned elements, 16 bytes a load. Each element is read
// once: the data goes past the caches.
template <int N>
__device__ __forceinline__ void load_vector(const float* p, float (&x)[N]) {
#pragma unroll
  for (int k = 0; k < N; k += 4) {
    const float4 v = __ldcs(reinterpret_cast<const float4*>(p + k));
    x[k] = v.x;
    x[k + 1] = v.y;
    x[k + 2] = v.z;
    x[k + 3] = v.w;
  }
}

template <int N, class T>
__device__ __forceinline__ void load_vector(const T* p, float (&x)[N]) {
  static_assert(N == 8 && sizeof(T) == 2, "16-bit elements come in eights");
  const uint4 v = __ldcs(reinterpret_cast<const uint4*>(p));
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    x[2 * k] = widen(T{uint16_t(words[k])});
    x[2 * k + 1] = widen(T{uint16_t(words[k] >> 16)});
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
