// The operator `draw_`: a thread a counter, four numbers.
#include "../draw_slice.h"
#include "common.cuh"

namespace megamug {
namespace {

constexpr int kThreads = 256;

__device__ inline double value(const Distribution& d, uint32_t word) {
  const double s = symmetric(word);
  if (!d.normal) return product(s, d.scale);
  const double q = product(s, d.mass);
  const double z = fabs(q) <= kCentral ? central_quantile(q) : copysign(tail_quantile(fabs(q)), q);
  return product(z, d.scale);
}

// `per_row`: counters that a row touches at most
template <class T>
__global__ void __launch_bounds__(kThreads)
    draw_kernel(const __grid_constant__ Distribution d, const __grid_constant__ Slice s, int64_t per_row, T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = i / per_row;
  if (row >= s.rows) return;
  const int64_t start = start_of(s, row), counter = start / kWords + (i - row * per_row);
  uint32_t words[kWords] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t key0 = d.key[0], key1 = d.key[1];
#pragma unroll
  for (int round = 0; round < kRounds; round++, key0 += kKeyStep0, key1 += kKeyStep1)
    philox_round(words[0], words[1], words[2], words[3], key0, key1);
#pragma unroll
  for (int k = 0; k < kWords; k++) {
    const int64_t place = counter * kWords + k - start;
    if (place >= 0 && place < s.run) out[row * s.run + place] = from_float<T>(static_cast<float>(value(d, words[k])));
  }
}

void draw_(const Tensor& out, int64_t key0, int64_t key1, bool normal, double scale, double mass,
           std::vector<int64_t> shape, std::vector<int64_t> offset) {
  const Slice s = slice_of(out, shape, offset);
  const Distribution d = distribution_of(key0, key1, normal, scale, mass);
  if (s.rows * s.run == 0) return;
  const int64_t per_row = (s.run + 2 * kWords - 2) / kWords;
  const int64_t blocks = (s.rows * per_row + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "megamug: draw_: more than 2^31 - 1 blocks in one call");
  const Launch launch(out);
  with_type(out, [&](auto zero) {
    using T = decltype(zero);
    draw_kernel<<<blocks, kThreads, 0, launch.stream()>>>(d, s, per_row, static_cast<T*>(out.mutable_data_ptr()));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megamug, CUDA, m) { m.impl("draw_", TORCH_BOX(&draw_)); }

}  // namespace megamug
