// The attention operators on CUDA: checks, memory, which kernel with how many warps. The kernels are in attention.cuh.
#include "warp.cuh"
// after what it is written on
#include "attention.cuh"

namespace megamug {
namespace {

// Tiles of keys that a warp of backward has at most, and keys whose gradients a block can hold.
constexpr int most_owned(int width) { return width <= 32 ? 3 : width <= 64 ? 2 : 1; }
constexpr int most_keys(int width) { return most_owned(width) * backward_warps(most_owned(width)) * kTile; }

// ---- arguments ----

template <class T>
T* start_of(const Tensor& t) {
  if constexpr (std::is_const_v<T>)
    return static_cast<T*>(t.const_data_ptr());
  else
    return static_cast<T*>(t.mutable_data_ptr());
}
// A part of a packed projection [tokens, batch, heads, parts, width]; part 0 of queries, [tokens, batch, heads, width].
template <class T>
Heads<T> part_of(const Tensor& t, int part) {
  return {start_of<T>(t) + part * t.stride(3), t.stride(0), t.stride(1), t.stride(2)};
}
// The heads of [tokens, batch, heads * width].
template <class T>
Heads<T> joined_heads_of(const Tensor& t, int64_t width) {
  return {start_of<T>(t), t.stride(0), t.stride(1), width};
}

// What attends to what. `packed` holds queries, keys and values, or keys and values behind queries of their own.
struct Sources {
  const Tensor& query;
  const Tensor& packed;
  int key;  // the part of `packed` that is the keys; the next one is the values

  int64_t queries() const { return query.size(0); }
  int64_t keys() const { return packed.size(0); }
  int64_t batch() const { return packed.size(1); }
  int64_t heads() const { return packed.size(2); }
  int64_t width() const { return packed.size(4); }
};

void check(const Tensor& t, const char* name, int64_t axes, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == axes && t.is_cuda() && t.get_device_index() == like.get_device_index() &&
                      t.scalar_type() == like.scalar_type() &&
                      (t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half),
                  "megamug: ", name, " must be bfloat16 or float16 with ", axes, " axes, all on one CUDA device");
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(axes - 1) == 1;
  for (int64_t i = 0; i + 1 < axes; i++) aligned = aligned && (t.stride(i) % 8 == 0 || t.size(i) <= 1);
  STD_TORCH_CHECK(aligned, "megamug: rows of ", name, " must be contiguous and begin at multiples of 16 bytes");
}

void check(const Sources& s, double scale) {
  check(s.packed, "the packed projection", 5, s.packed);
  STD_TORCH_CHECK(s.packed.size(3) == s.key + 2, "megamug: the packed projection must be [tokens, batch, heads, ",
                  s.key + 2, ", width]");
  if (s.key == 0) {
    check(s.query, "the query", 4, s.packed);
    STD_TORCH_CHECK(s.query.size(1) == s.batch() && s.query.size(2) == s.heads() && s.query.size(3) == s.width(),
                    "megamug: batch, heads and width of the query must be those of keys and values");
  }
  const int64_t width = s.width();
  STD_TORCH_CHECK(width == 32 || width == 64 || width == 80 || width == 96 || width == 128,
                  "megamug: attention on CUDA takes heads 32, 64, 80, 96 or 128 wide, not ", width);
  const int64_t most = most_keys(static_cast<int>(width)), tokens = s.queries() > s.keys() ? s.queries() : s.keys();
  STD_TORCH_CHECK(s.keys() > 0 && tokens <= most, "megamug: attention on CUDA takes 1 to ", most, " tokens with heads ",
                  width, " wide, not ", tokens);
  STD_TORCH_CHECK(s.batch() * s.heads() <= 0x7fffffff, "megamug: more than 2^31 - 1 heads in one call");
  STD_TORCH_CHECK(scale > 0, "megamug: the scale of attention must be positive");
}

// ---- launching ----

template <class Kernel>
void allow_shared(Kernel kernel, int bytes, int limit, int tokens) {
  STD_TORCH_CHECK(bytes <= limit, "megamug: attention of ", tokens, " tokens needs ", bytes,
                  " bytes of shared memory, and a block of this device has at most ", limit);
  if (bytes > 48 * 1024)
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

template <class T, int width>
void launch(const AttentionForward<T>& p, int64_t blocks, cudaStream_t stream, int limit) {
  const int tiles = tiles_of(p.queries), rounds = (tiles + kForwardWarps - 1) / kForwardWarps;
  const int warps = (tiles + rounds - 1) / rounds;  // the fewest that need no more rounds
  const int bytes = forward_bytes(p.queries, p.keys, width);
  const auto kernel = attention_forward_kernel<T, width>;
  allow_shared(kernel, bytes, limit, larger(p.queries, p.keys));
  kernel<<<blocks, warps * kWarp, bytes, stream>>>(p);
}

template <class T, int width, int owned = 1>
void launch(AttentionBackward<T> p, int64_t blocks, cudaStream_t stream, int limit) {
  if constexpr (owned < most_owned(width))
    if (p.keys > owned * backward_warps(owned) * kTile) return launch<T, width, owned + 1>(p, blocks, stream, limit);
  const int warps = (tiles_of(p.keys) + owned - 1) / owned;
  const auto bytes = [&] { return backward_bytes(p.queries, p.keys, width, p.block_tiles); };
  // of the gradient of queries a warp takes a tile, or half of one where that lets two blocks share a multiprocessor
  p.block_tiles = smaller(owned == 3 ? warps / 2 : warps, tiles_of(p.queries));
  while (p.block_tiles > 1 && bytes() > limit) p.block_tiles--;
  const auto kernel = attention_backward_kernel<T, width, owned>;
  allow_shared(kernel, bytes(), limit, larger(p.queries, p.keys));
  kernel<<<blocks, warps * kWarp, bytes(), stream>>>(p);
}

template <class Problem>
void launch(const Problem& p, const Sources& s) {
  using T = typename Problem::Number;
  const int64_t blocks = s.batch() * s.heads();
  if (blocks == 0) return;
  const Launch where(s.packed);
  int limit = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, s.packed.get_device_index()));
  switch (s.width()) {
    case 32: launch<T, 32>(p, blocks, where.stream(), limit); break;
    case 64: launch<T, 64>(p, blocks, where.stream(), limit); break;
    case 80: launch<T, 80>(p, blocks, where.stream(), limit); break;
    case 96: launch<T, 96>(p, blocks, where.stream(), limit); break;
    case 128: launch<T, 128>(p, blocks, where.stream(), limit); break;
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class F>
void with_half_type(const Tensor& t, F&& f) {
  t.scalar_type() == ScalarType::BFloat16 ? f(__nv_bfloat16{}) : f(__half{});
}

// ---- operators ----

std::tuple<Tensor, Tensor> forward(const Sources& s, bool causal, double scale) {
  check(s, scale);
  STD_TORCH_CHECK(s.queries() > 0, "megamug: attention on CUDA takes one query at least");
  const std::vector<int64_t> size{s.queries(), s.batch(), s.heads() * s.width()};
  Tensor context = torch::stable::new_empty(s.packed, size);
  Tensor logsumexp = empty_floats({s.batch(), s.heads(), s.queries()}, s.packed);
  with_half_type(s.packed, [&](auto zero) {
    using T = decltype(zero);
    AttentionForward<T> p{};
    p.query = part_of<const T>(s.query, 0);
    p.key = part_of<const T>(s.packed, s.key);
    p.value = part_of<const T>(s.packed, s.key + 1);
    p.context = joined_heads_of<T>(context, s.width());
    p.logsumexp = logsumexp.mutable_data_ptr<float>();
    p.queries = static_cast<int>(s.queries()), p.keys = static_cast<int>(s.keys());
    p.heads = static_cast<int>(s.heads()), p.scale = static_cast<float>(scale), p.causal = causal;
    launch(p, s);
  });
  return {context, logsumexp};
}

// Writes the gradients of the sources over `query_gradient` and `packed_gradient`, which have their shapes.
void backward(const Tensor& gradient, const Sources& s, const Tensor& context, const Tensor& logsumexp, bool causal,
              double scale, const Tensor& query_gradient, const Tensor& packed_gradient) {
  for (const Tensor& t : {gradient, context}) {
    check(t, "the context or its gradient", 3, s.packed);
    STD_TORCH_CHECK(t.size(0) == s.queries() && t.size(1) == s.batch() && t.size(2) == s.heads() * s.width(),
                    "megamug: the context and its gradient must be [queries, batch, heads * width]");
  }
  STD_TORCH_CHECK(logsumexp.dim() == 3 && logsumexp.size(0) == s.batch() && logsumexp.size(1) == s.heads() &&
                      logsumexp.size(2) == s.queries() && logsumexp.is_contiguous() && logsumexp.is_cuda() &&
                      logsumexp.get_device_index() == s.packed.get_device_index() &&
                      logsumexp.scalar_type() == ScalarType::Float,
                  "megamug: logsumexp must be contiguous float32 [batch, heads, queries]");
  with_half_type(s.packed, [&](auto zero) {
    using T = decltype(zero);
    AttentionBackward<T> p{};
    p.query = part_of<const T>(s.query, 0);
    p.key = part_of<const T>(s.packed, s.key);
    p.value = part_of<const T>(s.packed, s.key + 1);
    p.context = joined_heads_of<const T>(context, s.width());
    p.gradient = joined_heads_of<const T>(gradient, s.width());
    p.query_gradient = part_of<T>(query_gradient, 0);
    p.key_gradient = part_of<T>(packed_gradient, s.key);
    p.value_gradient = part_of<T>(packed_gradient, s.key + 1);
    p.logsumexp = logsumexp.const_data_ptr<float>();
    p.queries = static_cast<int>(s.queries()), p.keys = static_cast<int>(s.keys());
    p.heads = static_cast<int>(s.heads()), p.scale = static_cast<float>(scale), p.causal = causal;
    launch(p, s);
  });
}

Tensor empty_of(const Tensor& like) {
  std::vector<int64_t> size;
  for (int64_t i = 0; i < like.dim(); i++) size.push_back(like.size(i));
  return torch::stable::new_empty(like, size);
}

// mixed [s, b, n, 3, d] -> context [s, b, n * d], logsumexp [b, n, s]
std::tuple<Tensor, Tensor> packed_forward(const Tensor& mixed, bool causal, double scale) {
  return forward({mixed, mixed, 1}, causal, scale);
}

// -> the gradient of mixed
Tensor packed_backward(const Tensor& gradient, const Tensor& mixed, const Tensor& context, const Tensor& logsumexp,
                       bool causal, double scale) {
  const Sources s{mixed, mixed, 1};
  check(s, scale);
  Tensor result = empty_of(mixed);
  backward(gradient, s, context, logsumexp, causal, scale, result, result);
  return result;
}

// query [s, b, n, d], mixed [t, b, n, 2, d] -> context [s, b, n * d], logsumexp [b, n, s]
std::tuple<Tensor, Tensor> cross_forward(const Tensor& query, const Tensor& mixed, double scale) {
  return forward({query, mixed, 0}, false, scale);
}

// -> the gradients of query and mixed
std::tuple<Tensor, Tensor> cross_backward(const Tensor& gradient, const Tensor& query, const Tensor& mixed,
                                          const Tensor& context, const Tensor& logsumexp, double scale) {
  const Sources s{query, mixed, 0};
  check(s, scale);
  Tensor query_gradient = empty_of(query), packed_gradient = empty_of(mixed);
  backward(gradient, s, context, logsumexp, false, scale, query_gradient, packed_gradient);
  return {query_gradient, packed_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megamug, CUDA, m) {
  m.impl("packed_attention_forward", TORCH_BOX(&packed_forward));
  m.impl("packed_attention_backward", TORCH_BOX(&packed_backward));
  m.impl("cross_attention_forward", TORCH_BOX(&cross_forward));
  m.impl("cross_attention_backward", TORCH_BOX(&cross_backward));
}

}  // namespace megamug
