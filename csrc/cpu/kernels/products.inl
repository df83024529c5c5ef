// Matrix products of packed blocks and their packing, for attention.inl.
//
// Products take 32-bit units: one float, or two bfloat16 that are neighbours along the axis summed over. A unit of the
// left factor meets a vector of units of the right one. Two forms of packing serve all seven products of attention:
//   across [units along a head's width][tokens]: for products that sum over the width, either factor
//   down   [units along tokens][width]: for products that sum over tokens, the right factor
#pragma once

#include "vectors.inl"

// A loop over constant bounds whose arrays are to become registers.
#if defined(__clang__)
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

namespace megamug {
namespace {

struct Single {
  typedef float unit;
  typedef vfloat vunit;
  static constexpr int values = 1;
  static vfloat multiply_add(unit a, vunit b, vfloat sum) { return splat(a) * b + sum; }
};

#if defined(__AVX512BF16__)
struct Pair {
  typedef uint32_t unit;
  typedef vuint vunit;
  static constexpr int values = 2;
  static vfloat multiply_add(unit a, vunit b, vfloat sum) {
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
  }
};
#endif

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <class V, class E>
inline V vector_at(const E* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
template <class V, class E>
inline void put(E* p, V x) { __builtin_memcpy(p, &x, sizeof x); }

template <int distance, class V, int... i>
inline V exchanged(V x, Lanes<i...>) { return __builtin_shufflevector(x, x, (i ^ distance)...); }

// The sum of all lanes, by halves.
template <int distance = WIDTH / 2>
inline float sum_of(vfloat x) {
  if constexpr (distance == 0)
    return x[0];
  else
    return sum_of<distance / 2>(x + exchanged<distance>(x, typename MakeLanes<WIDTH>::type{}));
}

// ---- matrix products ----

// c[rows][vectors] (+)= a b over `depth` units. `along` is a's stride between rows, `step` its stride along the depth.
template <class U, int64_t along, int rows, int vectors>
inline void tile(int64_t depth, const typename U::unit* a, int64_t step, const typename U::unit* b, int64_t b_stride,
                 float* c, int64_t c_stride, bool add) {
  vfloat sums[rows][vectors];
  UNROLLED
  for (int r = 0; r < rows; r++) {
    UNROLLED
    for (int v = 0; v < vectors; v++) sums[r][v] = add ? vector_at<vfloat>(c + r * c_stride + v * WIDTH) : vfloat{};
  }
  for (int64_t k = 0; k < depth; k++, a += step, b += b_stride) {
    typename U::vunit right[vectors];
    UNROLLED
    for (int v = 0; v < vectors; v++) right[v] = vector_at<typename U::vunit>(b + v * WIDTH);
    UNROLLED
    for (int r = 0; r < rows; r++) {
      UNROLLED
      for (int v = 0; v < vectors; v++) sums[r][v] = U::multiply_add(a[r * along], right[v], sums[r][v]);
    }
  }
  UNROLLED
  for (int r = 0; r < rows; r++) {
    UNROLLED
    for (int v = 0; v < vectors; v++) put(c + r * c_stride + v * WIDTH, sums[r][v]);
  }
}

template <class U, int64_t along, int vectors, int tallest>
void panel(int64_t rows, int64_t depth, const typename U::unit* a, int64_t step, const typename U::unit* b,
           int64_t b_stride, float* c, int64_t c_stride, bool add) {
  int64_t r = 0;
  for (; r + tallest <= rows; r += tallest)
    tile<U, along, tallest, vectors>(depth, a + r * along, step, b, b_stride, c + r * c_stride, c_stride, add);
  if (rows - r >= 4) {
    tile<U, along, 4, vectors>(depth, a + r * along, step, b, b_stride, c + r * c_stride, c_stride, add);
    r += 4;
  }
  for (; r + 2 <= rows; r += 2)
    tile<U, along, 2, vectors>(depth, a + r * along, step, b, b_stride, c + r * c_stride, c_stride, add);
  if (r < rows) tile<U, along, 1, vectors>(depth, a + r * along, step, b, b_stride, c + r * c_stride, c_stride, add);
}

// c [rows, columns] (+)= a [rows, depth] b [depth, columns]; columns in whole vectors.
template <class U, int64_t along>
void product(int64_t rows, int64_t columns, int64_t depth, const typename U::unit* a, int64_t step,
             const typename U::unit* b, int64_t b_stride, float* c, int64_t c_stride, bool add) {
  constexpr int64_t widest = WIDTH == 16 ? 4 : 2;  // vectors; 24 or 12 sums in 32 or 16 registers
  for (int64_t left = blocks_of(columns, WIDTH), panels = blocks_of(left, widest); panels > 0; panels--) {
    const int64_t vectors = blocks_of(left, panels);
    switch (vectors) {
#if WIDTH == 16
      case 4: panel<U, along, 4, 6>(rows, depth, a, step, b, b_stride, c, c_stride, add); break;
      case 3: panel<U, along, 3, 8>(rows, depth, a, step, b, b_stride, c, c_stride, add); break;
      case 2: panel<U, along, 2, 12>(rows, depth, a, step, b, b_stride, c, c_stride, add); break;
      default: panel<U, along, 1, 12>(rows, depth, a, step, b, b_stride, c, c_stride, add);
#else
      case 2: panel<U, along, 2, 6>(rows, depth, a, step, b, b_stride, c, c_stride, add); break;
      default: panel<U, along, 1, 8>(rows, depth, a, step, b, b_stride, c, c_stride, add);
#endif
    }
    b += vectors * WIDTH;
    c += vectors * WIDTH;
    left -= vectors;
  }
}

// ---- tokens, and their packing ----

template <class T>
inline typename T::type* row_of(const Heads& h, int64_t token, int64_t batch, int64_t head) {
  return static_cast<typename T::type*>(h.data) + token * h.token + batch * h.batch + head * h.head;
}

constexpr int64_t kPrefetched = 512;  // tokens of a head that are asked for ahead; of longer ones this hides nothing more

// A head's tokens lie far apart, nothing the processor foresees: they are asked for while the head before is computed.
// `index` counts through the heads of all samples, `heads` of each.
template <class T>
inline void prefetch(const Heads& h, int64_t token, int64_t count, int64_t index, int64_t heads, int64_t width) {
  const int64_t bytes = width * sizeof(typename T::type);
  for (int64_t i = 0; i < least(count, kPrefetched); i++) {
    const char* row = (const char*)row_of<T>(h, token + i, index / heads, index % heads);
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b, 0, 2);
    __builtin_prefetch(row + bytes - 1, 0, 2);
  }
}

// One vector of units from the next values of a token, the first `count` of them, zeros behind.
template <class T, class U>
inline typename U::vunit units_at(const typename T::type* p, int64_t count) {
  if constexpr (U::values == 1) {
    return count >= WIDTH ? load<T>(p) : load_first<T>(p, count, 0.0f);
  } else {
    typename U::vunit x{};
    if (count >= 2 * WIDTH) return vector_at<typename U::vunit>(p);
    __builtin_memcpy(&x, p, count * sizeof *p);
    return x;
  }
}

// Exchanges the off-diagonal halves of blocks of 2 x distance rows and lanes.
template <int distance, class V, int... i>
inline void exchange(V& upper, V& lower, Lanes<i...>) {
  const V a = upper, b = lower;
  upper = __builtin_shufflevector(a, b, (i & distance ? (i ^ distance) + WIDTH : i)...);
  lower = __builtin_shufflevector(a, b, (i & distance ? i + WIDTH : i ^ distance)...);
}

template <int distance = WIDTH / 2, class V>
inline void transpose(V* rows) {
  UNROLLED
  for (int r = 0; r < WIDTH; r++)
    if (!(r & distance)) exchange<distance>(rows[r], rows[r | distance], typename MakeLanes<WIDTH>::type{});
  if constexpr (distance > 1) transpose<distance / 2>(rows);
}

// Tokens [0, count) -> [units][stride], zeros up to a whole vector of tokens.
template <class T, class U>
void pack_across(const typename T::type* tokens, int64_t token_stride, int64_t count, int64_t width,
                 typename U::unit* out, int64_t stride) {
  const int64_t units = blocks_of(width, U::values);
  for (int64_t i = 0; i < count; i += WIDTH)
    for (int64_t u = 0; u < units; u += WIDTH) {
      typename U::vunit rows[WIDTH];
      const int64_t values = width - u * U::values;
      for (int r = 0; r < WIDTH; r++)
        rows[r] = i + r < count ? units_at<T, U>(tokens + (i + r) * token_stride + u * U::values, values)
                                : typename U::vunit{};
      transpose(rows);
      for (int r = 0; r < WIDTH && u + r < units; r++) put(out + (u + r) * stride + i, rows[r]);
    }
}

#if defined(__AVX512BF16__)
// Lanes of low and high, 16-bit values of two tokens, by turns: the units of columns 0 to 15, then of 16 to 31.
inline void interleave(__m512i low, __m512i high, uint32_t* out) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i index = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(32)), 16));
  _mm512_storeu_si512(out, _mm512_permutex2var_epi16(low, index, high));
  const __m512i second = _mm512_add_epi16(index, _mm512_set1_epi16(16));
  _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi16(low, second, high));
}
#endif

// Tokens [0, count) -> [units][stride]; `stride` is the width, rounded up to whole vectors of values.
template <class T, class U>
void pack_down(const typename T::type* tokens, int64_t token_stride, int64_t count, int64_t width,
               typename U::unit* out, int64_t stride) {
  for (int64_t i = 0; i < count; i += U::values, out += stride)
    for (int64_t j = 0; j < width; j += WIDTH * U::values) {
      const auto* p = tokens + i * token_stride + j;
      const auto first = units_at<T, U>(p, width - j);
      if constexpr (U::values == 1) {
        put(out + j, first);
      } else {
#if defined(__AVX512BF16__)
        const auto second = i + 1 < count ? units_at<T, U>(p + token_stride, width - j) : typename U::vunit{};
        interleave((__m512i)first, (__m512i)second, out + j);
#endif
      }
    }
}

// A row of sums, scaled, into a tensor.
template <class T>
inline void write_row(const float* sums, float scale, int64_t width, typename T::type* out) {
  int64_t j = 0;
  for (; j + WIDTH <= width; j += WIDTH) store<T>(out + j, vector_at<vfloat>(sums + j) * scale);
  if (j < width) store_first<T>(out + j, vector_at<vfloat>(sums + j) * scale, width - j);
}

}  // namespace
}  // namespace megamug
