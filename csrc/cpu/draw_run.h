// The CPU kernel of `draw_`, compiled once for each instruction set.
#pragma once

#include "../draw.h"

namespace megamug {

constexpr int64_t kRun = 512;  // elements that draw_run fills at most

// Elements first, first + 1, ... of a parameter, as float32 or bfloat16.
using DrawRun = void(const Distribution& d, int64_t first, int64_t count, bool bfloat16, void* out);

DrawRun draw_run_generic, draw_run_avx2, draw_run_avx512, draw_run_avx512_bf16;

}  // namespace megamug
