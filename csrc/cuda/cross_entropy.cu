// Cross-entropy over a slice of the vocabulary: one block a row. The formulas are in megamug/losses/cross_entropy.py.
#include "common.cuh"

namespace megamug {
namespace {

constexpr int kUnroll = 4;  // vectors a thread has in flight

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

// A running maximum and the sum of exponentials against it (Milakov and Gimelshein, arXiv 1805.02867).
struct Running {
  float maximum = -INFINITY, sum = 0;

  // While all is -inf a shift of 0 gives the right sum: 0, or NaN where there is one.
  __device__ float shift() const { return maximum == -INFINITY ? 0.0f : maximum; }
  __device__ void rescale(float highest) {
    if (highest > maximum) {
      sum *= exponential(maximum - highest);
      maximum = highest;
    }
  }
  __device__ void add(float x) {
    rescale(x);
    sum += exponential(x - shift());
  }
  __device__ void join(const Running& other) {
    rescale(other.maximum);
    sum += other.maximum == -INFINITY ? other.sum : other.sum * exponential(other.maximum - maximum);
  }
};

template <class T, bool with_sum>
__global__ void __launch_bounds__(512)
    statistics_kernel(const T* logits, int64_t stride, const int64_t* targets, int64_t first, int64_t valid,
                      int64_t ignore_index, int64_t rows, float* out) {
  constexpr int size = Vector<T>::size;
  __shared__ Running shared_running[kWarp];
  __shared__ float shared_sum[kWarp];
  const int64_t r = blockIdx.x;
  const T* row = logits + r * stride;
  const Span span = aligned_span(row, valid);
  Running running;
  float total = 0;
  const int64_t step = static_cast<int64_t>(blockDim.x) * size;
  int64_t j = span.begin + threadIdx.x * size;
  for (; j + (kUnroll - 1) * step < span.end; j += kUnroll * step) {
    Vector<T> v[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; k++) v[k] = load_vector(row + j + k * step);
    float highest = -INFINITY;
#pragma unroll
    for (int k = 0; k < kUnroll; k++)
#pragma unroll
      for (int i = 0; i < size; i++) highest = fmaxf(highest, to_float(v[k].values[i]));
    running.rescale(highest);
    const float shift = running.shift();
#pragma unroll
    for (int k = 0; k < kUnroll; k++)
#pragma unroll
      for (int i = 0; i < size; i++) {
        const float x = to_float(v[k].values[i]);
        running.sum += exponential(x - shift);
        if constexpr (with_sum) total += x;
      }
  }
  for (; j < span.end; j += step) {
    const Vector<T> v = load_vector(row + j);
#pragma unroll
    for (int i = 0; i < size; i++) {
      const float x = to_float(v.values[i]);
      running.add(x);
      if constexpr (with_sum) total += x;
    }
  }
  const auto single = [&](int64_t c) {
    const float x = to_float(row[c]);
    running.add(x);
    if constexpr (with_sum) total += x;
  };
  for (int64_t c = threadIdx.x; c < span.begin; c += blockDim.x) single(c);
  for (int64_t c = span.end + threadIdx.x; c < valid; c += blockDim.x) single(c);

  for (int offset = kWarp / 2; offset; offset /= 2) {
    Running other;
    other.maximum = __shfl_xor_sync(0xffffffffu, running.maximum, offset);
    other.sum = __shfl_xor_sync(0xffffffffu, running.sum, offset);
    running.join(other);
  }
  if (threadIdx.x % kWarp == 0) shared_running[threadIdx.x / kWarp] = running;
  if constexpr (with_sum) total = block_sum(total, shared_sum);
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < static_cast<int>(blockDim.x) / kWarp; w++) running.join(shared_running[w]);
    const int64_t t = targets[r];
    const bool owned = t != ignore_index && t >= first && t < first + valid;
    out[r] = running.maximum;
    out[rows + r] = running.sum;
    out[2 * rows + r] = owned ? to_float(row[t - first]) : 0.0f;
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

template <class T>
__global__ void __launch_bounds__(512)
    gradient_kernel(const T* logits, int64_t stride, T* output, int64_t output_stride, GradientTerms g) {
  constexpr int size = Vector<T>::size;
  const int64_t r = blockIdx.x;
  const T* row = logits + r * stride;
  T* out = output + r * output_stride;
  const int64_t t = g.targets[r];
  const float factor = t == g.ignore_index ? 0.0f : g.weights ? g.weights[r] : 1.0f;
  const bool outside = t != g.ignore_index && (t < 0 || t >= g.vocab_size);
  for (int64_t c = g.valid + threadIdx.x; c < g.columns; c += blockDim.x) out[c] = from_float<T>(0.0f);
  if (factor == 0 && !outside) {
    for (int64_t c = threadIdx.x; c < g.valid; c += blockDim.x) out[c] = from_float<T>(0.0f);
    return;
  }
  const float shift = g.maximum[r], sum_of_exp = g.sum_of_exp[r];
  const float coefficient = outside ? NAN : factor * g.grad_per_token[r];
  // exp(x - max) / sum, not exp(x - lse): the rounding of a large lse would be in every probability
  const float scale = coefficient * (1.0f + 2.0f * g.z_loss * (shift + logf(sum_of_exp))) / sum_of_exp;
  const float offset = coefficient * (g.label_smoothing / g.vocab_size);
  const bool owned = t >= g.first && t < g.first + g.valid;
  // The target's entry is made on its own, from the unrounded probability; its logit is read before it is overwritten.
  const float target_logit = owned && threadIdx.x == 0 ? to_float(row[t - g.first]) : 0.0f;
  __syncthreads();

  Span span = aligned_span(row, g.valid);
  if (reinterpret_cast<uintptr_t>(row) % 16 != reinterpret_cast<uintptr_t>(out) % 16) span = {g.valid, g.valid};
  const auto value = [&](float x) { return exponential(x - shift) * scale - offset; };
  const int64_t step = static_cast<int64_t>(blockDim.x) * size;
  int64_t j = span.begin + threadIdx.x * size;
  for (; j + (kUnroll - 1) * step < span.end; j += kUnroll * step) {
    Vector<T> v[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; k++) v[k] = load_vector(row + j + k * step);
#pragma unroll
    for (int k = 0; k < kUnroll; k++) {
#pragma unroll
      for (int i = 0; i < size; i++) v[k].values[i] = from_float<T>(value(to_float(v[k].values[i])));
      store_vector(out + j + k * step, v[k]);
    }
  }
  for (; j < span.end; j += step) {
    Vector<T> v = load_vector(row + j);
#pragma unroll
    for (int i = 0; i < size; i++) v.values[i] = from_float<T>(value(to_float(v.values[i])));
    store_vector(out + j, v);
  }
  for (int64_t c = threadIdx.x; c < span.begin; c += blockDim.x) out[c] = from_float<T>(value(to_float(row[c])));
  for (int64_t c = span.end + threadIdx.x; c < g.valid; c += blockDim.x) out[c] = from_float<T>(value(to_float(row[c])));
  __syncthreads();
  if (owned && threadIdx.x == 0)
    out[t - g.first] = from_float<T>(value(target_logit) - coefficient * (1.0f - g.label_smoothing));
}

int threads_for(int64_t columns, int vector_size) {
  const int64_t vectors = (columns + vector_size - 1) / vector_size;
  return vectors >= 512 ? 512 : vectors >= 256 ? 256 : 128;
}

const float* pointer(const std::optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

void check_grid(int64_t rows) {
  STD_TORCH_CHECK(rows <= 0x7fffffff, "megamug: ", rows, " rows; the CUDA kernels take 2^31 - 1 in one call");
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
    kernel<<<rows, threads_for(valid_columns, Vector<T>::size), 0, launch.stream()>>>(
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
  check_grid(rows);
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
    gradient_kernel<T><<<rows, threads_for(valid_columns, Vector<T>::size), 0, launch.stream()>>>(
        static_cast<const T*>(logits.const_data_ptr()), logits.stride(0), static_cast<T*>(output.mutable_data_ptr()),
        output.stride(0), terms);
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
