// Cross-entropy over a slice of the vocabulary: a block reads a row for its statistics, or makes a part of its gradient. The formulas are in megamug/losses/cross_entropy.py.
#include "common.cuh"

namespace megamug {
namespace {

constexpr int kUnroll = 4;  // vectors that a thread asks for at once; the next ones are on their way while it computes
constexpr int kRounds = 4;  // of so many vectors, to a block of gradient_kernel
constexpr int kThreads = 256, kMostThreads = 512;
constexpr float kLog2e = 1.44269504088896341f;

// Where a row's 16-byte vectors begin and end. Elements before and after go one by one.
struct Span {
  int64_t begin, end;
};
template <class T>
__device__ inline Span aligned_span(const T* row, int64_t columns) {
  const int64_t misplaced = reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T);
  const int64_t head = misplaced ? Vector<T>::size - misplaced : 0;
  const int64_t begin = head < columns ? head : columns;
  return {begin, begin + (columns - begin) / Vector<T>::size * Vector<T>::size};
}

// f(vectors) for the rounds of kUnroll vectors a thread at `p`, each `stride` elements after the one before. While one is
// worked on, the next is loaded: the two sets of registers take turns.
template <class T, class F>
__device__ inline void each_round(const T* p, int rounds, int64_t step, F&& f) {
  Vector<T> a[kUnroll], b[kUnroll];
  const auto load = [&](Vector<T> (&v)[kUnroll]) {
#pragma unroll
    for (int k = 0; k < kUnroll; k++) v[k] = load_vector(p + k * step);
    p += kUnroll * step;
  };
  if (rounds > 0) load(a);
  for (int i = 0; i < rounds; i += 2) {
    if (i + 1 < rounds) load(b);
    f(a, i);
    if (i + 1 >= rounds) break;
    if (i + 2 < rounds) load(a);
    f(b, i + 1);
  }
}

// A running maximum and the sum of exponentials against it (Milakov and Gimelshein, arXiv 1805.02867). An exponential is
// 2^(x log2(e) - reference), one multiplication and addition; `reference` is maximum x log2(e), rounded. What that rounding
// does to the sum is taken back by `against_maximum`, so large logits cost no accuracy.
struct Running {
  float maximum = -INFINITY, sum = 0;

  // By an intrinsic, so that the compiler does not leave out the rounding where it is subtracted from something.
  static __device__ float reference(float maximum) { return __fmul_rn(maximum, kLog2e); }
  // While all is -inf a shift of 0 gives the right sum: 0, or NaN where there is one.
  __device__ float shift() const { return maximum == -INFINITY ? 0.0f : reference(maximum); }
  __device__ void rescale(float highest) {
    if (highest > maximum) {
      sum *= exp2_fast(reference(maximum) - reference(highest));
      maximum = highest;
    }
  }
  __device__ void add(float x) {
    rescale(x);
    sum += exp2_fast(fmaf(x, kLog2e, -shift()));
  }
  __device__ void join_warp() {
    rescale(warp_maximum(maximum));
    sum = warp_sum(sum);
  }
  __device__ float against_maximum() const {
    return maximum == -INFINITY ? sum : sum * exp2_fast(-fmaf(maximum, kLog2e, -reference(maximum)));
  }
};

// A row whose target is ignore_index takes part in nothing: it is not read, and its statistics are those of one logit of 0.
template <class T, bool with_sum>
__global__ void __launch_bounds__(kMostThreads, 2)
    statistics_kernel(const T* logits, int64_t stride, const int64_t* targets, int64_t first, int64_t valid,
                      int64_t ignore_index, int64_t rows, float* out) {
  constexpr int size = Vector<T>::size;
  __shared__ Running shared_running[kWarp];
  __shared__ float shared_sum[kWarp];
  const int64_t r = blockIdx.x, t = targets[r];
  if (t == ignore_index) {
    if (threadIdx.x < 4) out[threadIdx.x * rows + r] = threadIdx.x == 1 ? 1.0f : 0.0f;
    return;
  }
  const T* row = logits + r * stride;
  const bool owned = t >= first && t < first + valid;
  const float target_logit = owned && threadIdx.x == 0 ? to_float(row[t - first]) : 0.0f;
  const Span span = aligned_span(row, valid);
  const int64_t step = static_cast<int64_t>(blockDim.x) * size;
  const int rounds = static_cast<int>((span.end - span.begin) / (step * kUnroll));
  int64_t j = span.begin + threadIdx.x * size;
  Running running;
  float total = 0;
  each_round(row + j, rounds, step, [&](const Vector<T> (&v)[kUnroll], int) {
    running.rescale(largest(v));
    const float shift = running.shift();
    float sums[kUnroll], logit_sums[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; k++) {
      float x[size];
      unpack(v[k], x);
      sums[k] = logit_sums[k] = 0;
#pragma unroll
      for (int i = 0; i < size; i++) {
        sums[k] += exp2_fast(fmaf(x[i], kLog2e, -shift));
        if constexpr (with_sum) logit_sums[k] += x[i];
      }
    }
#pragma unroll
    for (int k = 0; k < kUnroll; k++) {
      running.sum += sums[k];
      if constexpr (with_sum) total += logit_sums[k];
    }
  });
  j += rounds * kUnroll * step;
  Vector<T> rest[kUnroll][1];  // less than a round
#pragma unroll
  for (int k = 0; k < kUnroll; k++)
    if (j + k * step < span.end) rest[k][0] = load_vector(row + j + k * step);
#pragma unroll
  for (int k = 0; k < kUnroll; k++) {
    if (j + k * step >= span.end) break;
    running.rescale(largest(rest[k]));
    const float shift = running.shift();
    float x[size];
    unpack(rest[k][0], x);
#pragma unroll
    for (int i = 0; i < size; i++) {
      running.sum += exp2_fast(fmaf(x[i], kLog2e, -shift));
      if constexpr (with_sum) total += x[i];
    }
  }
  const auto single = [&](int64_t c) {
    const float x = to_float(row[c]);
    running.add(x);
    if constexpr (with_sum) total += x;
  };
  for (int64_t c = threadIdx.x; c < span.begin; c += blockDim.x) single(c);
  for (int64_t c = span.end + threadIdx.x; c < valid; c += blockDim.x) single(c);

  running.join_warp();
  if constexpr (with_sum) total = warp_sum(total);
  if (threadIdx.x % kWarp == 0) {
    shared_running[threadIdx.x / kWarp] = running;
    shared_sum[threadIdx.x / kWarp] = total;
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const bool filled = threadIdx.x < blockDim.x / kWarp;
  running = filled ? shared_running[threadIdx.x] : Running{};
  running.join_warp();
  total = warp_sum(filled ? shared_sum[threadIdx.x] : 0.0f);
  if (threadIdx.x == 0) {
    out[r] = running.maximum;
    out[rows + r] = running.against_maximum();
    out[2 * rows + r] = target_logit;
    out[3 * rows + r] = total;
  }
}

__global__ void join_kernel(const float* statistics, int64_t ranks, int64_t rows, const int64_t* targets,
                            const float* weights, int64_t vocab_size, int64_t ignore_index, float label_smoothing,
                            float z_loss, float* losses, float* normalisers) {
  const int64_t r = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (r >= rows) return;
  float highest = -INFINITY;
  for (int64_t k = 0; k < ranks; k++) highest = fmaxf(highest, statistics[k * 4 * rows + r]);
  float exponentials = 0, target_logit = 0, sum_of_logits = 0;
  for (int64_t k = 0; k < ranks; k++) {
    const float* mine = statistics + k * 4 * rows + r;
    exponentials += expf(mine[0] - highest) * mine[rows];
    target_logit += mine[2 * rows];
    sum_of_logits += mine[3 * rows];
  }
  const float logsumexp = highest + logf(exponentials);
  float loss = (1 - label_smoothing) * (logsumexp - target_logit);
  if (label_smoothing != 0) loss += label_smoothing * (logsumexp - sum_of_logits / vocab_size);
  if (z_loss != 0) loss += z_loss * logsumexp * logsumexp;
  const int64_t t = targets[r];
  const float factor = t == ignore_index ? 0.0f : weights ? weights[r] : 1.0f;
  const bool outside = t != ignore_index && (t < 0 || t >= vocab_size);
  losses[r] = outside ? NAN : factor == 0 ? 0.0f : loss * factor;
  normalisers[r] = highest;
  normalisers[rows + r] = exponentials;
}

struct GradientTerms {
  const int64_t* targets;
  const float *weights, *maximum, *sum_of_exp, *grad_per_token;
  int64_t first, valid, columns, vocab_size, ignore_index;
  float label_smoothing, z_loss;
};

// A block has `chunks`-th part of a row: kRounds rounds, or what is left of them in the last. The rows are taken from the
// last to the first: the last ones are those that the second-level cache still has of the pass for the statistics.
template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    gradient_kernel(const T* logits, int64_t stride, T* output, int64_t output_stride, int64_t rows, uint32_t chunks,
                    const __grid_constant__ GradientTerms g) {
  constexpr int size = Vector<T>::size;
  const int64_t r = rows - 1 - blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t step = static_cast<int64_t>(blockDim.x) * size, part = step * kUnroll * kRounds;
  const T* row = logits + r * stride;
  T* out = output + r * output_stride;
  const int64_t t = g.targets[r];
  const float factor = t == g.ignore_index ? 0.0f : g.weights ? g.weights[r] : 1.0f;
  const bool outside = t != g.ignore_index && (t < 0 || t >= g.vocab_size);
  const int64_t one = chunk * blockDim.x + threadIdx.x, ones = chunks * static_cast<int64_t>(blockDim.x);
  if (factor == 0 && !outside) {
    const Span span = aligned_span(out, g.columns);
    const int64_t end = min(span.end, span.begin + (chunk + 1) * part);
    for (int64_t j = span.begin + chunk * part + threadIdx.x * size; j < end; j += step)
      store_words(out + j, make_uint4(0, 0, 0, 0));
    for (int64_t c = one; c < span.begin; c += ones) out[c] = from_float<T>(0.0f);
    for (int64_t c = span.end + one; c < g.columns; c += ones) out[c] = from_float<T>(0.0f);
    return;
  }
  const float maximum = g.maximum[r], sum_of_exp = g.sum_of_exp[r];
  const float coefficient = outside ? NAN : factor * g.grad_per_token[r];
  // exp(x - max) / sum, not exp(x - lse): the rounding of a large lse would be in every probability. See Running.
  const Running row_of{maximum, 1.0f};
  const float shift = row_of.shift();
  float scale = coefficient / sum_of_exp * row_of.against_maximum();
  if (g.z_loss != 0) scale *= 1.0f + 2.0f * g.z_loss * (maximum + logf(sum_of_exp));
  const float offset = coefficient * (g.label_smoothing / g.vocab_size);
  const float kept = coefficient * (1.0f - g.label_smoothing);
  const int64_t column = t >= g.first && t < g.first + g.valid ? t - g.first : -1;
  const auto value = [&](float x) { return exp2_fast(fmaf(x, kLog2e, -shift)) * scale - offset; };
  const auto write = [&](int64_t j, const Vector<T>& v) {
    float x[size];
    unpack(v, x);
#pragma unroll
    for (float& y : x) y = value(y);
    store_vector(out + j, pack<T>(x));
  };

  Span span = aligned_span(row, g.valid);
  if (reinterpret_cast<uintptr_t>(row) % 16 != reinterpret_cast<uintptr_t>(out) % 16) span = {g.valid, g.valid};
  const int64_t begin = min(span.end, span.begin + chunk * part), end = min(span.end, begin + part);
  // The target's entry is made on its own, from the unrounded probability, by the thread that writes the vector around it.
  const bool mine = column >= begin && column < end && (column - begin) / size % blockDim.x == threadIdx.x;
  const float target_logit = mine ? to_float(row[column]) : 0.0f;
  const int rounds = static_cast<int>((end - begin) / (step * kUnroll));
  int64_t j = begin + threadIdx.x * size;
  each_round(row + j, rounds, step, [&](const Vector<T> (&v)[kUnroll], int i) {
#pragma unroll
    for (int k = 0; k < kUnroll; k++) write(j + (i * kUnroll + k) * step, v[k]);
  });
  j += rounds * kUnroll * step;
  Vector<T> rest[kUnroll];  // less than a round
#pragma unroll
  for (int k = 0; k < kUnroll; k++)
    if (j + k * step < end) rest[k] = load_vector(row + j + k * step);
#pragma unroll
  for (int k = 0; k < kUnroll; k++)
    if (j + k * step < end) write(j + k * step, rest[k]);
  if (mine) out[column] = from_float<T>(value(target_logit) - kept);
  const auto single = [&](int64_t c) { out[c] = from_float<T>(value(to_float(row[c])) - (c == column ? kept : 0.0f)); };
  for (int64_t c = one; c < span.begin; c += ones) single(c);
  for (int64_t c = span.end + one; c < g.valid; c += ones) single(c);
  for (int64_t c = g.valid + one; c < g.columns; c += ones) out[c] = from_float<T>(0.0f);
}

// Narrow rows take small blocks; a few wide ones large blocks, so that they fill the device.
int threads_for(int64_t rows, int64_t columns, int vector_size) {
  const int64_t vectors = (columns + vector_size - 1) / vector_size;
  return vectors < kThreads * kUnroll ? kThreads / 2 : rows < 512 && vectors >= 4 * kMostThreads ? kMostThreads : kThreads;
}

const float* pointer(const std::optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

void check_grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "megamug: ", blocks, " blocks; a CUDA kernel has at most 2^31 - 1");
}

Tensor statistics(const Tensor& logits, const Tensor& targets, int64_t first_column, int64_t valid_columns,
                  int64_t vocab_size, int64_t ignore_index, bool sum_of_logits) {
  check_logits(logits, targets, valid_columns, vocab_size);
  const Launch launch(logits);
  const int64_t rows = logits.size(0);
  check_grid(rows);
  Tensor result = empty_floats({4, rows}, logits);
  if (rows == 0) return result;
  with_type(logits, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = sum_of_logits ? statistics_kernel<T, true> : statistics_kernel<T, false>;
    kernel<<<rows, threads_for(rows, valid_columns, Vector<T>::size), 0, launch.stream()>>>(
        static_cast<const T*>(logits.const_data_ptr()), logits.stride(0), targets.const_data_ptr<int64_t>(), first_column,
        valid_columns, ignore_index, rows, result.mutable_data_ptr<float>());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& statistics, const Tensor& targets,
                                         const std::optional<Tensor>& weights, int64_t /*first_column*/,
                                         int64_t valid_columns, int64_t vocab_size, int64_t ignore_index,
                                         double label_smoothing, double z_loss, bool /*inplace_backward*/) {
  check_logits(logits, targets, valid_columns, vocab_size);
  check_weights(weights, logits);
  const Launch launch(logits);
  const int64_t rows = logits.size(0);
  STD_TORCH_CHECK(statistics.is_cuda() && statistics.dim() == 3 && statistics.size(1) == 4 && statistics.size(2) == rows &&
                      statistics.is_contiguous() && statistics.scalar_type() == ScalarType::Float,
                  "megamug: statistics must be contiguous float32 [ranks, 4, rows] on the device of the logits");
  Tensor losses = empty_floats({rows}, logits), normalisers = empty_floats({2, rows}, logits);
  if (rows == 0) return {losses, normalisers};
  join_kernel<<<(rows + 127) / 128, 128, 0, launch.stream()>>>(
      statistics.const_data_ptr<float>(), statistics.size(0), rows, targets.const_data_ptr<int64_t>(), pointer(weights),
      vocab_size, ignore_index, static_cast<float>(label_smoothing), static_cast<float>(z_loss),
      losses.mutable_data_ptr<float>(), normalisers.mutable_data_ptr<float>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {losses, normalisers};
}

void write_gradient(const Tensor& output, const Tensor& logits, const Tensor& targets,
                    const std::optional<Tensor>& weights, const Tensor& normalisers, const Tensor& grad_per_token,
                    int64_t first_column, int64_t valid_columns, int64_t vocab_size, int64_t ignore_index,
                    double label_smoothing, double z_loss) {
  check_logits(logits, targets, valid_columns, vocab_size);
  check_weights(weights, logits);
  const Launch launch(logits);
  const int64_t rows = logits.size(0);
  check_normalisers(normalisers, logits);
  check_vector(grad_per_token, "grad_per_token", ScalarType::Float, rows, logits);
  if (rows == 0) return;
  const GradientTerms terms{targets.const_data_ptr<int64_t>(),
                            pointer(weights),
                            normalisers.const_data_ptr<float>(),
                            normalisers.const_data_ptr<float>() + rows,
                            grad_per_token.const_data_ptr<float>(),
                            first_column,
                            valid_columns,
                            logits.size(1),
                            vocab_size,
                            ignore_index,
                            static_cast<float>(label_smoothing),
                            static_cast<float>(z_loss)};
  with_type(logits, [&](auto zero) {
    using T = decltype(zero);
    const int threads = threads_for(kMostThreads, logits.size(1), Vector<T>::size);
    const int64_t part = static_cast<int64_t>(threads) * Vector<T>::size * kUnroll * kRounds;
    const int64_t chunks = std::max<int64_t>(1, (logits.size(1) + part - 1) / part);
    check_grid(rows * chunks);
    gradient_kernel<T><<<rows * chunks, threads, 0, launch.stream()>>>(
        static_cast<const T*>(logits.const_data_ptr()), logits.stride(0), static_cast<T*>(output.mutable_data_ptr()),
        output.stride(0), rows, static_cast<uint32_t>(chunks), terms);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor gradient(const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& weights,
                const Tensor& normalisers, const Tensor& grad_per_token, int64_t first_column, int64_t valid_columns,
                int64_t vocab_size, int64_t ignore_index, double label_smoothing, double z_loss) {
  const std::vector<int64_t> size{logits.size(0), logits.size(1)};
  Tensor output = torch::stable::new_empty(logits, size);
  write_gradient(output, logits, targets, weights, normalisers, grad_per_token, first_column, valid_columns, vocab_size,
                 ignore_index, label_smoothing, z_loss);
  return output;
}

void gradient_(const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& weights,
               const Tensor& normalisers, const Tensor& grad_per_token, int64_t first_column, int64_t valid_columns,
               int64_t vocab_size, int64_t ignore_index, double label_smoothing, double z_loss) {
  write_gradient(logits, logits, targets, weights, normalisers, grad_per_token, first_column, valid_columns, vocab_size,
                 ignore_index, label_smoothing, z_loss);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megamug, CUDA, m) {
  m.impl("cross_entropy_statistics", TORCH_BOX(&statistics));
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_gradient", TORCH_BOX(&gradient));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&gradient_));
}

}  // namespace megamug
