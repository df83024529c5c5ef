// Masked-patch loss and gradient: one block a patch of the grid, one pass over image and predictions.
#include "common.cuh"

namespace megamug {
namespace {

constexpr int kThreads = 96;  // one 16-byte vector of a 16 x 16 patch in bfloat16 each
constexpr int kSharedLimit = 160 * 1024;

struct Shape {
  int64_t patches, masked, height, width;
  int patch_size, values, across;
  bool all, norm_pix;
  float scale[3], shift[3];
};

// order[b, n]: the place of patch n among the masked ones of image b; it comes in as -1 everywhere. A number outside the
// grid or named twice raises `bad`.
__global__ void order_kernel(const int64_t* ids, int masked, int64_t patches, int* order, int* bad) {
  for (int m = threadIdx.x; m < masked; m += blockDim.x) {
    const int64_t n = ids[blockIdx.x * static_cast<int64_t>(masked) + m];
    if (n < 0 || n >= patches || atomicCAS(order + blockIdx.x * patches + n, -1, m) != -1) *bad = 1;
  }
}

// The patch as floats in shared memory, channel by channel: that order needs no arithmetic to write and none of the sums
// minds it. `vectors`: rows of a patch are whole 16-byte vectors.
template <class Image>
__device__ void stage(const Image* image, const Shape& s, int patch, bool vectors, float* staged) {
  const int p = s.patch_size, area = p * p;
  const Image* corner = image + patch / s.across * static_cast<int64_t>(p) * s.width + patch % s.across * p;
  const int step = vectors ? Vector<Image>::size : 1;
  for (int i = threadIdx.x * step; i < s.values; i += blockDim.x * step) {
    const int channel = i / area, y = i % area / p, x = i % p;
    const Image* start = corner + (channel * s.height + y) * s.width + x;
    const float scale = s.scale[channel], shift = s.shift[channel];
    if (vectors) {
      const Vector<Image> v = load_vector(start);
#pragma unroll
      for (int k = 0; k < Vector<Image>::size; k++) staged[i + k] = to_float(v.values[k]) * scale + shift;
    } else {
      staged[i] = to_float(*start) * scale + shift;
    }
  }
}

template <class Image, class T, bool with_gradient>
__global__ void __launch_bounds__(kThreads)
    patch_kernel(const Image* images, const T* predictions, const int* order, const __grid_constant__ Shape s,
                 bool image_vectors, bool prediction_vectors, T* gradient, float* losses) {
  extern __shared__ float staged[];
  __shared__ float partial[kThreads / kWarp];
  const int64_t image = blockIdx.x / s.patches;
  const int patch = static_cast<int>(blockIdx.x % s.patches), place = order[blockIdx.x], area = s.patch_size * s.patch_size;
  const int64_t row = s.all ? static_cast<int64_t>(blockIdx.x) : image * s.masked + place;
  const int step = prediction_vectors ? Vector<T>::size : 1;
  if (place < 0) {  // not masked: nothing to predict
    if (with_gradient && s.all) {
      T* out = gradient + row * s.values;
      for (int i = threadIdx.x * step; i < s.values; i += blockDim.x * step) {
        if (prediction_vectors)
          *reinterpret_cast<uint4*>(out + i) = make_uint4(0, 0, 0, 0);
        else
          out[i] = from_float<T>(0.0f);
      }
    }
    return;
  }
  const T* prediction = predictions + row * s.values;
  for (int i = threadIdx.x * step; i < s.values; i += blockDim.x * step)  // on their way while the image is summed up
    asm volatile("prefetch.global.L2 [%0];" ::"l"(prediction + i));
  stage(images + image * 3 * s.height * s.width, s, patch, image_vectors, staged);
  __syncthreads();

  // Sums of differences to the first value, so that a patch of one colour has variance 0, not rounding noise.
  float first = 0, mean = 0, scale = 1;
  if (s.norm_pix) {
    first = staged[0];
    float sum = 0, squares = 0;
    for (int i = threadIdx.x; i < s.values; i += blockDim.x) sum += staged[i] - first;
    mean = block_sum(sum, partial) / s.values;
    for (int i = threadIdx.x; i < s.values; i += blockDim.x) {
      const float d = staged[i] - first - mean;
      squares += d * d;
    }
    scale = 1.0f / sqrtf(block_sum(squares, partial) / (s.values - 1) + 1e-6f);
  }

  const float twice = 2.0f / s.values;
  T* out = gradient + (with_gradient ? row * s.values : 0);
  float squares = 0;
  const auto difference = [&](T predicted, int i) {  // value i of the row: channel i % 3 of pixel i / 3
    const float d = to_float(predicted) - (staged[i % 3 * area + i / 3] - first - mean) * scale;
    squares += d * d;
    return from_float<T>(d * twice);
  };
  for (int i = threadIdx.x * step; i < s.values; i += blockDim.x * step) {
    if (prediction_vectors) {
      Vector<T> v = load_vector(prediction + i);
#pragma unroll
      for (int k = 0; k < Vector<T>::size; k++) v.values[k] = difference(v.values[k], i + k);
      if constexpr (with_gradient) store_vector(out + i, v);
    } else {
      const T value = difference(prediction[i], i);
      if constexpr (with_gradient) out[i] = value;
    }
  }
  const float total = block_sum(squares, partial);
  if (threadIdx.x == 0) losses[image * s.masked + place] = total / s.values;
}

// Always the same order, so the sum is the same to the bit. NaN if the patch numbers were bad.
__global__ void sum_kernel(const float* losses, int64_t count, const int* bad, float* sum) {
  __shared__ float partial[kWarp];
  float mine = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) mine += losses[i];
  const float total = block_sum(mine, partial);
  if (threadIdx.x == 0) *sum = *bad ? NAN : total;
}

template <class F>
void with_image_type(const Tensor& images, F&& f) {
  if (images.scalar_type() == ScalarType::Byte) return f(uint8_t{});
  with_type(images, f);
}

bool is_vectorable(const void* p, int64_t row_bytes) { return reinterpret_cast<uintptr_t>(p) % 16 == 0 && row_bytes % 16 == 0; }

std::tuple<Tensor, Tensor> masked_patch(const Tensor& images, const Tensor& predictions, const Tensor& masked_ids,
                                        int64_t patch_size, bool norm_pix, std::vector<double> mean,
                                        std::vector<double> std, bool with_gradient) {
  check_patches(images, predictions, masked_ids, patch_size, mean, std);
  const Launch launch(images);
  const int64_t batch = images.size(0), height = images.size(2), width = images.size(3), masked = masked_ids.size(1);
  const int64_t patches = (height / patch_size) * (width / patch_size), values = 3 * patch_size * patch_size;
  STD_TORCH_CHECK(values * 4 <= kSharedLimit, "megamug: patches of ", patch_size,
                  " do not fit the CUDA kernel's shared memory; use impl='torch'");
  STD_TORCH_CHECK(batch * patches <= 0x7fffffff, "megamug: more than 2^31 - 1 patches in one call");
  const bool all = predictions.size(1) == patches;
  const std::vector<int64_t> gradient_size{with_gradient ? batch : 0, predictions.size(1), values};
  const std::vector<int64_t> order_size{batch * patches + 1};  // and the flag of bad numbers
  Tensor gradient = torch::stable::new_empty(predictions, gradient_size);
  Tensor sum = empty_floats({}, predictions), losses = empty_floats({batch * masked}, predictions);
  Tensor order = torch::stable::new_empty(masked_ids, order_size, ScalarType::Int);
  int *order_p = order.mutable_data_ptr<int>(), *bad = order_p + batch * patches;
  float* losses_p = losses.mutable_data_ptr<float>();
  STD_CUDA_CHECK(cudaMemsetAsync(order_p, 0xff, batch * patches * sizeof(int), launch.stream()));
  STD_CUDA_CHECK(cudaMemsetAsync(bad, 0, sizeof(int), launch.stream()));
  // a place that no patch takes, because another number was bad, must not hold stale bytes
  STD_CUDA_CHECK(cudaMemsetAsync(losses_p, 0, batch * masked * sizeof(float), launch.stream()));
  if (batch > 0)
    order_kernel<<<batch, 128, 0, launch.stream()>>>(masked_ids.const_data_ptr<int64_t>(), static_cast<int>(masked),
                                                     patches, order_p, bad);
  Shape s{patches, masked, height, width, static_cast<int>(patch_size), static_cast<int>(values),
          static_cast<int>(width / patch_size), all, norm_pix, {}, {}};
  pixel_transform(mean, std, s.scale, s.shift);
  with_image_type(images, [&](auto pixel) {
    with_type(predictions, [&](auto zero) {
      using Image = decltype(pixel);
      using T = decltype(zero);
      const int64_t bytes = sizeof(Image);
      const bool image_vectors = is_vectorable(images.const_data_ptr(), patch_size * bytes) && width * bytes % 16 == 0;
      const bool prediction_vectors = is_vectorable(predictions.const_data_ptr(), values * sizeof(T));
      const auto kernel = with_gradient ? patch_kernel<Image, T, true> : patch_kernel<Image, T, false>;
      const int shared = static_cast<int>(values * sizeof(float));
      if (shared > 48 * 1024)
        STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
      if (batch * patches > 0)
        kernel<<<batch * patches, kThreads, shared, launch.stream()>>>(
            static_cast<const Image*>(images.const_data_ptr()), static_cast<const T*>(predictions.const_data_ptr()),
            order_p, s, image_vectors, prediction_vectors,
            with_gradient ? static_cast<T*>(gradient.mutable_data_ptr()) : nullptr, losses_p);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  sum_kernel<<<1, 1024, 0, launch.stream()>>>(losses_p, batch * masked, bad, sum.mutable_data_ptr<float>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {sum, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megamug, CUDA, m) { m.impl("masked_patch", TORCH_BOX(&masked_patch)); }

}  // namespace megamug
