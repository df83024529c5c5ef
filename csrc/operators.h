// What the CPU and the CUDA operators share: argument checks and the reading of a target. No arithmetic.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace megamug {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_logit_type(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half;
}

inline void check_vector(const Tensor& t, const char* name, ScalarType type, int64_t rows, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == rows && t.scalar_type() == type && t.is_contiguous(),
                  "megamug: ", name, " has the wrong shape, dtype or layout");
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(),
                  "megamug: ", name, " is on another device than the logits");
}

// logits [R, V] with unit column stride; targets [R]; this slice is columns [first, first + valid) of `vocab_size`.
inline void check_logits(const Tensor& logits, const Tensor& targets, int64_t valid_columns, int64_t vocab_size) {
  STD_TORCH_CHECK(logits.dim() == 2 && is_logit_type(logits.scalar_type()),
                  "megamug: logits must be two-dimensional float32, bfloat16 or float16");
  STD_TORCH_CHECK(logits.size(1) <= 1 || logits.stride(1) == 1, "megamug: the columns of logits must be contiguous");
  STD_TORCH_CHECK(valid_columns >= 0 && valid_columns <= logits.size(1) && vocab_size > 0,
                  "megamug: valid_columns or vocab_size do not fit the logits");
  check_vector(targets, "targets", ScalarType::Long, logits.size(0), logits);
}

inline void check_weights(const std::optional<Tensor>& weights, const Tensor& logits) {
  if (weights) check_vector(*weights, "weights", ScalarType::Float, logits.size(0), logits);
}

// [2, R]: maximum and sum of exponentials of each row
inline void check_normalisers(const Tensor& normalisers, const Tensor& logits) {
  STD_TORCH_CHECK(normalisers.dim() == 2 && normalisers.size(0) == 2 && normalisers.size(1) == logits.size(0) &&
                      normalisers.is_contiguous() && normalisers.scalar_type() == ScalarType::Float &&
                      normalisers.is_cuda() == logits.is_cuda(),
                  "megamug: normalisers must be contiguous float32 [2, rows] on the device of the logits");
}

// images [B, 3, H, W], predictions [B, N or M, 3 p p], masked_ids [B, M]
inline void check_patches(const Tensor& images, const Tensor& predictions, const Tensor& masked_ids, int64_t patch_size,
                          const std::vector<double>& mean, const std::vector<double>& std) {
  STD_TORCH_CHECK(images.dim() == 4 && images.size(1) == 3 && images.is_contiguous() &&
                      (is_logit_type(images.scalar_type()) || images.scalar_type() == ScalarType::Byte),
                  "megamug: images must be contiguous [B, 3, H, W], uint8 or floating point");
  STD_TORCH_CHECK(patch_size > 0 && images.size(2) % patch_size == 0 && images.size(3) % patch_size == 0,
                  "megamug: height and width of the images must be multiples of the patch size");
  STD_TORCH_CHECK(mean.size() == std.size() && mean.size() == (images.scalar_type() == ScalarType::Byte ? 3u : 0u),
                  "megamug: mean and std are three numbers each for uint8 images, none for others");
  const int64_t patches = (images.size(2) / patch_size) * (images.size(3) / patch_size);
  STD_TORCH_CHECK(masked_ids.dim() == 2 && masked_ids.size(0) == images.size(0) && masked_ids.is_contiguous() &&
                      masked_ids.scalar_type() == ScalarType::Long,
                  "megamug: masked_ids must be contiguous int64 [B, masked patches]");
  STD_TORCH_CHECK(predictions.dim() == 3 && predictions.is_contiguous() && is_logit_type(predictions.scalar_type()) &&
                      predictions.size(0) == images.size(0) &&
                      (predictions.size(1) == patches || predictions.size(1) == masked_ids.size(1)) &&
                      predictions.size(2) == 3 * patch_size * patch_size,
                  "megamug: predictions must be contiguous [B, patches or masked patches, 3 * patch_size^2]");
  for (const Tensor& t : {predictions, masked_ids})
    STD_TORCH_CHECK(t.is_cuda() == images.is_cuda() && t.get_device_index() == images.get_device_index(),
                    "megamug: images, predictions and masked_ids must be on one device");
}

// what `masked_patch` made for `predictions`, and the gradient of its sum
inline void check_patch_gradient(const Tensor& gradient, const Tensor& predictions, const Tensor& incoming) {
  STD_TORCH_CHECK(gradient.dim() == 3 && gradient.is_contiguous() && gradient.scalar_type() == predictions.scalar_type() &&
                      gradient.size(0) == predictions.size(0) && gradient.size(1) == predictions.size(1) &&
                      gradient.size(2) == predictions.size(2),
                  "megamug: the gradient must be contiguous and like the predictions");
  STD_TORCH_CHECK(incoming.numel() == 1 && incoming.scalar_type() == ScalarType::Float,
                  "megamug: the incoming gradient must be one float32");
  for (const Tensor& t : {gradient, incoming})
    STD_TORCH_CHECK(t.is_cuda() == predictions.is_cuda() && t.get_device_index() == predictions.get_device_index(),
                    "megamug: gradient and predictions must be on one device");
}

// value * scale + shift of a pixel, per channel
inline void pixel_transform(const std::vector<double>& mean, const std::vector<double>& std, float* scale, float* shift) {
  for (int c = 0; c < 3; c++) {
    scale[c] = mean.empty() ? 1.0f : static_cast<float>(1.0 / (255.0 * std[c]));
    shift[c] = mean.empty() ? 0.0f : static_cast<float>(-mean[c] / std[c]);
  }
}

inline Tensor empty_floats(std::vector<int64_t> size, const Tensor& like) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
}

}  // namespace megamug
