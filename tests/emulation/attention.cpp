// The CUDA kernels of attention, run block by block on a CPU for tests/models/test_gpu_attention.py.
#include "block.h"

namespace megamug {
alignas(128) uint4 attention_shared[256 * 1024 / 16];
}

#include "../../csrc/cuda/attention.cuh"

namespace megamug {
namespace {

struct Sizes {
  int tokens, batch, heads, width;
};

template <class T>
Heads<T> part_of(void* mixed, const Sizes& s, int part) {
  const int64_t head = 3 * s.width, batch = s.heads * head;
  return {static_cast<T*>(mixed) + part * s.width, s.batch * batch, batch, head};
}
template <class T>
Heads<T> joined_heads_of(void* context, const Sizes& s) {
  return {static_cast<T*>(context), int64_t{s.batch} * s.heads * s.width, int64_t{s.heads} * s.width, s.width};
}

template <class Body>
void blocks(const Sizes& s, int warps, int64_t bytes, bool descending, Body body) {
  emulation::shared_start = reinterpret_cast<char*>(attention_shared);
  emulation::shared_bytes = bytes;
  if (bytes > static_cast<int64_t>(sizeof attention_shared)) emulation::fail("too much shared memory");
  for (int b = 0; b < s.batch * s.heads; b++) {
    std::memset(attention_shared, 0xff, sizeof attention_shared);  // NaN of either type
    emulation::run(b, warps * 32, descending, body);
    for (int64_t i = bytes; i < bytes + 4096 && i < static_cast<int64_t>(sizeof attention_shared); i++)
      if (emulation::shared_start[i] != char(0xff)) emulation::fail("a store outside of shared memory");
  }
}

template <int width>
int64_t forward(void* mixed, void* context, float* logsumexp, const Sizes& s, float scale, bool causal, int warps,
                bool descending) {
  using T = BFloat16;
  const AttentionForward<T> p{part_of<const T>(mixed, s, 0), part_of<const T>(mixed, s, 1), part_of<const T>(mixed, s, 2),
                              joined_heads_of<T>(context, s), logsumexp, s.tokens, s.tokens, s.heads, scale, causal};
  const int64_t bytes = forward_bytes(s.tokens, s.tokens, width);
  blocks(s, warps, bytes, descending, [&] { attention_forward_kernel<T, width>(p); });
  return bytes;
}

template <int width, int owned>
int64_t backward(void* gradient, void* mixed, void* context, float* logsumexp, void* result, const Sizes& s, float scale,
                 bool causal, int block_tiles, bool descending) {
  using T = BFloat16;
  const AttentionBackward<T> p{part_of<const T>(mixed, s, 0),
                               part_of<const T>(mixed, s, 1),
                               part_of<const T>(mixed, s, 2),
                               joined_heads_of<const T>(context, s),
                               joined_heads_of<const T>(gradient, s),
                               part_of<T>(result, s, 0),
                               part_of<T>(result, s, 1),
                               part_of<T>(result, s, 2),
                               logsumexp,
                               s.tokens,
                               s.tokens,
                               s.heads,
                               scale,
                               causal,
                               block_tiles};
  const int64_t bytes = backward_bytes(s.tokens, s.tokens, width, block_tiles);
  const int warps = (tiles_of(s.tokens) + owned - 1) / owned;
  if (warps > backward_warps(owned)) emulation::fail("too many warps");
  blocks(s, warps, bytes, descending, [&] { attention_backward_kernel<T, width, owned>(p); });
  return bytes;
}

}  // namespace
}  // namespace megamug

extern "C" {

// Returns the bytes of shared memory a block took; 0 if there is no such kernel.
int64_t emulate_forward(void* mixed, void* context, float* logsumexp, int tokens, int batch, int heads, int width,
                        float scale, bool causal, int warps, bool descending) {
  const megamug::Sizes s{tokens, batch, heads, width};
  const auto call = [&](auto f) { return f(mixed, context, logsumexp, s, scale, causal, warps, descending); };
  switch (width) {
    case 32: return call(megamug::forward<32>);
    case 64: return call(megamug::forward<64>);
    case 80: return call(megamug::forward<80>);
    case 96: return call(megamug::forward<96>);
    case 128: return call(megamug::forward<128>);
  }
  return 0;
}

int64_t emulate_backward(void* gradient, void* mixed, void* context, float* logsumexp, void* result, int tokens, int batch,
                         int heads, int width, float scale, bool causal, int owned, int block_tiles, bool descending) {
  const megamug::Sizes s{tokens, batch, heads, width};
  const auto call = [&](auto f) {
    return f(gradient, mixed, context, logsumexp, result, s, scale, causal, block_tiles, descending);
  };
  switch (width * 10 + owned) {
    case 321: return call(megamug::backward<32, 1>);
    case 322: return call(megamug::backward<32, 2>);
    case 323: return call(megamug::backward<32, 3>);
    case 641: return call(megamug::backward<64, 1>);
    case 642: return call(megamug::backward<64, 2>);
    case 801: return call(megamug::backward<80, 1>);
    case 961: return call(megamug::backward<96, 1>);
    case 1281: return call(megamug::backward<128, 1>);
  }
  return 0;
}

// Bank conflicts of ldmatrix since the last call.
int64_t take_conflicts() {
  const int64_t result = emulation::conflicts;
  emulation::conflicts = 0;
  return result;
}
}
