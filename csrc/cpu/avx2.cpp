// Eight lanes: AVX2, FMA and F16C.
#include <immintrin.h>

#include <cstdint>

namespace gapo {
namespace cpu {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;
  static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
};

struct Wide {
  static constexpr int kLanes = 4;
  __m256d v;
  static Wide zero() { return {_mm256_setzero_pd()}; }
};

constexpr int kDirect = 4;   // 10 sums and 4 rows in 16 registers
constexpr int kColumns = 2;  // 8 sums, 4 rows and a column
constexpr int kSums = 8;     // with a few terms and a coefficient

float widen(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}
float widen(Half x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits))); }

Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
Vec load(const Bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
Vec load(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

void store(Vec x, float* p) { _mm256_storeu_ps(p, x.v); }
void store(Vec x, Bf16* p) {  // round to nearest, ties to even; NaN stays NaN
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
void store(Vec x, Half* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

Vec plus(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
Vec multiply(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
Vec inverse_root(Vec x, Vec scale, Vec epsilon) {  // NaN stays NaN
  const __m256 root = _mm256_mul_ps(_mm256_sqrt_ps(x.v), scale.v);
  const __m256 inverse = _mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_add_ps(root, epsilon.v));
  return {_mm256_and_ps(inverse, _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_NLE_UQ))};
}

Wide load_wide(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
Wide load_wide(const Bf16* p) {
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16)))};
}
Wide load_wide(const Half* p) {
  return {_mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
Wide load_wide(const double* p) { return {_mm256_loadu_pd(p)}; }
void store(Wide x, double* p) { _mm256_storeu_pd(p, x.v); }
Wide plus(Wide a, Wide b) { return {_mm256_add_pd(a.v, b.v)}; }
Wide multiply(Wide a, Wide b) { return {_mm256_mul_pd(a.v, b.v)}; }
Wide multiply_add(Wide a, Wide b, Wide c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }

}  // namespace
}  // namespace cpu
}  // namespace gapo

#include "cpu/kernels.inl"

namespace gapo {
namespace cpu {
const Kernels kAvx2 = {"avx2", gramian, combine, accumulate};
}
}  // namespace gapo
