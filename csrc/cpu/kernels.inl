// The kernels themselves, compiled once per instruction set: the including file defines WIDTH (floats in a vector) and
// TABLE, and the compiler is given the matching flags. Vectors are the GCC/Clang extension, so one source serves x86 and
// ARM. No standard header with inline functions may come in here: the linker would keep one copy for all instruction sets.
#include "kernels.h"
#if defined(__AVX2__)
#include <immintrin.h>
#if !defined(__clang__)  // GCC takes the deliberately undefined operand in its own AVX-512 header for a mistake
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
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

// exp for x <= 88 (what is larger is not defined): 2^n 2^f with x log2(e) = n + f, |f| <= 1/2, and a polynomial for 2^f
// with the least relative error (1.1e-7) that is exactly 1 at 0. The rounding of x log2(e) adds |x| 6e-8. -inf gives 0,
// results under 2^-126 give 0 or a subnormal number, NaN stays NaN.
inline vfloat exp(vfloat x) {
  const vfloat t = larger(splat(-150.0f), x * 1.44269504088896341f);
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

// ---- cross-entropy ----

// Columns are taken in blocks that stay in the first-level cache, so memory is read once: first the block's maximum,
// then the sum of exponentials against the largest maximum so far.
constexpr int64_t kBlock = 2048;

template <class T, bool with_sum>
void row_statistics(const typename T::type* x, int64_t columns, float* maximum, float* sum_of_exp, float* sum_of_logits) {
  constexpr int64_t step = 4 * WIDTH;
  vfloat exponentials[4] = {}, logits[4] = {};
  float highest = -kInfinity;
  for (int64_t start = 0; start < columns; start += kBlock) {
    const int64_t end = start + kBlock < columns ? start + kBlock : columns;
    vfloat peak[4];
    for (auto& v : peak) v = splat(highest);
    int64_t j = start;
    for (; j + step <= end; j += step)
      for (int k = 0; k < 4; k += 2) {
        vfloat a, b;
        load_two<T>(x + j + k * WIDTH, a, b);
        peak[k] = larger(a, peak[k]);
        peak[k + 1] = larger(b, peak[k + 1]);
        if constexpr (with_sum) logits[k] += a, logits[k + 1] += b;
      }
    for (; j < end; j += WIDTH) {
      const int64_t count = end - j < WIDTH ? end - j : WIDTH;
      const vfloat v = load_first<T>(x + j, count, -kInfinity);
      peak[0] = larger(v, peak[0]);
      if constexpr (with_sum) logits[0] += load_first<T>(x + j, count, 0.0f);
    }
    float block_highest = highest;
    for (auto& v : peak)
      for (int i = 0; i < WIDTH; i++) block_highest = v[i] > block_highest ? v[i] : block_highest;
    if (block_highest > highest) {
      const vfloat rescale = exp(splat(highest - block_highest));
      for (auto& v : exponentials) v *= rescale;
      highest = block_highest;
    }
    // while all is -inf a shift of 0 gives the right sum: 0, or NaN where there is one
    const vfloat shift = splat(highest == -kInfinity ? 0.0f : highest);
    for (j = start; j + step <= end; j += step)
      for (int k = 0; k < 4; k += 2) {
        vfloat a, b;
        load_two<T>(x + j + k * WIDTH, a, b);
        for (int64_t ahead = 0; ahead < 2 * WIDTH; ahead += 64 / sizeof(*x))  // the next block, while this one computes
          __builtin_prefetch(x + j + k * WIDTH + kBlock + ahead);
        exponentials[k] += exp(a - shift);
        exponentials[k + 1] += exp(b - shift);
      }
    for (; j < end; j += WIDTH) {
      const int64_t count = end - j < WIDTH ? end - j : WIDTH;
      exponentials[0] += exp(load_first<T>(x + j, count, -kInfinity) - shift);
    }
  }
  *maximum = highest;
  *sum_of_exp = horizontal_sum((exponentials[0] + exponentials[1]) + (exponentials[2] + exponentials[3]));
  if constexpr (with_sum) *sum_of_logits = horizontal_sum((logits[0] + logits[1]) + (logits[2] + logits[3]));
}

template <class T>
void statistics_of(const Rows& rows, const int64_t* column, const Statistics& out, bool sum, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; r++) {
    const auto* x = static_cast<const typename T::type*>(rows.logits) + r * rows.stride;
    out.sum_of_logits[r] = 0;
    if (sum)
      row_statistics<T, true>(x, rows.valid, out.maximum + r, out.sum_of_exp + r, out.sum_of_logits + r);
    else
      row_statistics<T, false>(x, rows.valid, out.maximum + r, out.sum_of_exp + r, nullptr);
    out.target_logit[r] = column[r] < 0 ? 0.0f : load_one<T>(x + column[r]);
  }
}

template <class T>
void gradient_of(const Rows& rows, const int64_t* column, const Gradient& g, int64_t begin, int64_t end) {
  typedef typename T::type type;
  for (int64_t r = begin; r < end; r++) {
    const type* x = static_cast<const type*>(rows.logits) + r * rows.stride;
    type* out = static_cast<type*>(g.output) + r * g.stride;
    if (!g.active[r]) {
      __builtin_memset(out, 0, rows.columns * sizeof(type));
      continue;
    }
    // exp(x - max) / sum, not exp(x - lse): the rounding of a large lse would be in every probability
    const float scale = g.factor[r] * g.z_factor[r] / g.sum_of_exp[r];
    const float offset = g.factor[r] * g.smoothing_per_column;
    const vfloat shift = splat(g.maximum[r]);
    const bool owned = column[r] >= 0;
    // The target's entry is made on its own from the unrounded probability.
    const float target_exponential = owned ? exp(splat(load_one<T>(x + column[r])) - shift)[0] : 0.0f;
    int64_t j = 0;
    for (; j + 2 * WIDTH <= rows.valid; j += 2 * WIDTH) {
      vfloat a, b;
      load_two<T>(x + j, a, b);
      store_two<T>(out + j, exp(a - shift) * scale - offset, exp(b - shift) * scale - offset);
    }
    for (; j < rows.valid; j += WIDTH) {
      const int64_t count = rows.valid - j < WIDTH ? rows.valid - j : WIDTH;
      store_first<T>(out + j, exp(load_first<T>(x + j, count, 0.0f) - shift) * scale - offset, count);
    }
    __builtin_memset(out + rows.valid, 0, (rows.columns - rows.valid) * sizeof(type));
    if (owned) {
      const float kept = 1.0f - g.label_smoothing;
      const float value = target_exponential * scale - offset - g.factor[r] * kept;
      store_first<T>(out + column[r], splat(value), 1);
    }
  }
}

// ---- masked patch ----

// Planes to pixels: lane i of part k of the interleaved row is channel (k W + i) % 3 of pixel (k W + i) / 3.
template <int... i>
struct Lanes {};
template <int n, int... i>
struct MakeLanes : MakeLanes<n - 1, n - 1, i...> {};
template <int... i>
struct MakeLanes<0, i...> {
  typedef Lanes<i...> type;
};

template <int k, int... i>
inline vfloat interleaved(vfloat red, vfloat green, vfloat blue, Lanes<i...>) {
  const vfloat two = __builtin_shufflevector(red, green, ((k * WIDTH + i) % 3 == 1 ? WIDTH : 0) + (k * WIDTH + i) / 3 ...);
  return __builtin_shufflevector(two, blue, ((k * WIDTH + i) % 3 == 2 ? WIDTH + (k * WIDTH + i) / 3 : i)...);
}

// The patch in the order (row, column, channel), scaled and shifted per channel. Whole vectors are stored: `target` has
// room for three more of them than the patch needs.
template <class T>
void read_patch(const Patches& p, int64_t image, int64_t patch, float* target) {
  const int64_t size = p.patch_size, plane = p.height * p.width, across = p.width / size;
  const auto* corner = static_cast<const typename T::type*>(p.images) + image * 3 * plane +
                       (patch / across) * size * p.width + (patch % across) * size;
  const typename MakeLanes<WIDTH>::type lanes;
  for (int64_t y = 0; y < size; y++)
    for (int64_t x = 0; x < size; x += WIDTH) {
      const auto* pixels = corner + y * p.width + x;
      vfloat channel[3];
      for (int c = 0; c < 3; c++) {
        const auto* start = pixels + c * plane;
        channel[c] = size - x >= WIDTH ? load<T>(start) : load_first<T>(start, size - x, 0.0f);
        channel[c] = channel[c] * p.scale[c] + p.shift[c];
      }
      float* out = target + (y * size + x) * 3;
      store<Float32>(out, interleaved<0>(channel[0], channel[1], channel[2], lanes));
      store<Float32>(out + WIDTH, interleaved<1>(channel[0], channel[1], channel[2], lanes));
      store<Float32>(out + 2 * WIDTH, interleaved<2>(channel[0], channel[1], channel[2], lanes));
    }
}

// Sum of term(i) over the vectors and of tail(i) over the values that do not fill one; four sums side by side, since an
// addition takes as long as four can be started.
template <class Term, class Tail>
inline float sum_over(int64_t count, Term term, Tail tail) {
  vfloat sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * WIDTH <= count; i += 4 * WIDTH)
    for (int k = 0; k < 4; k++) sums[k] += term(i + k * WIDTH);
  for (; i + WIDTH <= count; i += WIDTH) sums[0] += term(i);
  float total = horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < count; i++) total += tail(i);
  return total;
}

// Mean (less the first value) and 1 / standard deviation. Sums are taken of the differences to the first value, so that
// a patch of one colour has variance 0, not rounding noise.
inline void normalisation(const float* target, int64_t count, float* offset, float* scale) {
  const float first = target[0];
  const float mean = sum_over(
                         count, [&](int64_t i) { return load<Float32>(target + i) - first; },
                         [&](int64_t i) { return target[i] - first; }) / count;
  const auto square = [](auto d) { return d * d; };
  const float squares = sum_over(
      count, [&](int64_t i) { return square(load<Float32>(target + i) - first - mean); },
      [&](int64_t i) { return square(target[i] - first - mean); });
  *offset = mean;
  *scale = 1.0f / __builtin_sqrtf(squares / (count - 1) + 1e-6f);
}

template <class T, bool with_gradient>
float compare(const Patches& p, const float* target, int64_t row) {
  const int64_t count = p.patch_size * p.patch_size * 3;
  const auto* prediction = static_cast<const typename T::type*>(p.predictions) + row * count;
  auto* gradient = static_cast<typename T::type*>(p.gradient) + (with_gradient ? row * count : 0);
  float first = 0, offset = 0, scale = 1;
  if (p.norm_pix) {
    first = target[0];
    normalisation(target, count, &offset, &scale);
  }
  const float twice = 2.0f / count;
  return sum_over(
             count,
             [&](int64_t i) {
               const vfloat d = load<T>(prediction + i) - (load<Float32>(target + i) - first - offset) * scale;
               if constexpr (with_gradient) store<T>(gradient + i, d * twice);
               return d * d;
             },
             [&](int64_t i) {
               const float d = load_one<T>(prediction + i) - (target[i] - first - offset) * scale;
               if constexpr (with_gradient) store_first<T>(gradient + i, splat(d * twice), 1);
               return d * d;
             }) /
         count;
}

template <class T>
float compare(const Patches& p, const float* target, int64_t row) {
  return p.gradient ? compare<T, true>(p, target, row) : compare<T, false>(p, target, row);
}

float patch(const Patches& p, float* scratch, int64_t image, int64_t patch, int64_t row) {
  switch (p.image_dtype) {
    case Dtype::uint8: read_patch<UInt8>(p, image, patch, scratch); break;
    case Dtype::float32: read_patch<Float32>(p, image, patch, scratch); break;
    case Dtype::bfloat16: read_patch<BFloat16>(p, image, patch, scratch); break;
    case Dtype::float16: read_patch<Float16>(p, image, patch, scratch); break;
  }
  switch (p.prediction_dtype) {
    case Dtype::bfloat16: return compare<BFloat16>(p, scratch, row);
    case Dtype::float16: return compare<Float16>(p, scratch, row);
    default: return compare<Float32>(p, scratch, row);
  }
}

void statistics(const Rows& rows, const int64_t* column, const Statistics& out, bool sum, int64_t begin, int64_t end) {
  switch (rows.dtype) {
    case Dtype::bfloat16: return statistics_of<BFloat16>(rows, column, out, sum, begin, end);
    case Dtype::float16: return statistics_of<Float16>(rows, column, out, sum, begin, end);
    default: return statistics_of<Float32>(rows, column, out, sum, begin, end);
  }
}

void gradient(const Rows& rows, const int64_t* column, const Gradient& g, int64_t begin, int64_t end) {
  switch (rows.dtype) {
    case Dtype::bfloat16: return gradient_of<BFloat16>(rows, column, g, begin, end);
    case Dtype::float16: return gradient_of<Float16>(rows, column, g, begin, end);
    default: return gradient_of<Float32>(rows, column, g, begin, end);
  }
}

}  // namespace

const Kernels TABLE = {TABLE_NAME, statistics, gradient, patch};

}  // namespace megamug
