// The operator `draw_`: its schema and its CPU form.
#include "../draw_slice.h"

#include <algorithm>
#include <cstring>

#include "draw_run.h"
#include "kernels/kernels.h"

namespace megamug {
namespace {

DrawRun* draw_run() {
#if defined(__x86_64__)
  const char* name = kernels().name;
  if (!std::strcmp(name, "avx512_bf16")) return draw_run_avx512_bf16;
  if (!std::strcmp(name, "avx512")) return draw_run_avx512;
  if (!std::strcmp(name, "avx2")) return draw_run_avx2;
#endif
  return draw_run_generic;
}

void draw_(const Tensor& out, int64_t key0, int64_t key1, bool normal, double scale, double mass,
           std::vector<int64_t> shape, std::vector<int64_t> offset) {
  const Slice s = slice_of(out, shape, offset);
  const Distribution d = distribution_of(key0, key1, normal, scale, mass);
  if (s.rows * s.run == 0) return;
  const bool bfloat16 = out.scalar_type() == ScalarType::BFloat16;
  const int64_t bytes = bfloat16 ? 2 : 4, pieces = (s.run + kRun - 1) / kRun;  // of a row
  auto* data = static_cast<char*>(out.mutable_data_ptr());
  DrawRun* const run = draw_run();
  const int64_t grain = std::max<int64_t>(1, 16384 / std::min(s.run, kRun));
  torch::stable::parallel_for(0, s.rows * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = i / pieces, done = i % pieces * kRun;
      run(d, start_of(s, row) + done, std::min(kRun, s.run - done), bfloat16, data + (row * s.run + done) * bytes);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megamug, m) {
  m.def(
      "draw_(Tensor(a!) out, int key0, int key1, bool normal, float scale, float mass, int[] shape, int[] offset) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megamug, CPU, m) { m.impl("draw_", TORCH_BOX(&draw_)); }

}  // namespace megamug
