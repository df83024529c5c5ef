// The kernels themselves, compiled once per instruction set: the including file defines WIDTH (floats in a vector) and
// TABLE, and the compiler is given the matching flags. Vectors are the GCC/Clang extension, so one source serves x86 and
// ARM. No standard header with inline functions may come in here: the linker would keep one copy for all instruction sets.
#include "vectors.inl"

#include "attention.inl"

namespace megamug {
namespace {

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
  const float twice = p.incoming * (2.0f / count);
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

const Kernels TABLE = {TABLE_NAME,        statistics,        gradient,          patch,
                       attention_scratch, attention_forward, attention_backward};

}  // namespace megamug
