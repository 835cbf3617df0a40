// Convolution, bias, ReLU and max-pooling of images with few channels in one pass: what comes between
// stays in the L1 cache, where onnxruntime writes it to memory and reads it back twice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace leptonic::ops {

constexpr int64_t kBlock = 16;   // channels that come out are padded to a multiple
constexpr int64_t kPoolMax = 8;  // rows and columns of a pool
constexpr int64_t kWindowMax = 1 << 12, kChannelsMax = 1 << 16;

// Along one axis.
struct Window {
  int64_t size = 1, stride = 1, before = 0, after = 0;

  int64_t places(int64_t length) const {
    int64_t room = length + before + after - size;
    return room < 0 ? 0 : room / stride + 1;
  }
};

struct Geometry {
  Window conv_y, conv_x, pool_y, pool_x;
  int64_t channels = 0;  // that come out
  bool relu = false;
  bool channels_last = false;  // what comes out, where they are a multiple of a block

  // Raises std::invalid_argument for what no graph may ask for.
  void check() const;
  int64_t pitch() const { return (channels + kBlock - 1) / kBlock * kBlock; }
};

struct Images {
  const float* data;  // [count, channels, height, width]
  int64_t count, channels, height, width;
};

// The image's parts in the order in which they are read: `columns` strides apart lie side by side.
struct Plan {
  Geometry geometry;
  Images images;
  int64_t conv_height, conv_width, height, width;  // height, width: what comes out
  int64_t columns, line, plane;                    // floats of a phase, of a padded row, of a channel
  int64_t kept;                                    // rows of the output that are gathered before they go
  std::vector<int32_t> taps;                       // where each weight's pixel is, from the window's corner

  // Raises std::invalid_argument when the convolution's window does not fit the image. Where the pool's
  // does not fit what is left, nothing comes out.
  Plan(const Geometry& geometry, const Images& images);
  // Columns of the convolution with the pool's padding.
  int64_t pool_width() const { return conv_width + geometry.pool_x.before + geometry.pool_x.after; }
  size_t scratch() const;  // floats
};

// weights: [channels of the image, conv rows, conv columns, pitch]; bias: [pitch];
// out: [count, channels, height, width] or [count, height, width, channels]. One instruction set: see `conv_pools`.
using ConvPool = void (*)(const Plan& plan, const float* weights, const float* bias, float* out, float* scratch);

// What this processor can run, the fastest last.
const std::vector<ConvPool>& conv_pools();

}  // namespace leptonic::ops
