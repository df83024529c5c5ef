// Vectors of WIDTH floats: exp, conversions, loads and stores, for the kernels that include this (kernels.inl says how).
#pragma once

#include "kernels.h"
#if defined(__AVX2__)
#include <immintrin.h>
#if !defined(__clang__)  // GCC takes the deliberately undefined operand in its own AVX-512 header for a mistake
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#endif

namespace megamug {
namespace {

typedef float vfloat __attribute__((vector_size(4 * WIDTH)));
typedef int32_t vint __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t vuint __attribute__((vector_size(4 * WIDTH)));
typedef uint8_t vbyte __attribute__((vector_size(WIDTH)));
typedef uint16_t vhalf __attribute__((vector_size(2 * WIDTH)));

constexpr float kInfinity = __builtin_inff();

inline vfloat splat(float x) { return x - vfloat{}; }

// The numbers 0 to n - 1 as template arguments: lanes of a shuffle.
template <int... i>
struct Lanes {};
template <int n, int... i>
struct MakeLanes : MakeLanes<n - 1, n - 1, i...> {};
template <int... i>
struct MakeLanes<0, i...> {
  typedef Lanes<i...> type;
};

inline float horizontal_sum(vfloat x) {
  float total = 0;
  for (int i = 0; i < WIDTH; i++) total += x[i];
  return total;
}

// The larger of the two; NaN where `b` is NaN, as the x86 instruction has it.
inline vfloat larger(vfloat a, vfloat b) {
#if WIDTH == 16 && defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif WIDTH == 8 && defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// 2^x for x <= 127 (what is larger is not defined): 2^n 2^f with x = n + f, |f| <= 1/2, and a polynomial for 2^f with the
// least relative error (1.1e-7) that is exactly 1 at 0. -inf gives 0, results under 2^-126 give 0 or a subnormal number,
// NaN stays NaN.
inline vfloat exp2(vfloat x) {
  const vfloat t = larger(splat(-150.0f), x);
#if WIDTH == 16 && defined(__AVX512F__)
  const vfloat n = (vfloat)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT);
#else
  const vfloat shifted = t + 12582912.0f;  // 1.5 * 2^23: the low bits now hold the nearest integer
  const vfloat n = shifted - 12582912.0f;
#endif
  const vfloat f = t - n;
  vfloat p = f * 0.001326472614891827f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.0f;
#if WIDTH == 16 && defined(__AVX512F__)
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const vfloat power = (vfloat)(((vint)shifted + 127) << 23);
  return t < -126.0f ? vfloat{} : p * power;
#endif
}

// exp for x <= 88. The rounding of x log2(e) adds |x| 6e-8 to the error of exp2.
inline vfloat exp(vfloat x) { return exp2(x * 1.44269504088896341f); }

// ---- element types: load and store a vector, or its first `count` elements ----

struct Float32 {
  typedef float type;
  typedef vfloat raw;
  static vfloat widen(raw x) { return x; }
  static raw narrow(vfloat x) { return x; }
};

struct BFloat16 {
  typedef uint16_t type;
  typedef vhalf raw;
  static vfloat widen(raw x) { return (vfloat)(__builtin_convertvector(x, vuint) << 16); }
  static raw narrow(vfloat x) {
    const vuint bits = (vuint)x;
    const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    const vint not_a_number = x != x;
    return __builtin_convertvector(not_a_number ? vuint{} + 0x7fc0u : rounded, vhalf);
  }
};

struct Float16 {
  typedef uint16_t type;
  typedef vhalf raw;
  static vfloat widen(raw x) {
    const vuint bits = __builtin_convertvector(x, vuint), magnitude = bits & 0x7fff;
    const vfloat finite = (vfloat)(magnitude << 13) * 0x1p112f;  // exact, subnormal numbers included
    const vuint special = (magnitude << 13) | 0x7f800000u;
    const vint infinite_or_nan = magnitude >= 0x7c00u;
    return (vfloat)((infinite_or_nan ? special : (vuint)finite) | ((bits & 0x8000) << 16));
  }
  static raw narrow(vfloat x) {
    const vuint bits = (vuint)x, magnitude = bits & 0x7fffffff;
    const vuint normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    const vuint subnormal = (vuint)((vfloat)magnitude + 0.5f) - 0x3f000000u;  // the sum rounds at 2^-24
    const vint is_small = magnitude < 0x38800000u, overflows = magnitude >= 0x477ff000u, is_nan = magnitude > 0x7f800000u;
    vuint half = is_small ? subnormal : normal;
    half = overflows ? vuint{} + 0x7c00u : half;
    half = is_nan ? vuint{} + 0x7e00u : half;
    return __builtin_convertvector(half | ((bits >> 16) & 0x8000), vhalf);
  }
};

struct UInt8 {
  typedef uint8_t type;
  typedef vbyte raw;
  static vfloat widen(raw x) { return __builtin_convertvector((vint)__builtin_convertvector(__builtin_convertvector(x, vhalf), vuint), vfloat); }
};

template <class T>
inline vfloat load(const typename T::type* p) {
  typename T::raw x;
  __builtin_memcpy(&x, p, sizeof x);
  return T::widen(x);
}

template <class T>
inline void store(typename T::type* p, vfloat value) {
  const typename T::raw x = T::narrow(value);
  __builtin_memcpy(p, &x, sizeof x);
}

template <class T>
inline vfloat load_first(const typename T::type* p, int64_t count, float padding) {
  typename T::raw x{};
  __builtin_memcpy(&x, p, count * sizeof(*p));
  vfloat value = T::widen(x);
  for (int i = (int)count; i < WIDTH; i++) value[i] = padding;
  return value;
}

template <class T>
inline void store_first(typename T::type* p, vfloat value, int64_t count) {
  const typename T::raw x = T::narrow(value);
  __builtin_memcpy(p, &x, count * sizeof(*p));
}

// Two vectors of neighbours at once, for loops that do not care which of them holds which element. Two bfloat16 share a
// 32-bit word: the even ones are its low half, the odd ones its high half, which is cheaper than widening in order.
template <class T>
inline void load_two(const typename T::type* p, vfloat& a, vfloat& b) {
  a = load<T>(p);
  b = load<T>(p + WIDTH);
}
template <>
inline void load_two<BFloat16>(const uint16_t* p, vfloat& even, vfloat& odd) {
  vuint pairs;
  __builtin_memcpy(&pairs, p, sizeof pairs);
  even = (vfloat)(pairs << 16);
  odd = (vfloat)(pairs & 0xffff0000u);
}

template <class T>
inline void store_two(typename T::type* p, vfloat a, vfloat b) {
  store<T>(p, a);
  store<T>(p + WIDTH, b);
}
// NaN comes out as NaN only if its low 16 bits are not all ones, which holds for what arithmetic on bfloat16 makes.
template <>
inline void store_two<BFloat16>(uint16_t* p, vfloat even, vfloat odd) {
  const vuint low = (vuint)even, high = (vuint)odd;
  const vuint pairs = ((low + 0x7fff + ((low >> 16) & 1)) >> 16) | ((high + 0x7fff + ((high >> 16) & 1)) & 0xffff0000u);
  __builtin_memcpy(p, &pairs, sizeof pairs);
}

template <class T>
inline float load_one(const typename T::type* p) { return load_first<T>(p, 1, 0.0f)[0]; }

}  // namespace
}  // namespace megamug
