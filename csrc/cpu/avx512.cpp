// Sixteen lanes: AVX-512 F with AVX2, FMA and F16C.
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
  static constexpr int kLanes = 16;
  __m512 v;
  static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
};

struct Wide {
  static constexpr int kLanes = 8;
  __m512d v;
  static Wide zero() { return {_mm512_setzero_pd()}; }
};

constexpr int kDirect = 6;   // 21 sums and 6 rows in 32 registers
constexpr int kColumns = 3;  // 18 sums, 6 rows and a column
constexpr int kSums = 16;    // with a few terms and a coefficient

float widen(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}
float widen(Half x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits))); }

Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
Vec load(const Bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
Vec load(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

void store(Vec x, float* p) { _mm512_storeu_ps(p, x.v); }
void store(Vec x, Bf16* p) {  // round to nearest, ties to even; NaN stays NaN
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i top = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_or_epi32(rounded, nan, top, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
}
void store(Vec x, Half* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

Vec plus(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
Vec multiply(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
Vec inverse_root(Vec x, Vec scale, Vec epsilon) {  // NaN stays NaN
  const __m512 root = _mm512_mul_ps(_mm512_sqrt_ps(x.v), scale.v);
  const __mmask16 counted = _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_NLE_UQ);
  return {_mm512_maskz_div_ps(counted, _mm512_set1_ps(1.0f), _mm512_add_ps(root, epsilon.v))};
}

Wide load_wide(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
Wide load_wide(const Bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)))};
}
Wide load_wide(const Half* p) {
  return {_mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
Wide load_wide(const double* p) { return {_mm512_loadu_pd(p)}; }
void store(Wide x, double* p) { _mm512_storeu_pd(p, x.v); }
Wide plus(Wide a, Wide b) { return {_mm512_add_pd(a.v, b.v)}; }
Wide multiply(Wide a, Wide b) { return {_mm512_mul_pd(a.v, b.v)}; }
Wide multiply_add(Wide a, Wide b, Wide c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }

}  // namespace
}  // namespace cpu
}  // namespace gapo

#include "cpu/kernels.inl"

namespace gapo {
namespace cpu {
const Kernels kAvx512 = {"avx512", gramian, combine, accumulate};
}
}  // namespace gapo
