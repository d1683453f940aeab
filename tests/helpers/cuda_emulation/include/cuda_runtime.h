// The part of the CUDA runtime and of the device language that csrc/cuda uses, on the CPU. With it
// the kernels compile as plain C++; ../emulator.cpp runs them thread by thread. Launches finish
// before they return, and what a kernel does wrong (a barrier that not all threads reach, a
// misaligned vector, a read outside the buffers) comes as std::runtime_error from the launch,
// naming block and thread.
//
// Shared memory is static: blocks run one after the other. It is not cleared between them, as on a
// device.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

// ---- Types -----------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Alignments as on the device: the compiler's alignment checks hold vector accesses to them.
#define GAPO_EMULATED_VECTOR2(Name, T) \
  struct alignas(2 * sizeof(T)) Name { \
    T x, y;                            \
  };                                   \
  inline Name make_##Name(T x, T y) { return {x, y}; }
#define GAPO_EMULATED_VECTOR4(Name, T) \
  struct alignas(16) Name {            \
    T x, y, z, w;                      \
  };                                   \
  inline Name make_##Name(T x, T y, T z, T w) { return {x, y, z, w}; }
GAPO_EMULATED_VECTOR2(float2, float)
GAPO_EMULATED_VECTOR2(int2, int)
GAPO_EMULATED_VECTOR2(uint2, unsigned)
GAPO_EMULATED_VECTOR2(double2, double)
GAPO_EMULATED_VECTOR4(float4, float)
GAPO_EMULATED_VECTOR4(int4, int)
GAPO_EMULATED_VECTOR4(uint4, unsigned)
#undef GAPO_EMULATED_VECTOR2
#undef GAPO_EMULATED_VECTOR4

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorCallRequiresNewerDriver = 36,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidKernelImage = 200,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidPtx = 218,
  cudaErrorJitCompilerNotFound = 221,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorJitCompilationDisabled = 223,
  cudaErrorIllegalAddress = 700,
  cudaErrorSystemDriverMismatch = 803,
  cudaErrorCompatNotSupportedOnDevice = 804,
};

using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

struct cudaFuncAttributes {
  size_t localSizeBytes;
};

struct cudaLaunchAttribute;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// ---- The machine -----------------------------------------------------------------------------

namespace cuda_emulation {

// Where in the sources a call stands. Threads that meet must have come to the same place.
struct Site {
  const char* file;
  int line;
  constexpr Site(const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : file(file), line(line) {}
};

enum class Collective { kSyncWarp, kShuffle, kBallot };

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& body);
void sync_block(Site site);
// Waits for the lanes of `mask`; then the value that lane `source` offered (kShuffle), the lanes
// that offered something else than 0 (kBallot), or nothing of use.
uint64_t sync_warp(Collective what, unsigned mask, uint64_t value, int source, Site site);
int lane();
void require_aligned(const void* address, size_t alignment, Site site);

template <class T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(std::is_arithmetic<T>::value, "the values that CUDA shuffles");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = sync_warp(Collective::kShuffle, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace cuda_emulation

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

// ---- Device functions ------------------------------------------------------------------------

inline void __syncthreads(cuda_emulation::Site site = {}) { cuda_emulation::sync_block(site); }

inline void __syncwarp(unsigned mask = ~0u, cuda_emulation::Site site = {}) {
  cuda_emulation::sync_warp(cuda_emulation::Collective::kSyncWarp, mask, 0, 0, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_emulation::Site site = {}) {
  const auto what = cuda_emulation::Collective::kBallot;
  return unsigned(cuda_emulation::sync_warp(what, mask, predicate != 0, 0, site));
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              cuda_emulation::Site site = {}) {
  const int first = cuda_emulation::lane() & ~(width - 1);
  return cuda_emulation::shuffle(mask, value, first | (source & (width - 1)), site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   cuda_emulation::Site site = {}) {
  const int lane = cuda_emulation::lane();
  const int source = lane + int(delta);
  const bool inside = source <= (lane | (width - 1));
  return cuda_emulation::shuffle(mask, value, inside ? source : lane, site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 cuda_emulation::Site site = {}) {
  const int lane = cuda_emulation::lane();
  const int source = lane - int(delta);
  const bool inside = source >= (lane & ~(width - 1));
  return cuda_emulation::shuffle(mask, value, inside ? source : lane, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int changed, int width = warpSize,
                  cuda_emulation::Site site = {}) {
  const int lane = cuda_emulation::lane();
  const int source = lane ^ changed;
  const bool inside = source <= (lane | (width - 1));
  return cuda_emulation::shuffle(mask, value, inside ? source : lane, site);
}

template <class T>
T __ldcs(const T* p, cuda_emulation::Site site = {}) {
  cuda_emulation::require_aligned(p, alignof(T), site);
  return *p;
}
template <class T>
T __ldg(const T* p, cuda_emulation::Site site = {}) {
  cuda_emulation::require_aligned(p, alignof(T), site);
  return *p;
}
template <class T>
void __stcs(T* p, T value, cuda_emulation::Site site = {}) {
  cuda_emulation::require_aligned(p, alignof(T), site);
  *p = value;
}

inline float __uint_as_float(unsigned bits) { return cuda_emulation::same_bits<float>(bits); }
inline unsigned __float_as_uint(float x) { return cuda_emulation::same_bits<unsigned>(x); }
inline float __int_as_float(int bits) { return cuda_emulation::same_bits<float>(bits); }
inline int __float_as_int(float x) { return cuda_emulation::same_bits<int>(x); }
inline double __longlong_as_double(long long bits) {
  return cuda_emulation::same_bits<double>(bits);
}
inline long long __double_as_longlong(double x) { return cuda_emulation::same_bits<long long>(x); }

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

// ---- Host functions --------------------------------------------------------------------------

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* memory, int byte, size_t count, cudaStream_t stream);

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel* kernel) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "a device takes 4 KiB of parameters");
  static_assert((std::is_trivially_copyable<Parameters>::value && ...), "copied as bytes");
  const std::tuple<Parameters...> passed(std::forward<Arguments>(arguments)...);
  return cuda_emulation::launch(*config, [&] { std::apply(kernel, passed); });
}
