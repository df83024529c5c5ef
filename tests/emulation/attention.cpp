// The CUDA kernels of attention, run block by block on a CPU for tests/models/attention/test_gpu.py.
#include "block.h"

namespace megamug {
alignas(128) uint4 attention_shared[256 * 1024 / 16];
}

#include "../../csrc/cuda/attention.cuh"

using namespace megamug;
using T = BFloat16;

namespace {

// `packed` has three parts a head, or two and queries of their own.
struct Sizes {
  int queries, keys, batch, heads, width, parts;
};

Heads<T> part_of(void* packed, const Sizes& s, int part) {
  const int64_t head = s.parts * s.width, batch = s.heads * head;
  return {static_cast<T*>(packed) + part * s.width, s.batch * batch, batch, head};
}
Heads<T> joined_heads_of(void* context, const Sizes& s) {
  return {static_cast<T*>(context), int64_t{s.batch} * s.heads * s.width, int64_t{s.heads} * s.width, s.width};
}
Heads<T> query_of(void* query, const Sizes& s) {
  return s.parts == 3 ? part_of(query, s, 0) : joined_heads_of(query, s);
}
Heads<const T> read(const Heads<T>& h) { return {h.start, h.token, h.batch, h.head}; }

template <class Body>
void blocks(const Sizes& s, int warps, int bytes, bool descending, Body body) {
  emulation::shared_start = reinterpret_cast<char*>(attention_shared);
  emulation::shared_bytes = bytes;
  const int all = sizeof attention_shared;
  if (bytes > all) emulation::fail("too much shared memory");
  for (int b = 0; b < s.batch * s.heads; b++) {
    std::memset(attention_shared, 0xff, all);  // NaN of either type
    emulation::run(b, warps * 32, descending, body);
    for (int i = bytes; i < smaller(bytes + 4096, all); i++)
      if (emulation::shared_start[i] != char(0xff)) emulation::fail("a store outside of shared memory");
  }
}

template <int width>
int forward(const AttentionForward<T>& p, const Sizes& s, int warps, bool descending) {
  const int bytes = forward_bytes(s.queries, s.keys, width);
  blocks(s, warps, bytes, descending, [&] { attention_forward_kernel<T, width>(p); });
  return bytes;
}

template <int width, int owned>
int backward(const AttentionBackward<T>& p, const Sizes& s, bool descending) {
  const int bytes = backward_bytes(s.queries, s.keys, width, p.block_tiles);
  const int warps = (tiles_of(s.keys) + owned - 1) / owned;
  if (warps > backward_warps(owned)) emulation::fail("too many warps");
  blocks(s, warps, bytes, descending, [&] { attention_backward_kernel<T, width, owned>(p); });
  return bytes;
}

}  // namespace

extern "C" {

// Returns the bytes of shared memory a block took; 0 if there is no such kernel.
int emulate_forward(void* query, void* packed, void* context, float* logsumexp, int queries, int keys, int batch,
                    int heads, int width, int parts, float scale, bool causal, int warps, bool descending) {
  const Sizes s{queries, keys, batch, heads, width, parts};
  AttentionForward<T> p{};
  p.query = read(query_of(query, s));
  p.key = read(part_of(packed, s, parts - 2)), p.value = read(part_of(packed, s, parts - 1));
  p.context = joined_heads_of(context, s), p.logsumexp = logsumexp;
  p.queries = queries, p.keys = keys, p.heads = heads, p.scale = scale, p.causal = causal;
  switch (width) {
    case 32: return forward<32>(p, s, warps, descending);
    case 64: return forward<64>(p, s, warps, descending);
    case 80: return forward<80>(p, s, warps, descending);
    case 96: return forward<96>(p, s, warps, descending);
    case 128: return forward<128>(p, s, warps, descending);
  }
  return 0;
}

int emulate_backward(void* gradient, void* query, void* packed, void* context, float* logsumexp, void* query_gradient,
                     void* packed_gradient, int queries, int keys, int batch, int heads, int width, int parts,
                     float scale, bool causal, int owned, int block_tiles, bool descending) {
  const Sizes s{queries, keys, batch, heads, width, parts};
  AttentionBackward<T> p{};
  p.query = read(query_of(query, s));
  p.key = read(part_of(packed, s, parts - 2)), p.value = read(part_of(packed, s, parts - 1));
  p.context = read(joined_heads_of(context, s)), p.gradient = read(joined_heads_of(gradient, s));
  p.query_gradient = query_of(query_gradient, s);
  p.key_gradient = part_of(packed_gradient, s, parts - 2), p.value_gradient = part_of(packed_gradient, s, parts - 1);
  p.logsumexp = logsumexp, p.queries = queries, p.keys = keys, p.heads = heads, p.scale = scale, p.causal = causal;
  p.block_tiles = block_tiles;
  switch (width * 10 + owned) {
    case 321: return backward<32, 1>(p, s, descending);
    case 322: return backward<32, 2>(p, s, descending);
    case 323: return backward<32, 3>(p, s, descending);
    case 641: return backward<64, 1>(p, s, descending);
    case 642: return backward<64, 2>(p, s, descending);
    case 801: return backward<80, 1>(p, s, descending);
    case 961: return backward<96, 1>(p, s, descending);
    case 1281: return backward<128, 1>(p, s, descending);
  }
  return 0;
}

// Bank conflicts of ldmatrix since the last call.
int take_conflicts() {
  const int result = static_cast<int>(emulation::conflicts);
  emulation::conflicts = 0;
  return result;
}
}
