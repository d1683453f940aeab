// What the kernels and their launchers share: errors, the current device, loads of element vectors.
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

// Throws unless `device` exists and is the current one.
void require_device(int device);

// kernel<<<blocks, threads, 0, stream>>>(arguments) as a function call, which checks for errors.
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

// Number of elements before the first one that is aligned to N elements.
template <int N, class T>
__device__ __forceinline__ int head_length(const T* p) {
  return int((N - reinterpret_cast<uintptr_t>(p) / sizeof(T) % N) % N);
}

// 16 aligned bytes of elements as they are in memory. Loads bypass the caches, because the kernels
// read each element once.
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

// A row whose elements are of type T.
template <class T>
struct Source {
  static constexpr int kElements = Vector<T>::kElements;  // per load
  const T* data;

  __device__ __forceinline__ void set(const void* row, DType) { data = static_cast<const T*>(row); }
  __device__ __forceinline__ float at(int64_t k) const { return widen(data[k]); }
  __device__ __forceinline__ Vector<T> load(int64_t k) const { return Vector<T>::load(data + k); }
  // Number of elements from k on before the first one that is aligned to N elements.
  template <int N>
  __device__ __forceinline__ int head(int64_t k) const {
    return head_length<N>(data + k);
  }
};

struct Mixed {};  // rows of different types

// A row whose type is known only at launch. All threads take the same branch.
template <>
struct Source<Mixed> {
  struct Four {
    float values[4];
    __device__ __forceinline__ float element(int k) const { return values[k]; }
  };
  static constexpr int kElements = 4;
  const void* data;
  DType dtype;

  __device__ __forceinline__ void set(const void* row, DType type) {
    data = row;
    dtype = type;
  }
  __device__ __forceinline__ float at(int64_t k) const {
    if (dtype == DType::kFloat32) return static_cast<const float*>(data)[k];
    if (dtype == DType::kBFloat16) return widen(static_cast<const Bf16*>(data)[k]);
    return widen(static_cast<const Half*>(data)[k]);
  }
  __device__ __forceinline__ Four load(int64_t k) const {
    if (dtype == DType::kFloat32) {
      const float4 v = __ldcs(reinterpret_cast<const float4*>(static_cast<const float*>(data) + k));
      return {{v.x, v.y, v.z, v.w}};
    }
    return dtype == DType::kBFloat16 ? load_as<Bf16>(k) : load_as<Half>(k);
  }
  template <int N>
  __device__ __forceinline__ int head(int64_t k) const {
    return dtype == DType::kFloat32 ? head_length<N>(static_cast<const float*>(data) + k)
                                    : head_length<N>(static_cast<const Bf16*>(data) + k);
  }

 private:
  template <class T>
  __device__ __forceinline__ Four load_as(int64_t k) const {
    const uint2 v = __ldcs(reinterpret_cast<const uint2*>(static_cast<const T*>(data) + k));
    return {{widen(T{uint16_t(v.x)}), widen(T{uint16_t(v.x >> 16)}), widen(T{uint16_t(v.y)}),
             widen(T{uint16_t(v.y >> 16)})}};
  }
};

// Loads N consecutive elements of a row from k on, aligned to N elements, as floats.
template <int N, class T>
__device__ __forceinline__ void load_vector(const Source<T>& row, int64_t k, float (&x)[N]) {
  constexpr int kElements = Source<T>::kElements;
  static_assert(N % kElements == 0, "whole vectors");
#pragma unroll
  for (int first = 0; first < N; first += kElements) {
    const auto v = row.load(k + first);
#pragma unroll
    for (int e = 0; e < kElements; ++e) x[first + e] = v.element(e);
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

}  // namespace cuda
}  // namespace gapo
