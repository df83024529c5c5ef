// Vectors of 16 bytes, conversions, reductions over a block, and the launch context of an operator.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <type_traits>

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

// As four words: of a struct of small values the compiler would make as many small loads and stores.
template <class T>
__device__ inline Vector<T> load_vector(const T* p) {
  Vector<T> v;
  reinterpret_cast<uint4&>(v) = *reinterpret_cast<const uint4*>(p);
  return v;
}
__device__ inline void store_words(void* p, uint4 w) {  // to global memory; spelt out, or halves are stored at times
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
}
template <class T>
__device__ inline void store_vector(T* p, const Vector<T>& v) {
  store_words(p, reinterpret_cast<const uint4&>(v));
}

// The values as floats, and floats rounded to values: pairs at a time, one instruction a value or a pair.
template <class T>
__device__ inline void unpack(const Vector<T>& v, float (&x)[Vector<T>::size]) {
  const uint4& words = reinterpret_cast<const uint4&>(v);
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(word[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      x[2 * i] = __uint_as_float(word[i] << 16);
      x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    } else {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word[i]));
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  }
}
template <class T>
__device__ inline Vector<T> pack(const float (&x)[Vector<T>::size]) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4) {
      word[i] = __float_as_uint(x[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      word[i] = reinterpret_cast<const uint32_t&>(pair);
    } else {
      const __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
      word[i] = reinterpret_cast<const uint32_t&>(pair);
    }
  }
  Vector<T> v;
  reinterpret_cast<uint4&>(v) = make_uint4(word[0], word[1], word[2], word[3]);
  return v;
}

// 2^x by the special-function unit: 2 ulp; -inf gives 0, NaN stays NaN.
__device__ inline float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The largest of some vectors, two at a time where there are two in a register; NaN is passed over.
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline __nv_bfloat162 larger(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2(a, b); }
__device__ inline __half2 larger(__half2 a, __half2 b) { return __hmax2(a, b); }
template <class T>
struct Packed {
  using type = T;
};
template <>
struct Packed<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <>
struct Packed<__half> {
  using type = __half2;
};
template <class T, int n>
__device__ inline float largest(const Vector<T> (&v)[n]) {
  using P = typename Packed<T>::type;
  constexpr int packs = 16 / sizeof(P);
  P most = reinterpret_cast<const P*>(v[0].values)[0];
#pragma unroll
  for (int k = 0; k < n; k++)
#pragma unroll
    for (int i = 0; i < packs; i++) most = larger(most, reinterpret_cast<const P*>(v[k].values)[i]);
  if constexpr (sizeof(P) == sizeof(T))
    return most;
  else
    return fmaxf(to_float(most.x), to_float(most.y));
}

__device__ inline float warp_sum(float x) {
  for (int offset = kWarp / 2; offset; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

__device__ inline float warp_maximum(float x) {
  for (int offset = kWarp / 2; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
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
