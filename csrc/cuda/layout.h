// Sizes that the host's plan and the kernels share.
#pragma once

#include <cstdint>

namespace gapo {
namespace cuda {

constexpr int64_t kChunk = 4096;  // elements that a block of gramian takes at a time
constexpr int kRunFields = 3;     // begin, end, first chunk

}  // namespace cuda
}  // namespace gapo
