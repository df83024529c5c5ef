// Attention, forward and backward, part of kernels.inl. Scores are held transposed, keys down and queries across: what
// belongs to a query (maximum, sum, logsumexp) is then a lane of a vector. One head's keys and values are packed once,
// one block of queries is worked on at a time. Every sum has an order of its own, whichever thread takes the task.
#include "products.inl"

namespace megamug {
namespace {

constexpr int64_t kKeyPanel = 96;  // tokens of a packed panel of keys: whole tiles; strides that spread over the cache
constexpr int64_t kKeyBlock = 4 * kKeyPanel;  // keys at a time: their scores stay in the second-level cache
constexpr float kLog2e = 1.44269504088896341f;

// ---- what both directions share ----

// Hands out parts of the scratch; from a null pointer it counts what is needed.
struct Arena {
  char* memory;
  int64_t used = 0;
  template <class E>
  E* take(int64_t count) {
    E* part = memory ? (E*)(memory + used) : nullptr;
    used += blocks_of(count * (int64_t)sizeof(E), 64) * 64;
    return part;
  }
};

// The keys that the queries of a block see: query i those of [first, end).
struct Visible {
  int64_t begin, end;  // of all of them together; begin is even
  int32_t first[kQueryBlock], last[kQueryBlock];
  Visible(const Attention& a, int64_t batch, int64_t query, int64_t count) {
    for (int64_t i = 0; i < kQueryBlock; i++) {
      const bool real = i < count;
      first[i] = real && a.first ? a.first[batch * a.queries + query + i] : 0;
      last[i] = (int32_t)(real && a.causal ? least(query + i + 1, a.keys) : a.keys);
    }
    begin = first[0] & ~1;
    end = last[count - 1];
  }
};

// Scores [keys begin to end, queries] that a query does not see become -infinity.
inline void hide(const Visible& visible, int64_t begin, int64_t end, int64_t queries, float* scores) {
  for (int64_t i = 0; i < queries; i += WIDTH) {
    int64_t from = 0, to = end;  // the keys that all queries of the vector see
    for (int j = 0; j < WIDTH; j++) {
      from = most(from, visible.first[i + j]);
      to = least(to, visible.last[i + j]);
    }
    const vint first = vector_at<vint>(visible.first + i), last = vector_at<vint>(visible.last + i);
    for (int64_t key = begin; key < end; key++) {
      if (key >= from && key < to) {
        key = to - 1;
        continue;
      }
      float* at = scores + (key - begin) * kQueryBlock + i;
      const vint here = vint{} + (int32_t)key;
      put(at, (here >= first) & (here < last) ? vector_at<vfloat>(at) : splat(-kInfinity));
    }
  }
}

// products [keys begin to end, queries] of panels of keys and one block of queries
template <class U>
void score(const typename U::unit* panels, int64_t units, int64_t begin, int64_t end, const typename U::unit* queries,
           int64_t columns, float* out) {
  for (int64_t key = begin; key < end;) {
    const int64_t start = key / kKeyPanel * kKeyPanel, count = least(end, start + kKeyPanel) - key;
    product<U, 1>(count, columns, units, panels + start * units + (key - start), kKeyPanel, queries, kQueryBlock,
                  out + (key - begin) * kQueryBlock, kQueryBlock, false);
    key += count;
  }
}

template <class T, class U>
void pack_panels(const Attention& a, const Heads& h, int64_t batch, int64_t head, typename U::unit* out) {
  const int64_t units = blocks_of(a.width, U::values);
  for (int64_t key = 0; key < a.keys; key += kKeyPanel)
    pack_across<T, U>(row_of<T>(h, key, batch, head), h.token, least(kKeyPanel, a.keys - key), a.width,
                      out + key * units, kKeyPanel);
}

struct Sizes {
  int64_t units, down, panels, blocks;  // units of a row; values of a packed row; tokens in whole panels; query blocks
  template <class U>
  static Sizes of(const Attention& a) {
    const int64_t whole = WIDTH * U::values;
    return {blocks_of(a.width, U::values), blocks_of(a.width, whole) * whole, blocks_of(a.keys, kKeyPanel) * kKeyPanel,
            blocks_of(a.queries, kQueryBlock)};
  }
};

// ---- forward ----

template <class U>
struct ForwardScratch {
  typename U::unit *keys, *values, *queries, *probabilities;
  float *scores, *context;
  Arena arena;
  ForwardScratch(const Attention& a, const Sizes& n, void* memory) : arena{static_cast<char*>(memory)} {
    keys = arena.take<typename U::unit>(n.panels * n.units);
    values = arena.take<typename U::unit>(blocks_of(a.keys, U::values) * n.down);
    queries = arena.take<typename U::unit>(kQueryBlock * n.units);
    scores = arena.take<float>((kKeyBlock + 1) * kQueryBlock);
    probabilities = U::values == 1 ? (typename U::unit*)scores
                                   : arena.take<typename U::unit>(kKeyBlock / U::values * kQueryBlock);
    context = arena.take<float>(kQueryBlock * n.down);
  }
};

// Rows k and k + 1 of the probabilities into the left factor of the product with the values.
template <class U>
inline void put_pair(typename U::unit* out, int64_t key, vfloat first, vfloat second) {
  if constexpr (U::values == 1) {
    put(out + key * kQueryBlock, first);
    put(out + (key + 1) * kQueryBlock, second);
  } else {
#if defined(__AVX512BF16__)
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i index = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
    _mm512_storeu_si512(out + key / 2 * kQueryBlock, _mm512_permutexvar_epi16(index, both));
#endif
  }
}

// Scores of a block of keys -> exp2(slope (score - maximum)) as left factor; running maximum and sum of a vector of
// queries. Returns what earlier sums have to be multiplied by.
template <class U>
inline vfloat exponentials(const float* scores, int64_t keys, float slope, vfloat& maximum, vfloat& sum,
                           typename U::unit* out) {
  vfloat peaks[4] = {maximum, maximum, maximum, maximum};
  int64_t k = 0;
  for (; k + 4 <= keys; k += 4)
    for (int j = 0; j < 4; j++) peaks[j] = larger(peaks[j], vector_at<vfloat>(scores + (k + j) * kQueryBlock));
  for (; k < keys; k++) peaks[0] = larger(peaks[0], vector_at<vfloat>(scores + k * kQueryBlock));
  const vfloat peak = larger(larger(peaks[0], peaks[1]), larger(peaks[2], peaks[3]));
  // where nothing has been seen yet a shift of 0 leaves exponentials of -infinity
  const vfloat shift = (peak == -kInfinity ? vfloat{} : peak) * slope;
  const vfloat factor = exp2(maximum * slope - shift);
  vfloat even = sum * factor, odd{};
  for (k = 0; k + 2 <= keys; k += 2) {
    const vfloat first = exp2(vector_at<vfloat>(scores + k * kQueryBlock) * slope - shift);
    const vfloat second = exp2(vector_at<vfloat>(scores + (k + 1) * kQueryBlock) * slope - shift);
    even += first;
    odd += second;
    put_pair<U>(out, k, first, second);
  }
  if (k < keys) {
    const vfloat last = exp2(vector_at<vfloat>(scores + k * kQueryBlock) * slope - shift);
    even += last;
    put_pair<U>(out, k, last, vfloat{});
  }
  maximum = peak;
  sum = even + odd;
  return factor;
}

template <class T, class U>
void forward_of(const Attention& a, void* memory, int64_t begin, int64_t end) {
  const Sizes n = Sizes::of<U>(a);
  const ForwardScratch<U> scratch(a, n, memory);
  const float slope = a.scale * kLog2e;
  int64_t packed = -1;
  for (int64_t task = begin; task < end; task++) {
    const int64_t query = task % n.blocks * kQueryBlock, head = task / n.blocks % a.heads;
    const int64_t batch = task / n.blocks / a.heads, key_head = head / (a.heads / a.key_heads);
    const int64_t count = least(kQueryBlock, a.queries - query), columns = blocks_of(count, WIDTH) * WIDTH;
    if (packed != batch * a.key_heads + key_head) {
      packed = batch * a.key_heads + key_head;
      pack_panels<T, U>(a, a.key, batch, key_head, scratch.keys);
      pack_down<T, U>(row_of<T>(a.value, 0, batch, key_head), a.value.token, a.keys, a.width, scratch.values, n.down);
      const int64_t next = packed + 1;
      if (next < a.batch * a.key_heads) {
        prefetch<T>(a.key, 0, a.keys, next, a.key_heads, a.width);
        prefetch<T>(a.value, 0, a.keys, next, a.key_heads, a.width);
      }
    }
    pack_across<T, U>(row_of<T>(a.query, query, batch, head), a.query.token, count, a.width, scratch.queries,
                      kQueryBlock);
    if (task + 1 < end) {
      const int64_t next = (task + 1) % n.blocks * kQueryBlock;
      prefetch<T>(a.query, next, least(kQueryBlock, a.queries - next), (task + 1) / n.blocks, a.heads, a.width);
    }
    const Visible visible(a, batch, query, count);
    float maximum[kQueryBlock], sum[kQueryBlock] = {}, factor[kQueryBlock];
    for (float& m : maximum) m = -kInfinity;
    for (int64_t key = visible.begin; key < visible.end; key += kKeyBlock) {
      const int64_t stop = least(key + kKeyBlock, visible.end);
      score<U>(scratch.keys, n.units, key, stop, scratch.queries, columns, scratch.scores);
      hide(visible, key, stop, columns, scratch.scores);
      for (int64_t i = 0; i < columns; i += WIDTH) {
        vfloat m = vector_at<vfloat>(maximum + i), s = vector_at<vfloat>(sum + i);
        put(factor + i, exponentials<U>(scratch.scores + i, stop - key, slope, m, s, scratch.probabilities + i));
        put(maximum + i, m);
        put(sum + i, s);
      }
      const bool add = key > visible.begin;
      if (add)
        for (int64_t i = 0; i < count; i++)
          for (int64_t j = 0; j < n.down; j += WIDTH) {
            float* at = scratch.context + i * n.down + j;
            put(at, vector_at<vfloat>(at) * factor[i]);
          }
      product<U, 1>(count, a.width, blocks_of(stop - key, U::values), scratch.probabilities, kQueryBlock,
                    scratch.values + key / U::values * n.down, n.down, scratch.context, n.down, add);
    }
    for (int64_t i = 0; i < count; i++) {
      write_row<T>(scratch.context + i * n.down, 1.0f / sum[i], a.width, row_of<T>(a.context, query + i, batch, head));
      a.logsumexp[(batch * a.heads + head) * a.queries + query + i] = maximum[i] * a.scale + __builtin_logf(sum[i]);
    }
  }
}

// ---- backward ----

template <class U>
struct BackwardScratch {
  typedef typename U::unit unit;
  // of a head of keys
  unit *keys_across, *keys_down, *values_across;
  float *key_sums, *value_sums;
  // of a head of queries
  unit *queries_across, *queries_down, *gradients_across, *gradients_down;
  float *query_sums, *logsumexp, *delta;
  // of a block: probabilities and their gradient, the latter in both forms
  float *scores, *slopes;
  unit *probabilities, *gradients, *gradients_by_pair;
  Arena arena;
  BackwardScratch(const Attention& a, const Sizes& n, void* memory) : arena{static_cast<char*>(memory)} {
    const int64_t keys_down_size = blocks_of(a.keys, U::values) * n.down, queries = n.blocks * kQueryBlock;
    keys_across = arena.take<unit>(n.panels * n.units);
    values_across = arena.take<unit>(n.panels * n.units);
    keys_down = arena.take<unit>(keys_down_size);
    key_sums = arena.take<float>(a.keys * n.down);
    value_sums = arena.take<float>(a.keys * n.down);
    queries_across = arena.take<unit>(queries * n.units);
    gradients_across = arena.take<unit>(queries * n.units);
    queries_down = arena.take<unit>(queries / U::values * n.down);
    gradients_down = arena.take<unit>(queries / U::values * n.down);
    query_sums = arena.take<float>(a.queries * n.down);
    logsumexp = arena.take<float>(queries);
    delta = arena.take<float>(queries);
    scores = arena.take<float>((kKeyBlock + 1) * kQueryBlock);
    slopes = arena.take<float>((kKeyBlock + 1) * kQueryBlock);
    const bool one = U::values == 1;  // then all forms are the floats themselves
    const int64_t size = kKeyBlock / U::values * kQueryBlock;
    probabilities = one ? (unit*)scores : arena.take<unit>(size);
    gradients = one ? (unit*)slopes : arena.take<unit>(size);
    gradients_by_pair = one ? (unit*)slopes : arena.take<unit>(size);
  }
};

// The same two rows, each with its queries as neighbours: left factor of products that sum over queries.
template <class U>
inline void put_rows(typename U::unit* out, int64_t key, vfloat first, vfloat second) {
  if constexpr (U::values == 1) {
    put_pair<U>(out, key, first, second);
  } else {
#if defined(__AVX512BF16__)
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    _mm256_storeu_si256((__m256i*)(out + key * (kQueryBlock / 2)), _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i*)(out + (key + 1) * (kQueryBlock / 2)), _mm512_extracti64x4_epi64(both, 1));
#endif
  }
}

// Scores and their incoming gradients of a block, keys by queries -> probabilities and the gradient of the scores.
template <class U>
void score_gradients(const BackwardScratch<U>& s, int64_t keys, int64_t query, int64_t columns, float slope) {
  for (int64_t i = 0; i < columns; i += WIDTH) {
    const vfloat shift = vector_at<vfloat>(s.logsumexp + query + i), delta = vector_at<vfloat>(s.delta + query + i);
    for (int64_t k = 0; k < keys; k += 2) {
      vfloat p[2] = {}, g[2] = {};
      for (int j = 0; j < 2; j++)
        if (k + j < keys) {
          p[j] = exp2(vector_at<vfloat>(s.scores + (k + j) * kQueryBlock + i) * slope - shift);
          g[j] = p[j] * (vector_at<vfloat>(s.slopes + (k + j) * kQueryBlock + i) - delta);
        }
      put_rows<U>(s.probabilities + i / U::values, k, p[0], p[1]);
      put_rows<U>(s.gradients + i / U::values, k, g[0], g[1]);
      if constexpr (U::values > 1) put_pair<U>(s.gradients_by_pair + i, k, g[0], g[1]);
    }
  }
}

// Packs a head's queries and gradients; logsumexp to base 2; delta, the sum of gradient x context of each query.
template <class T, class U>
void pack_queries(const Attention& a, const Sizes& n, const BackwardScratch<U>& s, int64_t batch, int64_t head) {
  const auto *query = row_of<T>(a.query, 0, batch, head), *gradient = row_of<T>(a.context_gradient, 0, batch, head);
  for (int64_t i = 0; i < a.queries; i += kQueryBlock) {
    const int64_t count = least(kQueryBlock, a.queries - i);
    pack_across<T, U>(query + i * a.query.token, a.query.token, count, a.width, s.queries_across + i * n.units,
                      kQueryBlock);
    pack_across<T, U>(gradient + i * a.context_gradient.token, a.context_gradient.token, count, a.width,
                      s.gradients_across + i * n.units, kQueryBlock);
  }
  pack_down<T, U>(query, a.query.token, a.queries, a.width, s.queries_down, n.down);
  pack_down<T, U>(gradient, a.context_gradient.token, a.queries, a.width, s.gradients_down, n.down);
  const float* logsumexp = a.logsumexp + (batch * a.heads + head) * a.queries;
  for (int64_t i = 0; i < n.blocks * kQueryBlock; i++) {
    const bool real = i < a.queries;
    s.logsumexp[i] = real ? logsumexp[i] * kLog2e : 0.0f;
    vfloat sum{};
    for (int64_t j = 0; real && j < a.width; j += WIDTH) {
      const int64_t left = a.width - j;
      const auto *g = gradient + i * a.context_gradient.token + j, *c = row_of<T>(a.context, i, batch, head) + j;
      sum += left >= WIDTH ? load<T>(g) * load<T>(c) : load_first<T>(g, left, 0.0f) * load_first<T>(c, left, 0.0f);
    }
    s.delta[i] = sum_of(sum);
  }
}

template <class T, class U>
void backward_of(const Attention& a, void* memory, int64_t begin, int64_t end) {
  const Sizes n = Sizes::of<U>(a);
  const BackwardScratch<U> s(a, n, memory);
  const int64_t group = a.heads / a.key_heads;
  constexpr int64_t row = kQueryBlock / U::values;  // of probabilities and gradients
  for (int64_t task = begin; task < end; task++) {
    const int64_t batch = task / a.key_heads, key_head = task % a.key_heads;
    pack_panels<T, U>(a, a.key, batch, key_head, s.keys_across);
    pack_panels<T, U>(a, a.value, batch, key_head, s.values_across);
    pack_down<T, U>(row_of<T>(a.key, 0, batch, key_head), a.key.token, a.keys, a.width, s.keys_down, n.down);
    if (task + 1 < end) {
      prefetch<T>(a.key, 0, a.keys, task + 1, a.key_heads, a.width);
      prefetch<T>(a.value, 0, a.keys, task + 1, a.key_heads, a.width);
    }
    __builtin_memset(s.key_sums, 0, a.keys * n.down * sizeof(float));
    __builtin_memset(s.value_sums, 0, a.keys * n.down * sizeof(float));
    for (int64_t head = key_head * group; head < (key_head + 1) * group; head++) {
      pack_queries<T, U>(a, n, s, batch, head);
      const int64_t next = batch * a.heads + head + 1;
      if (next < end * group) {
        prefetch<T>(a.query, 0, a.queries, next, a.heads, a.width);
        prefetch<T>(a.context_gradient, 0, a.queries, next, a.heads, a.width);
        prefetch<T>(a.context, 0, a.queries, next, a.heads, a.width);
      }
      __builtin_memset(s.query_sums, 0, a.queries * n.down * sizeof(float));
      for (int64_t block = 0; block < a.keys; block += kKeyBlock)
        for (int64_t query = 0; query < a.queries; query += kQueryBlock) {
          const int64_t count = least(kQueryBlock, a.queries - query), columns = blocks_of(count, WIDTH) * WIDTH;
          const Visible visible(a, batch, query, count);
          const int64_t key = most(block, visible.begin), stop = least(least(block + kKeyBlock, a.keys), visible.end);
          if (key >= stop) continue;
          score<U>(s.keys_across, n.units, key, stop, s.queries_across + query * n.units, columns, s.scores);
          score<U>(s.values_across, n.units, key, stop, s.gradients_across + query * n.units, columns, s.slopes);
          hide(visible, key, stop, columns, s.scores);
          score_gradients<U>(s, stop - key, query, columns, a.scale * kLog2e);
          const int64_t depth = blocks_of(count, U::values);
          product<U, row>(stop - key, a.width, depth, s.probabilities, 1, s.gradients_down + query / U::values * n.down,
                          n.down, s.value_sums + key * n.down, n.down, true);
          product<U, row>(stop - key, a.width, depth, s.gradients, 1, s.queries_down + query / U::values * n.down,
                          n.down, s.key_sums + key * n.down, n.down, true);
          product<U, 1>(count, a.width, blocks_of(stop - key, U::values), s.gradients_by_pair, kQueryBlock,
                        s.keys_down + key / U::values * n.down, n.down, s.query_sums + query * n.down, n.down, true);
        }
      for (int64_t i = 0; i < a.queries; i++)
        write_row<T>(s.query_sums + i * n.down, a.scale, a.width, row_of<T>(a.query_gradient, i, batch, head));
    }
    for (int64_t i = 0; i < a.keys; i++) {
      write_row<T>(s.key_sums + i * n.down, a.scale, a.width, row_of<T>(a.key_gradient, i, batch, key_head));
      write_row<T>(s.value_sums + i * n.down, 1.0f, a.width, row_of<T>(a.value_gradient, i, batch, key_head));
    }
  }
}

// ---- the table's entries ----

#if defined(__AVX512BF16__)
typedef Pair BFloat16Unit;
#else
typedef Single BFloat16Unit;
#endif

template <class U>
int64_t scratch_of(const Attention& a, bool backward) {
  const Sizes n = Sizes::of<U>(a);
  return backward ? BackwardScratch<U>(a, n, nullptr).arena.used : ForwardScratch<U>(a, n, nullptr).arena.used;
}

int64_t attention_scratch(const Attention& a, bool backward) {
  return a.dtype == Dtype::bfloat16 ? scratch_of<BFloat16Unit>(a, backward) : scratch_of<Single>(a, backward);
}

void attention_forward(const Attention& a, void* scratch, int64_t begin, int64_t end) {
  if (a.dtype == Dtype::bfloat16) return forward_of<BFloat16, BFloat16Unit>(a, scratch, begin, end);
  forward_of<Float32, Single>(a, scratch, begin, end);
}

void attention_backward(const Attention& a, void* scratch, int64_t begin, int64_t end) {
  if (a.dtype == Dtype::bfloat16) return backward_of<BFloat16, BFloat16Unit>(a, scratch, begin, end);
  backward_of<Float32, Single>(a, scratch, begin, end);
}

}  // namespace
}  // namespace megamug
