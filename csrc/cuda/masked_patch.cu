// Masked-patch loss and gradient: one warp a patch, one pass over image and predictions.
#include "common.cuh"

namespace megamug {
namespace {

constexpr int kThreads = 128;
constexpr int kMostBlocks = 1 << 16;  // of a grid; warps stride over what is left
constexpr int kBlocksOfBackward = 132 * 12;  // about what a device holds: a grid that has nothing to do ends at once
constexpr unsigned kAll = 0xffffffffu;

struct Shape {
  int64_t patches;
  int masked, rows;  // rows of predictions of an image: all patches, or the masked ones
  int width, plane, patch_size, values, across;
  bool all, norm_pix;
  float scale[3], shift[3];
};

template <class Image, class T>
struct Work {
  const Image* images;
  const T* predictions;
  const int64_t* ids;
  int64_t total;  // batch x rows
  const float* incoming;  // backward: the gradient of the sum; null in forward, where it is 1
  T* gradient;  // null: not wanted
  float* losses;  // [total], 0 where nothing is predicted; null in backward
  Shape s;
};

template <class T>
__device__ inline void fill(T* out, int values, float value, bool vectors) {
  const int lane = threadIdx.x % kWarp;
  if (vectors) {
    float x[Vector<T>::size];
    for (float& y : x) y = value;
    const Vector<T> v = pack<T>(x);
    for (int i = lane * Vector<T>::size; i < values; i += kWarp * Vector<T>::size) store_vector(out + i, v);
  } else {
    for (int i = lane; i < values; i += kWarp) out[i] = from_float<T>(value);
  }
}

// Eight pixels of a channel, in the registers that a load fills and as floats.
template <class Image>
struct Octet {
  static constexpr int words = sizeof(Image) * 2;
  uint32_t word[words];
  __device__ void load(const Image* p) {
    if constexpr (words == 2) {
      const uint2 two = *reinterpret_cast<const uint2*>(p);
      word[0] = two.x, word[1] = two.y;
    } else {
#pragma unroll
      for (int k = 0; k < words; k += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(p + k * 4 / sizeof(Image));
        word[k] = four.x, word[k + 1] = four.y, word[k + 2] = four.z, word[k + 3] = four.w;
      }
    }
  }
  __device__ float operator[](int i) const {
    if constexpr (words == 2) return static_cast<float>(word[i / 4] >> (i % 4 * 8) & 255u);
    if constexpr (words == 8) return __uint_as_float(word[i]);
    if constexpr (std::is_same_v<Image, __nv_bfloat16>)
      return __uint_as_float(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word[i / 2] >> (i % 2 * 16))));
  }
};

// The compiler may not unpack before this place what it would have to keep in registers until then.
template <class T>
__device__ inline void keep_packed(Vector<T>& v) {
  uint4& words = reinterpret_cast<uint4&>(v);
  asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
}

// A target is normalised from its differences to the patch's first value, so that a patch of one colour has variance 0, not
// the rounding noise of a sum of large numbers.
__device__ inline float inverse_deviation(float squares, const Shape& s) {
  return rsqrtf(squares * (1.0f / (s.values - 1)) + 1e-6f);
}

// Patches of 8 x 8 or 16 x 16 in whole vectors: a lane has eight pixels of a line, in registers, and their 24 values of the
// prediction. The gradient goes through shared memory, so that a store is one piece of 512 bytes. Where a patch has fewer
// than 32 such parts, the other lanes repeat them and are left out of the sums. -> sum of the squared differences
template <class Image, class T>
__device__ float by_octets(const Shape& s, const Image* corner, const T* prediction, T* out, float factor,
                           Vector<T>* staged) {
  constexpr int size = Vector<T>::size, vectors = 24 / size;
  const int lane = threadIdx.x % kWarp, across = s.patch_size / 8, parts = s.patch_size * across;
  const int part = lane & (parts - 1), x = part & (across - 1), y = across == 2 ? part / 2 : part;
  const bool counts = lane < parts;
  Octet<Image> pixels[3];
  Vector<T> predicted[vectors];
  corner += y * s.width + x * 8;
#pragma unroll
  for (int c = 0; c < 3; c++) pixels[c].load(corner + c * s.plane);
#pragma unroll
  for (int k = 0; k < vectors; k++) predicted[k] = load_vector(prediction + part * 24 + k * size);
  const float first = s.norm_pix ? __shfl_sync(kAll, pixels[0][0] * s.scale[0] + s.shift[0], 0) : 0.0f;
  float target[3][8], inverse = 1, sum = 0;
#pragma unroll
  for (int c = 0; c < 3; c++)
#pragma unroll
    for (int i = 0; i < 8; i++) {
      target[c][i] = fmaf(pixels[c][i], s.scale[c], s.shift[c] - first);
      sum += target[c][i];
    }
  if (s.norm_pix) {
    const float mean = warp_sum(counts ? sum : 0.0f) * (1.0f / s.values);
    float squares = 0;
#pragma unroll
    for (int c = 0; c < 3; c++)
#pragma unroll
      for (int i = 0; i < 8; i++) {
        target[c][i] -= mean;
        squares += target[c][i] * target[c][i];
      }
    inverse = inverse_deviation(warp_sum(counts ? squares : 0.0f), s);
  }
  float squares = 0;
#pragma unroll
  for (int k = 0; k < vectors; k++) {
    float v[size];
    keep_packed(predicted[k]);
    unpack(predicted[k], v);
#pragma unroll
    for (int i = 0; i < size; i++) {  // value j: channel j % 3 of pixel j / 3
      const int j = k * size + i;
      const float d = fmaf(-target[j % 3][j / 3], inverse, v[i]);
      squares += d * d;
      v[i] = d * factor;
    }
    predicted[k] = pack<T>(v);
  }
  if (out) {
#pragma unroll
    for (int k = 0; k < vectors; k++)
      reinterpret_cast<uint4&>(staged[part * vectors + k]) = reinterpret_cast<const uint4&>(predicted[k]);
    __syncwarp();
#pragma unroll
    for (int k = 0; k < vectors; k++)
      if (k * kWarp + lane < parts * vectors)
        store_vector(out + (k * kWarp + lane) * size, load_vector(staged[k * kWarp + lane].values));
    __syncwarp();
  }
  return warp_sum(counts ? squares : 0.0f);
}

// Any patch: a lane takes every 32nd pixel; the image is read again for each sum, from the first-level cache.
template <class Image, class T>
__device__ float by_pixels(const Shape& s, const Image* corner, const T* prediction, T* out, float factor) {
  const int lane = threadIdx.x % kWarp, p = s.patch_size, area = p * p, lines = kWarp / p, rest = kWarp % p;
  const float first = s.norm_pix ? to_float(*corner) * s.scale[0] + s.shift[0] : 0.0f;
  const auto each = [&](auto&& f) {  // f(place in the row of values, value) for all values of this lane
    int y = lane / p, x = lane % p;
    for (int i = lane; i < area; i += kWarp) {
#pragma unroll
      for (int c = 0; c < 3; c++)
        f(i * 3 + c, fmaf(to_float(corner[c * s.plane + y * s.width + x]), s.scale[c], s.shift[c] - first));
      x += rest, y += lines;
      if (x >= p) x -= p, y++;
    }
  };
  float mean = 0, inverse = 1, squares = 0;
  if (s.norm_pix) {
    float sum = 0, around = 0;
    each([&](int, float v) { sum += v; });
    mean = warp_sum(sum) * (1.0f / s.values);
    each([&](int, float v) { around += (v - mean) * (v - mean); });
    inverse = inverse_deviation(warp_sum(around), s);
  }
  each([&](int i, float v) {
    const float d = fmaf(mean - v, inverse, to_float(prediction[i]));
    squares += d * d;
    if (out) out[i] = from_float<T>(d * factor);
  });
  return warp_sum(squares);
}

// An image one of whose patch numbers lies outside the grid, and a patch that is named twice, get NaN.
template <class Image, class T, bool octets>
__global__ void __launch_bounds__(kThreads, 6)
    patch_kernel(const __grid_constant__ Work<Image, T> w, bool prediction_vectors) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ Vector<T> staged[octets ? kWarps : 1][octets ? kWarp * 24 / Vector<T>::size : 1];
  const Shape& s = w.s;
  const int lane = threadIdx.x % kWarp;
  const float incoming = w.incoming ? *w.incoming : 1.0f;
  if (w.incoming && incoming == 1.0f) return;  // what forward wrote
  const float factor = incoming * (2.0f / s.values);
  for (int64_t row = blockIdx.x * kWarps + threadIdx.x / kWarp; row < w.total; row += gridDim.x * kWarps) {
    const int image = static_cast<int>(row) / s.rows, place = static_cast<int>(row) - image * s.rows;  // 31 bits
    const int64_t* ids = w.ids + static_cast<int64_t>(image) * s.masked;
    const int64_t number = s.all ? place : ids[place];
    int named = 0;
    bool bad = false;
    for (int m = lane; m < s.masked; m += kWarp) {
      const int64_t id = ids[m];
      bad |= static_cast<uint64_t>(id) >= static_cast<uint64_t>(s.patches);
      named += id == number;
    }
    named = __reduce_add_sync(kAll, named);
    bad = __any_sync(kAll, bad) || named > 1;
    T* out = w.gradient ? w.gradient + row * s.values : nullptr;
    float loss = bad ? NAN : 0.0f;
    if (bad || named == 0) {
      if (out) fill(out, s.values, loss, prediction_vectors);
    } else {
      const int y = static_cast<int>(number) / s.across, x = static_cast<int>(number) - y * s.across;
      const Image* corner = w.images + image * (3 * static_cast<int64_t>(s.plane)) + (y * s.width + x) * s.patch_size;
      const T* prediction = w.predictions + row * s.values;
      if constexpr (octets)
        loss = by_octets(s, corner, prediction, out, factor, staged[threadIdx.x / kWarp]);
      else
        loss = by_pixels(s, corner, prediction, out, factor);
      loss *= 1.0f / s.values;
    }
    if (w.losses && lane == 0) w.losses[row] = loss;
  }
}

// Always the same order, so the sum is the same to the bit. `losses` begin at a multiple of 16 bytes.
__global__ void __launch_bounds__(1024) sum_kernel(const float* losses, int64_t count, float* sum) {
  __shared__ float partial[kWarp];
  float mine[4] = {};
  const int64_t whole = count / 4 * 4, step = blockDim.x * 4;
#pragma unroll 8
  for (int64_t i = threadIdx.x * 4; i < whole; i += step) {
    const Vector<float> v = load_vector(losses + i);
#pragma unroll
    for (int k = 0; k < 4; k++) mine[k] += v.values[k];
  }
  if (whole + threadIdx.x < count) mine[0] += losses[whole + threadIdx.x];
  const float total = block_sum((mine[0] + mine[1]) + (mine[2] + mine[3]), partial);
  if (threadIdx.x == 0) *sum = total;
}

template <class F>
void with_image_type(const Tensor& images, F&& f) {
  if (images.scalar_type() == ScalarType::Byte) return f(uint8_t{});
  with_type(images, f);
}

bool is_aligned(const void* p, int64_t row_bytes, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0 && row_bytes % bytes == 0;
}

// Forward: `incoming` null. Backward: `losses` null.
void launch_patches(const Tensor& images, const Tensor& predictions, const Tensor& masked_ids, int64_t patch_size,
                    bool norm_pix, const std::vector<double>& mean, const std::vector<double>& std, const float* incoming,
                    void* gradient, float* losses, cudaStream_t stream) {
  const int64_t height = images.size(2), width = images.size(3), patches = height / patch_size * (width / patch_size);
  const int64_t values = 3 * patch_size * patch_size, rows = predictions.size(1), total = images.size(0) * rows;
  const int64_t plane = height * width, most = 0x7fffffff;
  STD_TORCH_CHECK(total <= most && 3 * plane <= most && masked_ids.size(1) <= most,
                  "megamug: more than 2^31 - 1 patches in one call, or values in an image");
  if (total == 0) return;
  Shape s{patches,
          static_cast<int>(masked_ids.size(1)),
          static_cast<int>(rows),
          static_cast<int>(width),
          static_cast<int>(plane),
          static_cast<int>(patch_size),
          static_cast<int>(values),
          static_cast<int>(width / patch_size),
          rows == patches,
          norm_pix,
          {},
          {}};
  pixel_transform(mean, std, s.scale, s.shift);
  with_image_type(images, [&](auto pixel) {
    with_type(predictions, [&](auto zero) {
      using Image = decltype(pixel);
      using T = decltype(zero);
      const int64_t bytes = sizeof(Image);
      const bool prediction_vectors = is_aligned(predictions.const_data_ptr(), values * sizeof(T), 16) &&
                                      is_aligned(gradient, values * sizeof(T), 16);
      const bool octets = (patch_size == 8 || patch_size == 16) && prediction_vectors &&
                          is_aligned(images.const_data_ptr(), width * bytes, bytes == 1 ? 8 : 16);
      const Work<Image, T> work{static_cast<const Image*>(images.const_data_ptr()),
                                static_cast<const T*>(predictions.const_data_ptr()),
                                masked_ids.const_data_ptr<int64_t>(),
                                total,
                                incoming,
                                static_cast<T*>(gradient),
                                losses,
                                s};
      const auto kernel = octets ? patch_kernel<Image, T, true> : patch_kernel<Image, T, false>;
      const int64_t blocks = (total + kThreads / kWarp - 1) / (kThreads / kWarp);
      kernel<<<std::min<int64_t>(blocks, incoming ? kBlocksOfBackward : kMostBlocks), kThreads, 0, stream>>>(
          work, prediction_vectors);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> masked_patch(const Tensor& images, const Tensor& predictions, const Tensor& masked_ids,
                                        int64_t patch_size, bool norm_pix, std::vector<double> mean,
                                        std::vector<double> std, bool with_gradient) {
  check_patches(images, predictions, masked_ids, patch_size, mean, std);
  const Launch launch(images);
  const int64_t batch = images.size(0), rows = predictions.size(1);
  const std::vector<int64_t> gradient_size{with_gradient ? batch : 0, rows, predictions.size(2)};
  Tensor gradient = torch::stable::new_empty(predictions, gradient_size);
  Tensor sum = empty_floats({}, predictions), losses = empty_floats({batch * rows}, predictions);
  float* losses_p = losses.mutable_data_ptr<float>();
  launch_patches(images, predictions, masked_ids, patch_size, norm_pix, mean, std, nullptr,
                 with_gradient ? gradient.mutable_data_ptr() : nullptr, losses_p, launch.stream());
  sum_kernel<<<1, 1024, 0, launch.stream()>>>(losses_p, batch * rows, sum.mutable_data_ptr<float>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {sum, gradient};
}

void masked_patch_gradient_(const Tensor& gradient, const Tensor& images, const Tensor& predictions,
                            const Tensor& masked_ids, int64_t patch_size, bool norm_pix, std::vector<double> mean,
                            std::vector<double> std, const Tensor& incoming) {
  check_patches(images, predictions, masked_ids, patch_size, mean, std);
  check_patch_gradient(gradient, predictions, incoming);
  const Launch launch(images);
  launch_patches(images, predictions, masked_ids, patch_size, norm_pix, mean, std, incoming.const_data_ptr<float>(),
                 gradient.mutable_data_ptr(), nullptr, launch.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megamug, CUDA, m) {
  m.impl("masked_patch", TORCH_BOX(&masked_patch));
  m.impl("masked_patch_gradient_", TORCH_BOX(&masked_patch_gradient_));
}

}  // namespace megamug
