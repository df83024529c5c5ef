// Attention of short sequences, forward and backward: a block has one head of one sequence whole in shared memory.
//
// Sums are float32. Written on `warp.cuh` alone (or what emulates it), which is to be included first.
#pragma once

#include "attention_tiles.cuh"

namespace megamug {

// ---- forward: a warp has one tile of queries at a time, and the scores of four tiles of keys in registers ----

constexpr int kKeyTiles = 4;
constexpr int kForwardWarps = 8;
// Blocks of so many warps that are to fit on a multiprocessor, which sets the number of registers.
__host__ __device__ constexpr int forward_blocks(int width) { return width <= 32 ? 3 : width <= 80 ? 2 : 1; }

template <class T, int width>
__global__ void __launch_bounds__(kForwardWarps * 32, forward_blocks(width))
    attention_forward_kernel(const __grid_constant__ AttentionForward<T> p) {
  extern __shared__ uint4 attention_shared[];
  constexpr int stride = token_stride(3, width), steps = width / kTile;
  const int batch = blockIdx.x / p.heads, head = blockIdx.x % p.heads;
  const int warp = uniform(threadIdx.x / 32), warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const int query_tiles = tiles_of(p.queries), key_tiles = tiles_of(p.keys);
  T* rows = reinterpret_cast<T*>(attention_shared);
  stage<T, width, stride>(p.query.at(batch, head), p.query.token, p.queries, query_tiles * kTile, rows);
  stage<T, width, stride>(p.key.at(batch, head), p.key.token, p.keys, key_tiles * kTile, rows + width);
  stage<T, width, stride>(p.value.at(batch, head), p.value.token, p.keys, key_tiles * kTile, rows + 2 * width);
  wait_for_copies();
  __syncthreads();

  const Address keys = shared_address(rows + width + along_first(lane, stride));
  const Address values = shared_address(rows + 2 * width + down_first(lane, stride));
  const float factor = p.scale * kLog2e;
  for (int tile = warp; tile < query_tiles; tile += warps) {
    T* mine = rows + tile * kTile * stride;  // queries that no other warp reads: the context takes their place
    Word query[steps][4];
#pragma unroll
    for (int k = 0; k < steps; k++)
      load_matrices(query[k], shared_address(mine + k * kTile + down_first(lane, stride)));
    float context[width / 8][4] = {};
    float highest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    int visible[2];  // keys that the two queries of this lane see
#pragma unroll
    for (int r = 0; r < 2; r++)
      visible[r] = p.causal ? smaller(p.keys, tile * kTile + lane / 4 + r * 8 + 1) : p.keys;
    const int end = p.causal ? smaller(key_tiles, tile + 1) : key_tiles;
    for (int first = 0; first < end; first += kKeyTiles) {
      float scores[2 * kKeyTiles][4] = {};
#pragma unroll
      for (int j = 0; j < kKeyTiles; j++) {
        if (first + j >= end) continue;
#pragma unroll
        for (int k = 0; k < steps; k++) {
          Word b[4];
          load_matrices(b, keys + ((first + j) * kTile * stride + k * kTile) * 2);
          multiply_add<T>(scores[2 * j], query[k], b[0], b[1]);
          multiply_add<T>(scores[2 * j + 1], query[k], b[2], b[3]);
        }
      }
      if (p.causal || (first + kKeyTiles) * kTile > p.keys) {
#pragma unroll
        for (int j = 0; j < 2 * kKeyTiles; j++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (first * kTile + j * 8 + lane % 4 * 2 + i % 2 >= visible[i / 2]) scores[j][i] = -INFINITY;
      }
      float base[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float high = highest[r];
#pragma unroll
        for (int j = 0; j < 2 * kKeyTiles; j++) high = fmaxf(high, fmaxf(scores[j][2 * r], scores[j][2 * r + 1]));
        high = fmaxf(high, shuffle_xor(high, 1));
        high = fmaxf(high, shuffle_xor(high, 2));
        base[r] = high * factor;
        if (first > 0) {
          const float shrink = exp2_approximate(highest[r] * factor - base[r]);
          sum[r] *= shrink;
#pragma unroll
          for (int i = 0; i < width / 8; i++) context[i][2 * r] *= shrink, context[i][2 * r + 1] *= shrink;
        }
        highest[r] = high;
      }
#pragma unroll
      for (int j = 0; j < kKeyTiles; j++) {
        if (first + j >= end) continue;
        float(&left)[4] = scores[2 * j], (&right)[4] = scores[2 * j + 1];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          left[i] = exp2_approximate(left[i] * factor - base[i / 2]);
          right[i] = exp2_approximate(right[i] * factor - base[i / 2]);
          sum[i / 2] += left[i] + right[i];
        }
        const Word a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
                           pack<T>(right[2], right[3])};
#pragma unroll
        for (int k = 0; k < steps; k++) {
          Word b[4];
          load_transposed(b, values + ((first + j) * kTile * stride + k * kTile) * 2);
          multiply_add<T>(context[2 * k], a, b[0], b[1]);
          multiply_add<T>(context[2 * k + 1], a, b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      sum[r] += shuffle_xor(sum[r], 1);
      sum[r] += shuffle_xor(sum[r], 2);
    }
    __syncwarp();
    put<T, width, stride>(context, 1.0f / sum[0], 1.0f / sum[1], mine, lane);
    __syncwarp();
    const int present = smaller(kTile, p.queries - tile * kTile);
    T* target = p.context.at(batch, head) + tile * kTile * p.context.token;
    copy_out<T, width, stride>(mine, present, target, p.context.token, lane, 32);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = lane / 4 + r * 8;
      if (lane % 4 == 0 && row < present)
        p.logsumexp[static_cast<int64_t>(blockIdx.x) * p.queries + tile * kTile + row] =
            highest[r] * p.scale + log2_approximate(sum[r]) * kLn2;
    }
  }
}

// ---- backward: a warp has `owned` tiles of keys, and their gradients in registers, and goes through the queries ----
//
// Scores and their gradients are computed transposed, [keys, queries], so that rounded they are the left factors of the
// products that give the gradients of keys and values. The scores' gradients of a block of queries also go to shared
// memory; then each warp takes tiles of these queries for their own gradient.

// Warps of a block at most. Nine with two tiles each would leave a register file's quarter three warps, so three.
__host__ __device__ constexpr int backward_warps(int owned) { return owned == 3 ? 6 : 8; }
// Warps that are to fit on a multiprocessor, which sets the number of registers: 16 with 128, 12 with 168, 8 with 255.
__host__ __device__ constexpr int resident_warps(int width, int owned) {
  return width * owned <= 64 ? 16 : width * owned <= 96 ? 12 : 8;
}
// Whether keys and values of a warp's own tiles stay in registers.
__host__ __device__ constexpr bool backward_holds(int width, int owned) { return width * owned <= 32; }

template <class T, int width, int owned>
__global__ void __launch_bounds__(resident_warps(width, owned) * 32)
    attention_backward_kernel(const __grid_constant__ AttentionBackward<T> p) {
  extern __shared__ uint4 attention_shared[];
  constexpr int stride = token_stride(4, width), steps = width / kTile;
  constexpr bool holds = backward_holds(width, owned);
  constexpr int part = owned > 2 ? width / 2 : width, parts = width / part;  // of a query's gradient, a warp's work
  const int batch = blockIdx.x / p.heads, head = blockIdx.x % p.heads;
  const int warp = uniform(threadIdx.x / 32), warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const int query_tiles = tiles_of(p.queries), key_tiles = tiles_of(p.keys), narrow = score_stride(p.block_tiles);
  T* rows = reinterpret_cast<T*>(attention_shared);
  T* scores_t = rows + larger(query_tiles, key_tiles) * kTile * stride;  // their gradients, [keys, queries of a block]
  float* logarithms = reinterpret_cast<float*>(scores_t + score_bytes(p.queries, p.keys, width, p.block_tiles) / 2);
  float* products = logarithms + query_tiles * kTile;
  stage<T, width, stride>(p.query.at(batch, head), p.query.token, p.queries, query_tiles * kTile, rows);
  stage<T, width, stride>(p.key.at(batch, head), p.key.token, p.keys, key_tiles * kTile, rows + width);
  stage<T, width, stride>(p.value.at(batch, head), p.value.token, p.keys, key_tiles * kTile, rows + 2 * width);
  for (int i = threadIdx.x; i < query_tiles * kTile; i += blockDim.x)  // for a query that is none exp(-inf) = 0
    logarithms[i] =
        i < p.queries ? p.logsumexp[static_cast<int64_t>(blockIdx.x) * p.queries + i] * kLog2e : INFINITY;
  stage<T, width, stride>(p.gradient.at(batch, head), p.gradient.token, p.queries, query_tiles * kTile,
                          rows + 3 * width);
  stage<T, width, context_stride(width)>(p.context.at(batch, head), p.context.token, p.queries, query_tiles * kTile,
                                         scores_t);  // which are not there yet
  wait_for_copies();
  __syncthreads();
  multiply_rows<T, width, stride>(rows + 3 * width, scores_t, query_tiles * kTile, products);
  __syncthreads();

  const float factor = p.scale * kLog2e;
  const Address query_columns = shared_address(rows + along_first(lane, stride));
  const Address query_rows = shared_address(rows + down_first(lane, stride));
  const Address score_columns = shared_address(scores_t + along_first(lane, narrow));
  constexpr int to_key = width * 2, to_value = width * 4, to_gradient = width * 6;  // bytes behind a query
  // The last warp may have less to do: it repeats a tile, and nobody sees the result.
  const auto own = [&](int o) { return smaller(warp * owned + o, key_tiles - 1); };
  const int existing = p.keys - lane / 4;
  float key_gradient[owned][width / 8][4] = {}, value_gradient[owned][width / 8][4] = {};
  Word key[owned][holds ? steps : 1][4], value[owned][holds ? steps : 1][4];
  if constexpr (holds) {
#pragma unroll
    for (int o = 0; o < owned; o++)
#pragma unroll
      for (int k = 0; k < steps; k++) {
        const Address here = query_rows + (own(o) * kTile * stride + k * kTile) * 2;
        load_matrices(key[o][k], here + to_key);
        load_matrices(value[o][k], here + to_value);
      }
  }

  for (int block = 0; block < query_tiles; block += p.block_tiles) {
    const int count = smaller(p.block_tiles, query_tiles - block);
#pragma unroll 1
    for (int i = 0; i < count; i++) {
      const int tile = block + i;
      if (p.causal && tile < own(0)) continue;
      float scores[owned][2][4] = {}, slopes[owned][2][4] = {};
#pragma unroll
      for (int k = 0; k < steps; k++) {
        Word b[4];
        load_matrices(b, query_columns + (tile * kTile * stride + k * kTile) * 2);
#pragma unroll
        for (int o = 0; o < owned; o++) {
          Word(&a)[4] = key[o][holds ? k : 0];
          if constexpr (!holds)
            load_matrices(a, query_rows + (own(o) * kTile * stride + k * kTile) * 2 + to_key);
          multiply_add<T>(scores[o][0], a, b[0], b[1]);
          multiply_add<T>(scores[o][1], a, b[2], b[3]);
        }
      }
#pragma unroll
      for (int k = 0; k < steps; k++) {
        Word b[4];
        load_matrices(b, query_columns + (tile * kTile * stride + k * kTile) * 2 + to_gradient);
#pragma unroll
        for (int o = 0; o < owned; o++) {
          Word(&a)[4] = value[o][holds ? k : 0];
          if constexpr (!holds)
            load_matrices(a, query_rows + (own(o) * kTile * stride + k * kTile) * 2 + to_value);
          multiply_add<T>(slopes[o][0], a, b[0], b[1]);
          multiply_add<T>(slopes[o][1], a, b[2], b[3]);
        }
      }
      float2 product[2];  // of two neighbouring queries
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int query = tile * kTile + j * 8 + lane % 4 * 2;
        const float2 logarithm = *reinterpret_cast<const float2*>(logarithms + query);
        product[j] = *reinterpret_cast<const float2*>(products + query);
#pragma unroll
        for (int o = 0; o < owned; o++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            scores[o][j][i] = exp2_approximate(scores[o][j][i] * factor - (i % 2 ? logarithm.y : logarithm.x));
      }
      if (p.causal && tile <= own(owned - 1)) {
#pragma unroll
        for (int o = 0; o < owned; o++)
#pragma unroll
          for (int j = 0; j < 2; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
              if ((own(o) - tile) * kTile + lane / 4 + i / 2 * 8 > j * 8 + lane % 4 * 2 + i % 2) scores[o][j][i] = 0;
      }
      Word probability[owned][4], slope[owned][4];
#pragma unroll
      for (int o = 0; o < owned; o++)
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
          for (int r = 0; r < 2; r++) {
            const float x = scores[o][j][2 * r], y = scores[o][j][2 * r + 1];
            const float dx = slopes[o][j][2 * r] - product[j].x, dy = slopes[o][j][2 * r + 1] - product[j].y;
            const Word both = pack<T>(x * dx, y * dy);
            probability[o][2 * j + r] = pack<T>(x, y);
            slope[o][2 * j + r] = own(o) * kTile + r * 8 < existing ? both : 0;  // exp(-logsumexp) may be infinite
          }
#pragma unroll
      for (int o = 0; o < owned; o++) {
        if (warp * owned + o >= key_tiles) continue;
        T* mine = scores_t + (own(o) * kTile + lane / 4) * narrow + i * kTile + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
          for (int r = 0; r < 2; r++) *reinterpret_cast<Word*>(mine + r * 8 * narrow + j * 8) = slope[o][2 * j + r];
      }
#pragma unroll
      for (int k = 0; k < steps; k++) {
        Word b[4];
        load_transposed(b, query_rows + (tile * kTile * stride + k * kTile) * 2 + to_gradient);
#pragma unroll
        for (int o = 0; o < owned; o++) {
          multiply_add<T>(value_gradient[o][2 * k], probability[o], b[0], b[1]);
          multiply_add<T>(value_gradient[o][2 * k + 1], probability[o], b[2], b[3]);
        }
        load_transposed(b, query_rows + (tile * kTile * stride + k * kTile) * 2);
#pragma unroll
        for (int o = 0; o < owned; o++) {
          multiply_add<T>(key_gradient[o][2 * k], slope[o], b[0], b[1]);
          multiply_add<T>(key_gradient[o][2 * k + 1], slope[o], b[2], b[3]);
        }
      }
    }
    __syncthreads();
    for (int unit = warp; unit < count * parts; unit += warps) {
      const int i = unit / parts, column = unit % parts * part;
      float sums[part / 8][4] = {};
      const int end = p.causal ? smaller(key_tiles, block + i + 1) : key_tiles;
#pragma unroll 1
      for (int tile = 0; tile < end; tile++) {
        Word a[4];
        load_transposed(a, score_columns + (tile * kTile * narrow + i * kTile) * 2);
#pragma unroll
        for (int k = 0; k < part / kTile; k++) {
          Word b[4];
          load_transposed(b, query_rows + (tile * kTile * stride + column + k * kTile) * 2 + to_key);
          multiply_add<T>(sums[2 * k], a, b[0], b[1]);
          multiply_add<T>(sums[2 * k + 1], a, b[2], b[3]);
        }
      }
      // over the queries, which nobody needs any more
      put<T, part, stride>(sums, p.scale, p.scale, rows + (block + i) * kTile * stride + column, lane);
    }
    __syncthreads();
  }

#pragma unroll
  for (int o = 0; o < owned; o++) {
    if (warp * owned + o >= key_tiles) continue;
    put<T, width, stride>(key_gradient[o], p.scale, p.scale, rows + own(o) * kTile * stride + width, lane);
    put<T, width, stride>(value_gradient[o], 1.0f, 1.0f, rows + own(o) * kTile * stride + 2 * width, lane);
  }
  __syncthreads();
  const int thread = threadIdx.x, threads = blockDim.x;
  const auto put_out = [&](const T* source, int present, const Heads<T>& target) {
    copy_out<T, width, stride>(source, present, target.at(batch, head), target.token, thread, threads);
  };
  put_out(rows, p.queries, p.query_gradient);
  put_out(rows + width, p.keys, p.key_gradient);
  put_out(rows + 2 * width, p.keys, p.value_gradient);
}

}  // namespace megamug
