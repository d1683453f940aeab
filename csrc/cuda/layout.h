// Sizes that the host's plan and the kernels share.
#pragma once

#include <cstdint>

namespace gapo {
namespace cuda {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 65536;  // elements of a block: 256 products a thread and accumulator
constexpr int kRunFields = 3;      // begin, end, first chunk

}  // namespace cuda
}  // namespace gapo
