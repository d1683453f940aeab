// Four lanes in the compiler's portable vector type: SSE2 on x86-64, NEON on 64-bit Arm.
#include <cstdint>
#include <cstring>

namespace gapo {
namespace cpu {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

typedef float Float4 __attribute__((vector_size(16)));

struct Vec {
  static constexpr int kLanes = 4;
  Float4 v;
  static Vec broadcast(float x) { return {Float4{x, x, x, x}}; }
};

typedef double Double2 __attribute__((vector_size(16)));

struct Wide {
  static constexpr int kLanes = 2;
  Double2 v;
  static Wide zero() { return {Double2{0, 0}}; }
};

constexpr int kDirect = 4;
constexpr int kColumns = 2;
constexpr int kSums = 8;

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

float widen(Bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

float widen(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u)  // Inf and NaN
    return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude < 0x400u) {  // zero and subnormal: a multiple of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  return from_bits(sign | ((magnitude << 13) + (112u << 23)));
}

// Round to nearest, ties to even.
Bf16 to_bf16(float x) {
  const uint32_t bits = to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

Half to_half(float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65520
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is a multiple of 2^-24. Adding 1.5 * 2^23 makes the addition round.
    const float counted = from_bits(magnitude) * 0x1p24f + 0x1.8p23f;
    return {static_cast<uint16_t>(sign | (to_bits(counted) & 0x7ffu))};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
}

Vec load(const float* p) {
  Vec x;
  std::memcpy(&x.v, p, sizeof(x.v));
  return x;
}

template <class T>
Vec load_narrow(const T* p) {
  return {Float4{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}};
}
Vec load(const Bf16* p) { return load_narrow(p); }
Vec load(const Half* p) { return load_narrow(p); }

void store(Vec x, float* p) { std::memcpy(p, &x.v, sizeof(x.v)); }
void store(Vec x, Bf16* p) {
  for (int i = 0; i < 4; ++i) p[i] = to_bf16(x.v[i]);
}
void store(Vec x, Half* p) {
  for (int i = 0; i < 4; ++i) p[i] = to_half(x.v[i]);
}

Vec plus(Vec a, Vec b) { return {a.v + b.v}; }
Vec multiply(Vec a, Vec b) { return {a.v * b.v}; }
Vec multiply_add(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
Vec inverse_root(Vec x, Vec scale, Vec epsilon) {  // NaN stays NaN
  Vec result;
  for (int i = 0; i < 4; ++i)
    result.v[i] =
        x.v[i] <= 0.0f ? 0.0f : 1.0f / (__builtin_sqrtf(x.v[i]) * scale.v[i] + epsilon.v[i]);
  return result;
}

Wide load_wide(const float* p) { return {Double2{p[0], p[1]}}; }
Wide load_wide(const Bf16* p) { return {Double2{widen(p[0]), widen(p[1])}}; }
Wide load_wide(const Half* p) { return {Double2{widen(p[0]), widen(p[1])}}; }
Wide load_wide(const double* p) {
  Wide x;
  std::memcpy(&x.v, p, sizeof(x.v));
  return x;
}
void store(Wide x, double* p) { std::memcpy(p, &x.v, sizeof(x.v)); }
Wide plus(Wide a, Wide b) { return {a.v + b.v}; }
Wide multiply(Wide a, Wide b) { return {a.v * b.v}; }
Wide multiply_add(Wide a, Wide b, Wide c) { return {a.v * b.v + c.v}; }

}  // namespace
}  // namespace cpu
}  // namespace gapo

#include "cpu/kernels.inl"

namespace gapo {
namespace cpu {
const Kernels kBaseline = {"baseline", gramian, combine, accumulate};
}
}  // namespace gapo
