// What the launchers of operators on maps share.
#pragma once
#include "launch.h"
#include "map.h"

namespace xformer_fast {

inline MapView map_view(const Tensor& t) {
  const int64_t axes = t.dim() - 3;
  MapView view;
  view.data = t.data_ptr();
  view.batch = t.stride(0);
  view.head = t.stride(axes + 1);
  for (int64_t x = 0; x < axes; ++x) view.axis[kMaxAxes - axes + x] = t.stride(x + 1);
  return view;
}

// (B, *space, H, last) in the memory order of `like`: heads inside the map's axes, or outside.
inline Tensor empty_map_in_order_of(const Tensor& like, int64_t last) {
  const int64_t axes = like.dim() - 3;
  Sizes shape;
  for (int64_t i = 0; i < like.dim() - 1; ++i) shape.push_back(like.size(i));
  shape.push_back(last);
  if (like.stride(axes + 1) <= like.stride(1)) return empty_as(like, shape);
  Sizes order{0, axes + 1};
  for (int64_t i = 1; i <= axes; ++i) order.push_back(i);
  order.push_back(axes + 2);
  return empty_in_order(like, shape, order);
}

}  // namespace xformer_fast
