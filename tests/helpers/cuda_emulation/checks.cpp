// What the compiler's checks call (-fsanitize without its runtime library).
#include <cstdint>

#include "emulator.h"

namespace {
struct CheckedPlace {  // all of the checks' data begins with it
  const char* file;
  uint32_t line;
  uint32_t column;
};
}  // namespace

#define GAPO_CHECK(name, what)                                                \
  extern "C" [[noreturn]] void __ubsan_handle_##name##_abort(void* data) {    \
    const auto* place = static_cast<const CheckedPlace*>(data);               \
    cuda_emulation::fail(what, {place->file, static_cast<int>(place->line)}); \
  }
GAPO_CHECK(type_mismatch_v1, "misaligned or null address")
GAPO_CHECK(out_of_bounds, "index outside an array")
GAPO_CHECK(shift_out_of_bounds, "shift by too much")
GAPO_CHECK(add_overflow, "integer overflow")
GAPO_CHECK(sub_overflow, "integer overflow")
GAPO_CHECK(mul_overflow, "integer overflow")
GAPO_CHECK(negate_overflow, "integer overflow")
GAPO_CHECK(divrem_overflow, "division by zero or integer overflow")
