// The attention operators on a CPU: checks, memory, threads; the arithmetic is in attention.inl.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "../operators.h"
#include "kernels/kernels.h"

namespace megamug {
namespace {

Heads heads_of(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

void check_heads(const Tensor& t, const char* name, const Tensor& query) {
  STD_TORCH_CHECK(t.dim() == 4 && !t.is_cuda() && t.scalar_type() == query.scalar_type() &&
                      t.size(1) == query.size(1) && t.size(3) == query.size(3),
                  "megamug: ", name, " must be [tokens, batch, heads, width] on the CPU, dtype, batch and width the query's");
  STD_TORCH_CHECK(t.size(3) <= 1 || t.stride(3) == 1, "megamug: the last axis of ", name, " must be contiguous");
}

Attention attention_of(const Tensor& query, const Tensor& key, const Tensor& value, bool causal, double scale) {
  const auto type = query.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "megamug: attention takes float32 or bfloat16");
  check_heads(query, "query", query);
  check_heads(key, "key", query);
  check_heads(value, "value", query);
  STD_TORCH_CHECK(key.size(0) == value.size(0) && key.size(2) == value.size(2) && key.size(0) > 0,
                  "megamug: there must be as many values as keys, and one at least");
  STD_TORCH_CHECK(key.size(2) > 0 && query.size(2) % key.size(2) == 0,
                  "megamug: the heads of the query must be a multiple of those of the key");
  STD_TORCH_CHECK(query.size(3) > 0 && query.size(3) <= 256, "megamug: a head is 1 to 256 numbers wide");
  STD_TORCH_CHECK(query.size(0) < INT32_MAX && key.size(0) < INT32_MAX, "megamug: too many tokens");
  STD_TORCH_CHECK(scale > 0, "megamug: the scale of attention must be positive");
  Attention a{};
  a.dtype = type == ScalarType::Float ? Dtype::float32 : Dtype::bfloat16;
  a.queries = query.size(0), a.batch = query.size(1), a.heads = query.size(2), a.width = query.size(3);
  a.keys = key.size(0), a.key_heads = key.size(2);
  a.scale = static_cast<float>(scale), a.causal = causal;
  a.query = heads_of(query), a.key = heads_of(key), a.value = heads_of(value);
  return a;
}

// The first key of each query's document: documents are runs of one number along a row of segments [batch, tokens].
std::unique_ptr<int32_t[]> first_keys(const std::optional<Tensor>& segments, const Attention& a) {
  if (!segments) return nullptr;
  STD_TORCH_CHECK(a.causal && a.keys == a.queries, "megamug: segments are for causal attention of a text to itself");
  STD_TORCH_CHECK(segments->dim() == 2 && segments->size(0) == a.batch && segments->size(1) == a.queries &&
                      segments->scalar_type() == ScalarType::Int && segments->is_contiguous() && !segments->is_cuda(),
                  "megamug: segments must be contiguous int32 [batch, tokens] on the CPU");
  const int32_t* number = segments->const_data_ptr<int32_t>();
  auto first = std::make_unique<int32_t[]>(a.batch * a.queries);
  for (int64_t i = 0; i < a.batch * a.queries; i++) {
    const int64_t token = i % a.queries;
    first[i] = token > 0 && number[i] == number[i - 1] ? first[i - 1] : static_cast<int32_t>(token);
  }
  return first;
}

template <class Kernel>
void share_out(int64_t tasks, int64_t grain, const Attention& a, bool backward, Kernel kernel) {
  const int64_t bytes = kernels().attention_scratch(a, backward);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, bytes), std::free);
    STD_TORCH_CHECK(scratch, "megamug: no memory for attention");
    kernel(a, scratch.get(), begin, end);
  });
}

// query [s, b, n, d], key and value [t, b, m, d] -> context [s, b, n, d], logsumexp [b, n, s]
std::tuple<Tensor, Tensor> attention_forward(const Tensor& query, const Tensor& key, const Tensor& value, bool causal,
                                             double scale, const std::optional<Tensor>& segments) {
  Attention a = attention_of(query, key, value, causal, scale);
  const auto first = first_keys(segments, a);
  a.first = first.get();
  const std::vector<int64_t> size{a.queries, a.batch, a.heads, a.width};
  Tensor context = torch::stable::new_empty(query, size), logsumexp = empty_floats({a.batch, a.heads, a.queries}, query);
  a.context = heads_of(context);
  a.logsumexp = logsumexp.mutable_data_ptr<float>();
  const int64_t blocks = (a.queries + kQueryBlock - 1) / kQueryBlock;
  const int64_t work = std::min(a.queries, kQueryBlock) * a.keys * a.width;  // of a task, in multiplications
  share_out(a.batch * a.heads * blocks, std::max<int64_t>(1, (1 << 18) / work), a, false, kernels().attention_forward);
  return {context, logsumexp};
}

// The gradients of query, key and value from that of the context.
std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& gradient, const Tensor& query, const Tensor& key,
                                                      const Tensor& value, const Tensor& context,
                                                      const Tensor& logsumexp, bool causal, double scale,
                                                      const std::optional<Tensor>& segments) {
  Attention a = attention_of(query, key, value, causal, scale);
  check_heads(gradient, "gradient", query);
  check_heads(context, "context", query);
  for (const Tensor& t : {gradient, context})
    STD_TORCH_CHECK(t.size(0) == a.queries && t.size(2) == a.heads, "megamug: the context has the shape of the query");
  STD_TORCH_CHECK(logsumexp.dim() == 3 && logsumexp.size(0) == a.batch && logsumexp.size(1) == a.heads &&
                      logsumexp.size(2) == a.queries && logsumexp.is_contiguous() &&
                      logsumexp.scalar_type() == ScalarType::Float && !logsumexp.is_cuda(),
                  "megamug: logsumexp must be contiguous float32 [batch, heads, tokens]");
  const auto first = first_keys(segments, a);
  a.first = first.get();
  a.context = heads_of(context);
  a.context_gradient = heads_of(gradient);
  a.logsumexp = const_cast<float*>(logsumexp.const_data_ptr<float>());
  const std::vector<int64_t> of_query{a.queries, a.batch, a.heads, a.width};
  const std::vector<int64_t> of_key{a.keys, a.batch, a.key_heads, a.width};
  Tensor query_gradient = torch::stable::new_empty(query, of_query);
  Tensor key_gradient = torch::stable::new_empty(key, of_key), value_gradient = torch::stable::new_empty(value, of_key);
  a.query_gradient = heads_of(query_gradient);
  a.key_gradient = heads_of(key_gradient), a.value_gradient = heads_of(value_gradient);
  const int64_t work = a.queries * a.keys * a.width * (a.heads / a.key_heads);
  share_out(a.batch * a.key_heads, std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(1, work)), a, true,
            kernels().attention_backward);
  return {query_gradient, key_gradient, value_gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(megamug, m) {
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, bool causal, float scale, Tensor? segments) "
      "-> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor context, Tensor logsumexp, "
      "bool causal, float scale, Tensor? segments) -> (Tensor, Tensor, Tensor)");
  m.def("packed_attention_forward(Tensor mixed, bool causal, float scale) -> (Tensor, Tensor)");
  m.def(
      "packed_attention_backward(Tensor gradient, Tensor mixed, Tensor context, Tensor logsumexp, bool causal, "
      "float scale) -> Tensor");
  m.def("cross_attention_forward(Tensor query, Tensor mixed, float scale) -> (Tensor, Tensor)");
  m.def(
      "cross_attention_backward(Tensor gradient, Tensor query, Tensor mixed, Tensor context, Tensor logsumexp, "
      "float scale) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(megamug, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace megamug
