// Conversions of fp16 as cuda_fp16.h has them, in integer arithmetic.
#pragma once

#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
  const unsigned sign = (x.bits & 0x8000u) << 16;
  const unsigned exponent = x.bits >> 10 & 0x1fu;
  const unsigned fraction = x.bits & 0x3ffu;
  if (exponent == 0) {  // a multiple of 2^-24
    const float magnitude = float(fraction) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  if (exponent == 0x1f) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

inline __half __float2half_rn(float x) {  // to nearest even
  const unsigned bits = __float_as_uint(x);
  const unsigned sign = bits >> 16 & 0x8000u;
  const unsigned magnitude = bits & 0x7fffffffu;
  unsigned rounded;
  if (magnitude > 0x7f800000u) {
    return {0x7fff};  // the device's NaN
  } else if (magnitude >= 0x477ff000u) {
    rounded = 0x7c00u;  // from the middle between 65504 and 65536
  } else if (magnitude >= 0x38800000u) {
    rounded = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  } else {  // below 2^-14: a multiple of 2^-24, which the host's conversion rounds to
    rounded = unsigned(nearbyintf(fabsf(x) * 0x1p24f));
  }
  return {static_cast<unsigned short>(sign | rounded)};
}
