// Small kernels, right and wrong, that show what the emulator finds. Called by name from the tests.
#include <cuda_runtime.h>

#include <exception>
#include <string>

namespace {

constexpr int kThreads = 64;

__device__ int left_neighbour() { return (threadIdx.x + kThreads - 1) % kThreads; }
__device__ int right_neighbour() { return (threadIdx.x + 1) % kThreads; }

// Every thread hands its number on to both neighbours.
__global__ void exchange(int* out) {
  __shared__ int numbers[kThreads];
  numbers[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = numbers[left_neighbour()] + 100 * numbers[right_neighbour()];
  __syncthreads();
  numbers[threadIdx.x] = -1;
}

__global__ void exchange_without_barrier(int* out) {
  __shared__ int numbers[kThreads];
  numbers[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = numbers[left_neighbour()] + 100 * numbers[right_neighbour()];
  __syncthreads();
  numbers[threadIdx.x] = -1;
}

// In ascending order each thread finds what the one before wrote.
__global__ void take_from_left_without_barrier(int* out) {
  __shared__ int numbers[kThreads];
  __syncthreads();
  numbers[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = threadIdx.x == 0 ? -1 : numbers[left_neighbour()];
  __syncthreads();
  numbers[threadIdx.x] = -1;
}

// All lanes' sum in three ways, which lanes are odd, and a shuffle within either half of a warp. In
// a block of three dimensions, whose threads count x first.
__global__ void warp_functions(int* out) {
  const int mine = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int lane = mine % warpSize;
  double down = mine;
  float across = mine;
  int scan = mine;
  for (int offset = 16; offset > 0; offset /= 2) {
    down += __shfl_down_sync(~0u, down, offset);
    across += __shfl_xor_sync(~0u, across, offset);
  }
  for (int offset = 1; offset < 32; offset *= 2) {
    const int below = __shfl_up_sync(~0u, scan, offset);
    if (lane >= offset) scan += below;
  }
  bool right = __shfl_sync(~0u, down, 0) == across && __shfl_sync(~0u, scan, 31) == across;
  right = right && __ballot_sync(~0u, lane % 2) == 0xaaaaaaaau;
  int place;
  if (lane < 16)
    place = __shfl_sync(0xffffu, lane, 3, 8);
  else
    place = __shfl_down_sync(0xffff0000u, lane, 3, 8);
  right = right && place == (lane < 16 ? lane / 8 * 8 + 3 : lane + (lane % 8 < 5 ? 3 : 0));
  __syncwarp();
  out[mine] = right ? int(across) : -1;
}

__global__ void barrier_in_a_branch(int*) {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void different_barriers(int*) {
  if (threadIdx.x % 2 == 0)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void shuffle_in_a_branch(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
  __syncthreads();
}

__global__ void shuffle_from_a_returned_lane(int* out) {
  if (threadIdx.x % 32 >= 16) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 16);
}

__global__ void shuffle_outside_the_mask(int* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1, 1);
}

__global__ void misaligned_load(int* out) {
  out[threadIdx.x] = __ldcs(reinterpret_cast<const int4*>(out + 1)).x;
}

__global__ void misaligned_store(int* out) {
  *reinterpret_cast<int4*>(out + threadIdx.x) = make_int4(0, 0, 0, 0);
}

__global__ void index_outside_shared_memory(int*) {
  __shared__ int numbers[kThreads];
  numbers[threadIdx.x + 1] = 0;
}

__global__ void null_pointer(int* out) {
  const volatile int* nowhere = out == nullptr ? out : nullptr;
  out[threadIdx.x] = *nowhere;
}

__global__ void unmapped_memory(int* out) {
  out[threadIdx.x] = *reinterpret_cast<const volatile int*>(uintptr_t(out) | uintptr_t(1) << 62);
}

__global__ void deep_recursion(int* out) {
  struct Calls {
    static __device__ int deeper(volatile int* from) {
      volatile int here[64] = {*from + 1};
      return here[0] == 0 ? 0 : deeper(here) + here[0];
    }
  };
  volatile int start = 0;
  out[threadIdx.x] = Calls::deeper(&start);
}

__global__ void nothing(int*) {}

struct Case {
  const char* name;
  void (*kernel)(int*);
  dim3 grid = {1};
  dim3 block = {kThreads};
};

const Case kCases[] = {
    {"exchange", &exchange, {2}},
    {"exchange_without_barrier", &exchange_without_barrier},
    {"take_from_left_without_barrier", &take_from_left_without_barrier},
    {"warp_functions", &warp_functions, {1}, {8, 4, 2}},
    {"barrier_in_a_branch", &barrier_in_a_branch},
    {"different_barriers", &different_barriers},
    {"shuffle_in_a_branch", &shuffle_in_a_branch},
    {"shuffle_from_a_returned_lane", &shuffle_from_a_returned_lane},
    {"shuffle_outside_the_mask", &shuffle_outside_the_mask},
    {"misaligned_load", &misaligned_load},
    {"misaligned_store", &misaligned_store},
    {"index_outside_shared_memory", &index_outside_shared_memory},
    {"null_pointer", &null_pointer},
    {"unmapped_memory", &unmapped_memory},
    {"deep_recursion", &deep_recursion},
    {"no_blocks", &nothing, {0}},
    {"too_many_threads", &nothing, {1}, {1025}},
    {"too_many_threads_in_all", &nothing, {1}, {32, 32, 2}},
};

}  // namespace

// What the launch of a case said; empty where it said nothing. `out`: [kThreads], 16-byte aligned.
extern "C" __attribute__((visibility("default"))) const char* cuda_emulation_case(const char* name,
                                                                                  int* out) {
  static std::string said;
  said = std::string("no such case: ") + name;
  for (const Case& tried : kCases) {
    if (std::string(name) != tried.name) continue;
    cudaLaunchConfig_t config = {};
    config.gridDim = tried.grid;
    config.blockDim = tried.block;
    try {
      const cudaError_t error = cudaLaunchKernelEx(&config, tried.kernel, out);
      said = error == cudaSuccess ? "" : cudaGetErrorString(error);
    } catch (const std::exception& failure) {
      said = failure.what();
    }
  }
  return said.c_str();
}
