// The CPU kernels behind the operators: plain pointers, no torch. One table of functions per instruction set.
#pragma once

#include <cstdint>

namespace megamug {

enum class Dtype { float32, bfloat16, float16, uint8 };

// R rows of V columns, `stride` elements apart. Columns at and after `valid` are padding.
struct Rows {
  void* logits;
  Dtype dtype;
  int64_t stride, columns, valid;
};

// Statistics of a row over this rank's columns, each an array of R floats.
struct Statistics {
  float *maximum, *sum_of_exp, *target_logit, *sum_of_logits;
};

struct Gradient {
  void* output;  // same dtype; may be the logits themselves
  int64_t stride;
  const float *maximum, *sum_of_exp;  // of each row over the whole vocabulary
  const float* z_factor;  // 1 + 2 z lse
  const float* factor;  // weight x incoming gradient of each row; a row of factor 0 with active 0 gets zero
  const bool* active;
  float label_smoothing, smoothing_per_column;
};

struct Patches {
  const void* images;
  const void* predictions;
  void* gradient;  // null: not wanted
  Dtype image_dtype, prediction_dtype;
  int64_t height, width, patch_size;
  bool norm_pix;
  float incoming;  // gradient of the sum
  float scale[3], shift[3];  // of a pixel: value * scale + shift
};

// A tensor [tokens, batch, heads, width] whose last axis is contiguous; strides in elements.
struct Heads {
  void* data;
  int64_t token, batch, head;
};

struct Attention {
  Dtype dtype;  // float32 or bfloat16, of all but logsumexp
  int64_t queries, keys, batch, heads, key_heads, width;
  float scale;
  bool causal;  // query i sees keys 0 to i
  const int32_t* first;  // [batch, queries]: the first key a query sees, not falling along a row; null: all see key 0
  Heads query, key, value, context;
  float* logsumexp;  // [batch, heads, queries]
  Heads context_gradient, query_gradient, key_gradient, value_gradient;  // of backward alone
};

constexpr int64_t kQueryBlock = 64;  // queries of one task of attention_forward

struct Kernels {
  const char* name;
  // `column[row]`: the target's column in this slice, or -1 where another rank owns it
  void (*statistics)(const Rows&, const int64_t* column, const Statistics&, bool sum, int64_t begin, int64_t end);
  void (*gradient)(const Rows&, const int64_t* column, const Gradient&, int64_t begin, int64_t end);
  // One masked patch: mean squared error; the gradient of that error, times `incoming`, goes to row `row` of `gradient`.
  float (*patch)(const Patches&, float* scratch, int64_t image, int64_t patch, int64_t row);
  // Bytes of scratch, aligned to 64, that a thread of the next two needs.
  int64_t (*attention_scratch)(const Attention&, bool backward);
  // Tasks are (batch, head, block of queries) in this order, the last one fastest.
  void (*attention_forward)(const Attention&, void* scratch, int64_t begin, int64_t end);
  // Tasks are (batch, head of keys).
  void (*attention_backward)(const Attention&, void* scratch, int64_t begin, int64_t end);
};

extern const Kernels kernels_generic, kernels_avx2, kernels_avx512, kernels_avx512_bf16;

// The widest instruction set of this machine; MEGAMUG_CPU_KERNELS=generic|avx2|avx512|avx512_bf16 asks for a narrower one.
const Kernels& kernels();

}  // namespace megamug
