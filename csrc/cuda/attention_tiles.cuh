// What the attention of short sequences (attention.cuh) is given, and how its tiles lie in shared memory.
//
// Tiles are 16 tokens. In shared memory a token's query, key and value (and the gradient of its context) stand side by
// side; from a token to the next are an odd number of 16-byte units, so no two rows of an 8 x 8 matrix share a bank.
#pragma once

namespace megamug {

constexpr int kTile = 16;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;

// One matrix [tokens, width] per head and sequence; strides in numbers.
template <class T>
struct Heads {
  T* start;
  int64_t token, batch, head;
  __device__ T* at(int b, int h) const { return start + b * batch + h * head; }
};

template <class T>
struct AttentionForward {
  using Number = T;
  Heads<const T> query, key, value;
  Heads<T> context;
  float* logsumexp;  // [batch, heads, queries]
  int queries, keys, heads;
  float scale;
  bool causal;
};

template <class T>
struct AttentionBackward {
  using Number = T;
  Heads<const T> query, key, value, context, gradient;
  Heads<T> query_gradient, key_gradient, value_gradient;
  const float* logsumexp;
  int queries, keys, heads;
  float scale;
  bool causal;
  int block_tiles;  // tiles of queries whose score gradients are in shared memory at once
};

__host__ __device__ constexpr int tiles_of(int tokens) { return (tokens + kTile - 1) / kTile; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }

// Numbers from a row to the next in shared memory, of `parts` rows of heads side by side and of scores' gradients.
__host__ __device__ constexpr int token_stride(int parts, int width) { return parts * width + 8; }
__host__ __device__ constexpr int context_stride(int width) { return width + 8; }
__host__ __device__ constexpr int score_stride(int block_tiles) { return block_tiles * kTile + 8; }

__host__ __device__ constexpr int forward_bytes(int queries, int keys, int width) {
  return 2 * larger(tiles_of(queries), tiles_of(keys)) * kTile * token_stride(3, width);
}
// The gradients of scores, where the context has been before.
__host__ __device__ constexpr int score_bytes(int queries, int keys, int width, int block_tiles) {
  return 2 * kTile * larger(tiles_of(keys) * score_stride(block_tiles), tiles_of(queries) * context_stride(width));
}
__host__ __device__ constexpr int backward_bytes(int queries, int keys, int width, int block_tiles) {
  return 2 * larger(tiles_of(queries), tiles_of(keys)) * kTile * token_stride(4, width) +
         score_bytes(queries, keys, width, block_tiles) + 2 * 4 * tiles_of(queries) * kTile;
}

// Where a lane's address lies in a 16 x 16 matrix, in numbers, for the four 8 x 8 matrices in either order: down the
// rows first (an `a`; or a `b` stored by rows, transposed) or along them (a `b` stored by columns; an `a`, transposed).
__device__ inline int down_first(int lane, int stride) { return lane % 16 * stride + lane / 16 * 8; }
__device__ inline int along_first(int lane, int stride) {
  return (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8;
}

// Rows of one head on their way to shared memory; those up to `padded` that do not exist become zeros.
template <class T, int width, int stride>
__device__ void stage(const T* source, int64_t token, int rows, int padded, T* target) {
  constexpr int vectors = width / 8;
  for (int i = threadIdx.x; i < padded * vectors; i += blockDim.x) {
    const int row = i / vectors, column = i % vectors * 8;
    copy_async(target + row * stride + column, source + (row < rows ? row : 0) * token + column, row < rows);
  }
}

template <class T>
__device__ inline float dot(const uint4& a, const uint4& b) {
  const Word x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 u = unpack<T>(x[i]), v = unpack<T>(y[i]);
    sum += u.x * v.x;
    sum += u.y * v.y;
  }
  return sum;
}

// Of each row the product of the gradient of the context with the context: the mean of the scores' gradients under the
// probabilities.
template <class T, int width, int stride>
__device__ void multiply_rows(const T* gradient, const T* context, int rows, float* products) {
  constexpr int vectors = width / 8, lanes = vectors % 4 == 0 ? 4 : 2;
  const int part = threadIdx.x % lanes;
  for (int row = threadIdx.x / lanes; row < rows; row += blockDim.x / lanes) {  // tiles: all lanes of a warp, or none
    float sum = 0;
#pragma unroll
    for (int i = part; i < vectors; i += lanes)
      sum += dot<T>(*reinterpret_cast<const uint4*>(gradient + row * stride + i * 8),
                    *reinterpret_cast<const uint4*>(context + row * context_stride(width) + i * 8));
#pragma unroll
    for (int offset = lanes / 2; offset; offset /= 2) sum += shuffle_xor(sum, offset);
    if (part == 0) products[row] = sum;
  }
}

// A product's [16, width] times `factor`, rounded, to the rows at `target`.
template <class T, int width, int stride>
__device__ inline void put(const float (&sums)[width / 8][4], float upper, float lower, T* target, int lane) {
  T* mine = target + lane / 4 * stride + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < width / 8; i++) {
    *reinterpret_cast<Word*>(mine + i * 8) = pack<T>(sums[i][0] * upper, sums[i][1] * upper);
    *reinterpret_cast<Word*>(mine + 8 * stride + i * 8) = pack<T>(sums[i][2] * lower, sums[i][3] * lower);
  }
}

// Rows of one head out of shared memory, by `threads` threads.
template <class T, int width, int stride>
__device__ inline void copy_out(const T* source, int rows, T* target, int64_t token, int thread, int threads) {
  constexpr int vectors = width / 8;
  for (int i = thread; i < rows * vectors; i += threads) {
    const int row = i / vectors, column = i % vectors * 8;
    *reinterpret_cast<uint4*>(target + row * token + column) =
        *reinterpret_cast<const uint4*>(source + row * stride + column);
  }
}

}  // namespace megamug
