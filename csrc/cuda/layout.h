// Sizes that the host's plan and the device's kernels share.
#pragma once

#include <cstdint>

namespace gapo {
namespace cuda {

constexpr int64_t kChunk = 4096;  // elements per chunk of a gramian block
constexpr int kRunFields = 3;     // begin, end, first chunk

}  // namespace cuda
}  // namespace gapo
