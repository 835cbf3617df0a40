#include "conv_pool.h"

#include <algorithm>
#include <utility>

namespace leptonic::ops {

namespace {

constexpr int64_t kGatheredBytes = 24 << 10;  // half of the L1 cache

namespace any {
#define LANES 4
#define TILE 4
#include "conv_pool_lanes.h"
#undef LANES
#undef TILE
}  // namespace any

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#define LANES 8
#define TILE 6
#include "conv_pool_lanes.h"
#undef LANES
#undef TILE
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#define LANES 16
#define TILE 13
#include "conv_pool_lanes.h"
#undef LANES
#undef TILE
}  // namespace avx512
#pragma GCC pop_options
#endif

std::vector<ConvPool> runnable() {
  std::vector<ConvPool> found{any::conv_pool};
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(avx2::conv_pool);
  if (__builtin_cpu_supports("x86-64-v4")) found.push_back(avx512::conv_pool);
#endif
  return found;
}

}  // namespace

void Geometry::check() const {
  for (const Window& one : {conv_y, conv_x, pool_y, pool_x}) {
    bool fits = one.size >= 1 && one.stride >= 1 && one.before >= 0 && one.after >= 0;
    if (!fits || std::max({one.size, one.stride, one.before, one.after}) > kWindowMax)
      throw std::invalid_argument("a window of no size, or of none that there is");
  }
  for (const Window& one : {pool_y, pool_x})
    if (one.size > kPoolMax || std::max(one.before, one.after) >= one.size)
      throw std::invalid_argument("a pool that is too large, or all padding");
  if (channels < 1 || channels > kChannelsMax) throw std::invalid_argument("so many channels cannot come out");
  if (channels_last && channels != pitch()) throw std::invalid_argument("channels that are no whole blocks come first");
}

Plan::Plan(const Geometry& geometry, const Images& images) : geometry(geometry), images(images) {
  const Window &down = geometry.conv_y, &across = geometry.conv_x;
  conv_height = down.places(images.height);
  conv_width = across.places(images.width);
  height = geometry.pool_y.places(conv_height);
  width = geometry.pool_x.places(conv_width);
  if (conv_height < 1 || conv_width < 1) throw std::invalid_argument("the image is smaller than the window");
  columns = (images.width + across.before + across.after + across.stride - 1) / across.stride;
  line = columns * across.stride;
  plane = line * (images.height + down.before + down.after);
  if (images.channels * plane > INT32_MAX) throw std::invalid_argument("the image is too large");
  const int64_t row_bytes = std::max<int64_t>(width, 1) * geometry.pitch() * int64_t{sizeof(float)};
  kept = std::clamp<int64_t>(kGatheredBytes / row_bytes, 1, std::max<int64_t>(height, 1));
  for (int64_t channel = 0; channel < images.channels; ++channel)
    for (int64_t y = 0; y < down.size; ++y)
      for (int64_t x = 0; x < across.size; ++x)
        taps.push_back(static_cast<int32_t>(channel * plane + y * line + x % across.stride * columns +
                                            x / across.stride));
}

size_t Plan::scratch() const {
  const int64_t ring = (geometry.pool_y.size + 1) * pool_width(), rows = kept * width + kBlock;
  return static_cast<size_t>((ring + rows) * geometry.pitch() + images.channels * plane);
}

const std::vector<ConvPool>& conv_pools() {
  static const std::vector<ConvPool> found = runnable();
  return found;
}

}  // namespace leptonic::ops
