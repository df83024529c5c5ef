// Vectors of 16 bytes, conversions, reductions over a block, and the launch context of an operator.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../operators.h"

namespace megamug {

constexpr int kWarp = 32;

template <class T>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(T);
  T values[size];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(uint8_t x) { return static_cast<float>(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }

template <class T>
__device__ inline Vector<T> load_vector(const T* p) { return *reinterpret_cast<const Vector<T>*>(p); }
template <class T>
__device__ inline void store_vector(T* p, const Vector<T>& v) { *reinterpret_cast<Vector<T>*>(p) = v; }

// exp by the special-function unit: 2 ulp, and |x| 6e-8 from the product; -inf gives 0, NaN stays NaN.
__device__ inline float exponential(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504088896341f));
  return result;
}

__device__ inline float warp_sum(float x) {
  for (int offset = kWarp / 2; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// The same sum in every thread, in a fixed order. `shared` holds one float a warp; safe to call again at once.
__device__ inline float block_sum(float x, float* shared) {
  x = warp_sum(x);
  const int warps = blockDim.x / kWarp;
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < warps; w++) total += shared[w];
  __syncthreads();
  return total;
}

// The current stream of the tensor's device, and that device as the current one while this lives.
class Launch {
 public:
  explicit Launch(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Calls f with a value of the element type of `t`.
template <class F>
void with_type(const Tensor& t, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    case ScalarType::Half: return f(__half{});
    case ScalarType::Float: return f(float{});
    default: STD_TORCH_CHECK(false, "megamug: float32, bfloat16 or float16 is wanted");
  }
}

}  // namespace megamug
