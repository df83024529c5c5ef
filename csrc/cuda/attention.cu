// The attention operators on CUDA: checks, memory, and which kernel with how many warps; the kernels are in attention.cuh.
#include "warp.cuh"
// after what it is written on
#include "attention.cuh"

namespace megamug {
namespace {

// Tiles of keys that a warp has, and keys whose gradients a block can hold.
constexpr int most_owned(int width) { return width <= 32 ? 3 : width <= 64 ? 2 : 1; }
constexpr int most_keys(int width) { return most_owned(width) * backward_warps(most_owned(width)) * kTile; }

// Where the heads of a tensor [tokens, batch, heads, width] are.
template <class T>
Heads<T> heads_of(const Tensor& t) {
  if constexpr (std::is_const_v<T>)
    return {static_cast<T*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
  else
    return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}
// Query, key or value (part 0, 1, 2) of a packed projection [tokens, batch, heads, 3, width].
template <class T>
Heads<T> part_of(const Tensor& t, int part) {
  Heads<T> result{nullptr, t.stride(0), t.stride(1), t.stride(2)};
  if constexpr (std::is_const_v<T>)
    result.start = static_cast<T*>(t.const_data_ptr()) + part * t.stride(3);
  else
    result.start = static_cast<T*>(t.mutable_data_ptr()) + part * t.stride(3);
  return result;
}
// The heads of [tokens, batch, heads * width].
template <class T>
Heads<T> joined_heads_of(const Tensor& t, int64_t width) {
  if constexpr (std::is_const_v<T>)
    return {static_cast<T*>(t.const_data_ptr()), t.stride(0), t.stride(1), width};
  else
    return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0), t.stride(1), width};
}

void check(const Tensor& t, const char* name, int64_t axes, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == axes && t.is_cuda() && t.get_device_index() == like.get_device_index() &&
                      t.scalar_type() == like.scalar_type() &&
                      (t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half),
                  "megamug: ", name, " must be bfloat16 or float16 with ", axes, " axes, all tensors on one CUDA device");
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(axes - 1) == 1;
  for (int64_t i = 0; i + 1 < axes; i++) aligned = aligned && (t.stride(i) % 8 == 0 || t.size(i) == 1);
  STD_TORCH_CHECK(aligned, "megamug: rows of ", name, " must be contiguous and begin at multiples of 16 bytes");
}

void check_sizes(int64_t queries, int64_t keys, int64_t batch, int64_t heads, int64_t width, double scale) {
  STD_TORCH_CHECK(width == 32 || width == 64 || width == 80 || width == 96 || width == 128,
                  "megamug: attention on CUDA takes heads 32, 64, 80, 96 or 128 wide, not ", width);
  STD_TORCH_CHECK(keys > 0 && keys <= most_keys(width) && queries <= most_keys(width), "megamug: attention on CUDA takes 1 to ",
                  most_keys(width), " tokens with heads ", width, " wide, not ", larger(queries, keys));
  STD_TORCH_CHECK(batch * heads <= 0x7fffffff, "megamug: more than 2^31 - 1 heads in one call");
  STD_TORCH_CHECK(scale > 0, "megamug: the scale of attention must be positive");
}

void check_logsumexp(const Tensor& t, int64_t batch, int64_t heads, int64_t queries, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == batch && t.size(1) == heads && t.size(2) == queries && t.is_contiguous() &&
                      t.scalar_type() == ScalarType::Float && t.is_cuda() && t.get_device_index() == like.get_device_index(),
                  "megamug: logsumexp must be contiguous float32 [batch, heads, tokens]");
}

// ---- launching ----

template <class Kernel>
void allow_shared(Kernel kernel, int64_t bytes, int64_t limit, int tokens) {
  STD_TORCH_CHECK(bytes <= limit, "megamug: attention of ", tokens, " tokens needs ", bytes,
                  " bytes of shared memory, and a block of this device has at most ", limit);
  if (bytes > 48 * 1024)
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

template <class T, int width>
void launch(const AttentionForward<T>& p, int64_t blocks, cudaStream_t stream, int64_t limit) {
  const int tiles = tiles_of(p.queries), rounds = (tiles + kForwardWarps - 1) / kForwardWarps;
  const int warps = (tiles + rounds - 1) / rounds;  // the fewest that need no more rounds
  const int64_t bytes = forward_bytes(p.queries, p.keys, width);
  const auto kernel = attention_forward_kernel<T, width>;
  allow_shared(kernel, bytes, limit, larger(p.queries, p.keys));
  kernel<<<blocks, warps * kWarp, bytes, stream>>>(p);
}

template <class T, int width, int owned>
void launch_owned(AttentionBackward<T> p, int64_t blocks, cudaStream_t stream, int64_t limit) {
  const int warps = (tiles_of(p.keys) + owned - 1) / owned;
  const auto bytes = [&] { return backward_bytes(p.queries, p.keys, width, p.block_tiles); };
  p.block_tiles = smaller(owned == 3 ? warps / 2 : warps, tiles_of(p.queries));
  while (p.block_tiles > 1 && bytes() > limit) p.block_tiles--;
  const auto kernel = attention_backward_kernel<T, width, owned>;
  allow_shared(kernel, bytes(), limit, larger(p.queries, p.keys));
  kernel<<<blocks, warps * kWarp, bytes(), stream>>>(p);
}

template <class T, int width, int owned = 1>
void launch(const AttentionBackward<T>& p, int64_t blocks, cudaStream_t stream, int64_t limit) {
  if constexpr (owned < most_owned(width))
    if (p.keys > owned * backward_warps(owned) * kTile) return launch<T, width, owned + 1>(p, blocks, stream, limit);
  launch_owned<T, width, owned>(p, blocks, stream, limit);
}

template <class Problem>
void launch(const Problem& p, int64_t batch, int64_t width, const Tensor& like) {
  const int64_t blocks = batch * p.heads;
  if (blocks == 0 || p.queries == 0) return;
  const Launch context(like);
  int limit = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, like.get_device_index()));
  switch (width) {
    case 32: launch<typename Problem::Number, 32>(p, blocks, context.stream(), limit); break;
    case 64: launch<typename Problem::Number, 64>(p, blocks, context.stream(), limit); break;
    case 80: launch<typename Problem::Number, 80>(p, blocks, context.stream(), limit); break;
    case 96: launch<typename Problem::Number, 96>(p, blocks, context.stream(), limit); break;
    case 128: launch<typename Problem::Number, 128>(p, blocks, context.stream(), limit); break;
    default: STD_TORCH_CHECK(false, "megamug: no attention kernel for heads ", width, " wide");
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class F>
void with_half_type(const Tensor& t, F&& f) {
  t.scalar_type() == ScalarType::BFloat16 ? f(__nv_bfloat16{}) : f(__half{});
}

// ---- self-attention of a packed projection ----

void check_packed(const Tensor& mixed, double scale) {
  check(mixed, "the packed projection", 5, mixed);
  STD_TORCH_CHECK(mixed.size(3) == 3, "megamug: the packed projection must be [tokens, batch, heads, 3, width]");
  check_sizes(mixed.size(0), mixed.size(0), mixed.size(1), mixed.size(2), mixed.size(4), scale);
}

std::tuple<Tensor, Tensor> packed_forward(const Tensor& mixed, bool causal, double scale) {
  check_packed(mixed, scale);
  const int64_t tokens = mixed.size(0), batch = mixed.size(1), heads = mixed.size(2), width = mixed.size(4);
  const std::vector<int64_t> size{tokens, batch, heads * width};
  Tensor context = torch::stable::new_empty(mixed, size), logsumexp = empty_floats({batch, heads, tokens}, mixed);
  with_half_type(mixed, [&](auto zero) {
    using T = decltype(zero);
    const AttentionForward<T> p{part_of<const T>(mixed, 0),
                                part_of<const T>(mixed, 1),
                                part_of<const T>(mixed, 2),
                                joined_heads_of<T>(context, width),
                                logsumexp.mutable_data_ptr<float>(),
                                static_cast<int>(tokens),
                                static_cast<int>(tokens),
                                static_cast<int>(heads),
                                static_cast<float>(scale),
                                causal};
    launch(p, batch, width, mixed);
  });
  return {context, logsumexp};
}

// The gradient of `mixed` from that of the context.
Tensor packed_backward(const Tensor& gradient, const Tensor& mixed, const Tensor& context, const Tensor& logsumexp,
                       bool causal, double scale) {
  check_packed(mixed, scale);
  const int64_t tokens = mixed.size(0), batch = mixed.size(1), heads = mixed.size(2), width = mixed.size(4);
  for (const Tensor& t : {gradient, context}) {
    check(t, "the context or its gradient", 3, mixed);
    STD_TORCH_CHECK(t.size(0) == tokens && t.size(1) == batch && t.size(2) == heads * width,
                    "megamug: the context and its gradient must be [tokens, batch, heads * width]");
  }
  check_logsumexp(logsumexp, batch, heads, tokens, mixed);
  const std::vector<int64_t> size{tokens, batch, heads, 3, width};
  Tensor result = torch::stable::new_empty(mixed, size);
  with_half_type(mixed, [&](auto zero) {
    using T = decltype(zero);
    const AttentionBackward<T> p{part_of<const T>(mixed, 0),
                                 part_of<const T>(mixed, 1),
                                 part_of<const T>(mixed, 2),
                                 joined_heads_of<const T>(context, width),
                                 joined_heads_of<const T>(gradient, width),
                                 part_of<T>(result, 0),
                                 part_of<T>(result, 1),
                                 part_of<T>(result, 2),
                                 logsumexp.const_data_ptr<float>(),
                                 static_cast<int>(tokens),
                                 static_cast<int>(tokens),
                                 static_cast<int>(heads),
                                 static_cast<float>(scale),
                                 causal,
                                 0};
    launch(p, batch, width, mixed);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(megamug, CUDA, m) {
  m.impl("packed_attention_forward", TORCH_BOX(&packed_forward));
  m.impl("packed_attention_backward", TORCH_BOX(&packed_backward));
}

}  // namespace megamug
