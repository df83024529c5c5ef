// Arguments of the operator `draw_`, checked and put in order.
#pragma once

#include "draw.h"
#include "operators.h"

namespace megamug {

// `out` holds the elements [offset, offset + its size) of a parameter of `shape`; axes that it holds whole join their
// neighbour, so that runs are as long as they can be.
inline Slice slice_of(const Tensor& out, const std::vector<int64_t>& shape, const std::vector<int64_t>& offset) {
  const int axes = static_cast<int>(out.dim());
  STD_TORCH_CHECK(out.is_contiguous() &&
                      (out.scalar_type() == ScalarType::Float || out.scalar_type() == ScalarType::BFloat16),
                  "megamug: draw_ fills contiguous float32 or bfloat16 tensors");
  STD_TORCH_CHECK(axes <= kMaxAxes && shape.size() == static_cast<size_t>(axes) && offset.size() == shape.size(),
                  "megamug: draw_ wants a shape and an offset for each axis, at most ", kMaxAxes);
  Slice s{1, 1, 0, 0, {}, {}};
  int64_t stride = 1;
  bool whole = true;  // all axes behind this one
  int64_t size[kMaxAxes], strides[kMaxAxes];
  for (int a = axes - 1; a >= 0; a--) {
    const int64_t end = offset[a] + out.size(a);
    STD_TORCH_CHECK(offset[a] >= 0 && end <= shape[a], "megamug: draw_: elements [", offset[a], ", ", end, ") of axis ",
                    a, ", which has ", shape[a]);
    s.origin += offset[a] * stride;
    if (whole) {
      s.run *= out.size(a);
    } else {
      s.rows *= out.size(a);
      size[s.axes] = out.size(a), strides[s.axes++] = stride;
    }
    whole = whole && out.size(a) == shape[a];
    stride *= shape[a];
  }
  for (int a = 0; a < s.axes; a++) s.size[a] = size[s.axes - 1 - a], s.stride[a] = strides[s.axes - 1 - a];
  return s;
}

inline Distribution distribution_of(int64_t key0, int64_t key1, bool normal, double scale, double mass) {
  STD_TORCH_CHECK(mass > 0 && mass <= 0.5, "megamug: draw_: mass must be in (0, 1/2], not ", mass);
  return {{static_cast<uint32_t>(key0), static_cast<uint32_t>(key1)}, normal, scale, mass};
}

}  // namespace megamug
