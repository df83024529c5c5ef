// The operators, their schemas and their CPU form: checks, memory, threads; the arithmetic is in kernels.inl.
#include "../operators.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

#include "kernels/kernels.h"

namespace megamug {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const char* wish = std::getenv("MEGAMUG_CPU_KERNELS");
    const auto allowed = [wish](const char* name) { return !wish || !std::strcmp(wish, name); };
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx512 && __builtin_cpu_supports("avx512bf16") && allowed("avx512_bf16")) return kernels_avx512_bf16;
    if (avx512 && (allowed("avx512") || allowed("avx512_bf16"))) return kernels_avx512;
    if (avx2 && !(wish && !std::strcmp(wish, "generic"))) return kernels_avx2;
#endif
    return kernels_generic;
  }();
  return chosen;
}

namespace {

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::Byte: return Dtype::uint8;
    default: return Dtype::float32;
  }
}

// Rows of which a thread takes at least so many that its part is worth waking it.
int64_t grain(int64_t columns) { return columns > 0 ? std::max<int64_t>(1, 16384 / columns) : 16384; }

Rows rows_of(const Tensor& logits, int64_t valid_columns) {
  return {const_cast<void*>(logits.const_data_ptr()), dtype_of(logits), logits.stride(0), logits.size(1), valid_columns};
}

// The column of each target in this slice, -1 where there is none; a target outside the vocabulary is an error.
std::unique_ptr<int64_t[]> target_columns(const Tensor& targets, int64_t first, int64_t valid, int64_t vocab_size,
                                          int64_t ignore_index) {
  const int64_t rows = targets.size(0), *t = targets.const_data_ptr<int64_t>();
  auto column = std::make_unique<int64_t[]>(rows);
  for (int64_t r = 0; r < rows; r++) {
    STD_TORCH_CHECK(t[r] == ignore_index || (t[r] >= 0 && t[r] < vocab_size), "megamug: target ", t[r],
                    " is outside the vocabulary [0, ", vocab_size, ")");
    const bool owned = t[r] != ignore_index && t[r] >= first && t[r] < first + valid;
    column[r] = owned ? t[r] - first : -1;
  }
  return column;
}

struct Factors {
  const int64_t* targets;
  const float* weights;
  int64_t ignore_index;
  Factors(const Tensor& t, const std::optional<Tensor>& w, int64_t ignore)
      : targets(t.const_data_ptr<int64_t>()), weights(w ? w->const_data_ptr<float>() : nullptr), ignore_index(ignore) {}
  float operator[](int64_t r) const { return targets[r] == ignore_index ? 0.0f : weights ? weights[r] : 1.0f; }
};

Tensor statistics(const Tensor& logits, const Tensor& targets, int64_t first_column, int64_t valid_columns,
                  int64_t vocab_size, int64_t ignore_index, bool sum_of_logits) {
  check_logits(logits, targets, valid_columns, vocab_size);
  const int64_t rows = logits.size(0);
  const auto column = target_columns(targets, first_column, valid_columns, vocab_size, ignore_index);
  Tensor result = empty_floats({4, rows}, logits);
  float* p = result.mutable_data_ptr<float>();
  const Statistics out{p, p + rows, p + 2 * rows, p + 3 * rows};
  const Rows in = rows_of(logits, valid_columns);
  torch::stable::parallel_for(0, rows, grain(in.columns), [&](int64_t begin, int64_t end) {
    kernels().statistics(in, column.get(), out, sum_of_logits, begin, end);
  });
  return result;
}

// statistics [ranks, 4, R] -> weighted loss of each token, and [2, R]: maximum and sum of exponentials of each row over
// the whole vocabulary
std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& statistics, const Tensor& targets,
                                         const std::optional<Tensor>& weights, int64_t /*first_column*/,
                                         int64_t valid_columns, int64_t vocab_size, int64_t ignore_index,
                                         double label_smoothing, double z_loss, bool /*inplace_backward*/) {
  check_logits(logits, targets, valid_columns, vocab_size);
  check_weights(weights, logits);
  const int64_t rows = logits.size(0);
  STD_TORCH_CHECK(statistics.dim() == 3 && statistics.size(1) == 4 && statistics.size(2) == rows &&
                      statistics.is_contiguous() && statistics.scalar_type() == ScalarType::Float,
                  "megamug: statistics must be contiguous float32 [ranks, 4, rows]");
  const int64_t ranks = statistics.size(0);
  const float* s = statistics.const_data_ptr<float>();
  Tensor losses = empty_floats({rows}, logits), normalisers = empty_floats({2, rows}, logits);
  float *loss_out = losses.mutable_data_ptr<float>(), *normaliser_out = normalisers.mutable_data_ptr<float>();
  const Factors factor(targets, weights, ignore_index);
  for (int64_t r = 0; r < rows; r++) {
    float highest = -std::numeric_limits<float>::infinity();
    for (int64_t k = 0; k < ranks; k++) highest = std::max(highest, s[k * 4 * rows + r]);
    double exponentials = 0, target_logit = 0, sum_of_logits = 0;
    for (int64_t k = 0; k < ranks; k++) {
      const float* mine = s + k * 4 * rows + r;
      exponentials += std::exp(double(mine[0]) - highest) * mine[rows];
      target_logit += mine[2 * rows];
      sum_of_logits += mine[3 * rows];
    }
    const double logsumexp = highest + std::log(exponentials);
    double loss = (1 - label_smoothing) * (logsumexp - target_logit);
    if (label_smoothing != 0) loss += label_smoothing * (logsumexp - sum_of_logits / vocab_size);
    if (z_loss != 0) loss += z_loss * logsumexp * logsumexp;
    loss_out[r] = factor[r] == 0 ? 0.0f : static_cast<float>(loss * factor[r]);
    normaliser_out[r] = highest;
    normaliser_out[rows + r] = static_cast<float>(exponentials);
  }
  return {losses, normalisers};
}

void write_gradient(const Tensor& output, const Tensor& logits, const Tensor& targets,
                    const std::optional<Tensor>& weights, const Tensor& normalisers, const Tensor& grad_per_token,
                    int64_t first_column, int64_t valid_columns, int64_t vocab_size, int64_t ignore_index,
                    double label_smoothing, double z_loss) {
  check_logits(logits, targets, valid_columns, vocab_size);
  check_weights(weights, logits);
  const int64_t rows = logits.size(0);
  check_normalisers(normalisers, logits);
  check_vector(grad_per_token, "grad_per_token", ScalarType::Float, rows, logits);
  const auto column = target_columns(targets, first_column, valid_columns, vocab_size, ignore_index);
  const auto scaled = std::make_unique<float[]>(rows);
  const auto active = std::make_unique<bool[]>(rows);
  const auto z_factor = std::make_unique<float[]>(rows);
  const float *maximum = normalisers.const_data_ptr<float>(), *sum_of_exp = maximum + rows;
  const Factors factor(targets, weights, ignore_index);
  const float* incoming = grad_per_token.const_data_ptr<float>();
  for (int64_t r = 0; r < rows; r++) {
    active[r] = factor[r] != 0;
    scaled[r] = factor[r] * incoming[r];
    z_factor[r] = z_loss == 0 ? 1.0f : static_cast<float>(1 + 2 * z_loss * (maximum[r] + std::log(double(sum_of_exp[r]))));
  }
  const Gradient g{output.mutable_data_ptr(),
                   output.stride(0),
                   maximum,
                   sum_of_exp,
                   z_factor.get(),
                   scaled.get(),
                   active.get(),
                   static_cast<float>(label_smoothing),
                   static_cast<float>(label_smoothing / static_cast<double>(vocab_size))};
  const Rows in = rows_of(logits, valid_columns);
  torch::stable::parallel_for(0, rows, grain(in.columns), [&](int64_t begin, int64_t end) {
    kernels().gradient(in, column.get(), g, begin, end);
  });
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

// A patch is many short rows, far apart: nothing the processor foresees. Asking early hides most of the wait.
void prefetch_pixels(const Patches& p, int64_t image, int64_t patch) {
  const int64_t element = p.image_dtype == Dtype::uint8 ? 1 : p.image_dtype == Dtype::float32 ? 4 : 2;
  const int64_t across = p.width / p.patch_size, row_bytes = p.patch_size * element;
  for (int64_t y = 0; y < 3 * p.patch_size; y++) {
    const int64_t channel = y / p.patch_size, line = patch / across * p.patch_size + y % p.patch_size;
    const char* start = static_cast<const char*>(p.images) +
                        (((image * 3 + channel) * p.height + line) * p.width + patch % across * p.patch_size) * element;
    for (int64_t b = 0; b < row_bytes; b += 64) __builtin_prefetch(start + b);
  }
}

// The sum over the masked patches; `gradient` (null: not wanted) takes its gradient for the predictions, times `incoming`.
float compare_patches(const Tensor& images, const Tensor& predictions, const Tensor& masked_ids, int64_t patch_size,
                      bool norm_pix, const std::vector<double>& mean, const std::vector<double>& std, float incoming,
                      void* gradient) {
  const int64_t batch = images.size(0), height = images.size(2), width = images.size(3), masked = masked_ids.size(1);
  const int64_t patches = (height / patch_size) * (width / patch_size), values = 3 * patch_size * patch_size;
  const bool all = predictions.size(1) == patches;

  // order[b, n]: the place of patch n among the masked ones of image b, or -1
  const auto order = std::make_unique<int32_t[]>(batch * patches);
  std::memset(order.get(), 0xff, batch * patches * sizeof(int32_t));
  const int64_t* ids = masked_ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < batch * masked; i++) {
    STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < patches, "megamug: masked_ids hold ", ids[i], "; the grid has patches 0 to ",
                    patches - 1);
    int32_t& slot = order[i / masked * patches + ids[i]];
    STD_TORCH_CHECK(slot < 0, "megamug: masked_ids name patch ", ids[i], " twice in one image");
    slot = static_cast<int32_t>(i % masked);
  }

  Patches p{images.const_data_ptr(), predictions.const_data_ptr(), gradient, dtype_of(images), dtype_of(predictions),
            height, width, patch_size, norm_pix, incoming, {}, {}};
  pixel_transform(mean, std, p.scale, p.shift);
  const auto losses = std::make_unique<float[]>(batch * masked);
  const int64_t row_bytes = values * (p.prediction_dtype == Dtype::float32 ? 4 : 2);
  torch::stable::parallel_for(0, batch * patches, 16, [&](int64_t begin, int64_t end) {
    const auto scratch = std::make_unique<float[]>(values + 3 * 16);  // see read_patch; 16 floats: the widest vector
    for (int64_t i = begin; i < end; i++) {
      if (i + 2 < end && order[i + 2] >= 0) prefetch_pixels(p, (i + 2) / patches, (i + 2) % patches);
      const int64_t image = i / patches, patch = i % patches, place = order[i];
      if (place >= 0)
        losses[image * masked + place] =
            kernels().patch(p, scratch.get(), image, patch, all ? i : image * masked + place);
      else if (all && p.gradient)
        std::memset(static_cast<char*>(p.gradient) + i * row_bytes, 0, row_bytes);
    }
  });
  double total = 0;
  for (int64_t i = 0; i < batch * masked; i++) total += losses[i];
  return static_cast<float>(total);
}

// (sum, gradient of the sum for the predictions; empty where it is not wanted)
std::tuple<Tensor, Tensor> masked_patch(const Tensor& images, const Tensor& predictions, const Tensor& masked_ids,
                                        int64_t patch_size, bool norm_pix, std::vector<double> mean,
                                        std::vector<double> std, bool with_gradient) {
  check_patches(images, predictions, masked_ids, patch_size, mean, std);
  const std::vector<int64_t> size{with_gradient ? images.size(0) : 0, predictions.size(1), predictions.size(2)};
  Tensor gradient = torch::stable::new_empty(predictions, size), sum = empty_floats({}, predictions);
  *sum.mutable_data_ptr<float>() =
      compare_patches(images, predictions, masked_ids, patch_size, norm_pix, mean, std, 1.0f,
                      with_gradient ? gradient.mutable_data_ptr() : nullptr);
  return {sum, gradient};
}

// What `masked_patch` made is right for an incoming gradient of 1; any other makes it anew, so that it is rounded once.
void masked_patch_gradient_(const Tensor& gradient, const Tensor& images, const Tensor& predictions,
                            const Tensor& masked_ids, int64_t patch_size, bool norm_pix, std::vector<double> mean,
                            std::vector<double> std, const Tensor& incoming) {
  check_patches(images, predictions, masked_ids, patch_size, mean, std);
  check_patch_gradient(gradient, predictions, incoming);
  const float value = *incoming.const_data_ptr<float>();
  if (value == 1.0f) return;
  compare_patches(images, predictions, masked_ids, patch_size, norm_pix, mean, std, value, gradient.mutable_data_ptr());
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* megamug_cpu_kernels() { return kernels().name; }

STABLE_TORCH_LIBRARY(megamug, m) {
  m.def(
      "cross_entropy_statistics(Tensor logits, Tensor targets, int first_column, int valid_columns, int vocab_size, "
      "int ignore_index, bool sum_of_logits) -> Tensor");
  m.def(
      "cross_entropy(Tensor logits, Tensor statistics, Tensor targets, Tensor? weights, int first_column, "
      "int valid_columns, int vocab_size, int ignore_index, float label_smoothing, float z_loss, "
      "bool inplace_backward) -> (Tensor, Tensor)");
  m.def(
      "cross_entropy_gradient(Tensor logits, Tensor targets, Tensor? weights, Tensor normalisers, Tensor grad_per_token, "
      "int first_column, int valid_columns, int vocab_size, int ignore_index, float label_smoothing, float z_loss) "
      "-> Tensor");
  m.def(
      "cross_entropy_gradient_(Tensor(a!) logits, Tensor targets, Tensor? weights, Tensor normalisers, "
      "Tensor grad_per_token, int first_column, int valid_columns, int vocab_size, int ignore_index, "
      "float label_smoothing, float z_loss) -> ()");
  m.def(
      "masked_patch(Tensor images, Tensor predictions, Tensor masked_ids, int patch_size, bool norm_pix, float[] mean, "
      "float[] std, bool with_gradient) -> (Tensor, Tensor)");
  m.def(
      "masked_patch_gradient_(Tensor(a!) gradient, Tensor images, Tensor predictions, Tensor masked_ids, int patch_size, "
      "bool norm_pix, float[] mean, float[] std, Tensor incoming) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megamug, CPU, m) {
  m.impl("cross_entropy_statistics", TORCH_BOX(&statistics));
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_gradient", TORCH_BOX(&gradient));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&gradient_));
  m.impl("masked_patch", TORCH_BOX(&masked_patch));
  m.impl("masked_patch_gradient_", TORCH_BOX(&masked_patch_gradient_));
}

}  // namespace megamug
