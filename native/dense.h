// rows x weights + bias, then ReLU or not, in tile registers (AMX): products of bfloat16, sums of float32.
//
// A float32 is taken as two bfloat16, the nearest and the nearest to what that leaves, and of the four products
// the least is left out: each of these loses 2^-18, so less than 2^-16 of a product is lost. One multiplication
// of tiles does 16 times as much as one of vectors, so three of them for each are still five times as fast.
#pragma once

#include <cstddef>
#include <cstdint>

namespace leptonic::ops {

constexpr int64_t kTile = 16;   // rows of a register, and float32 in a row of it
constexpr int64_t kDepth = 32;  // bfloat16 in a row of it
constexpr int64_t kWide = 2 * kTile;

struct Dense {
  int64_t inputs, outputs;
  bool relu;

  int64_t depths() const { return (inputs + kDepth - 1) / kDepth; }
  int64_t blocks() const { return (outputs + kWide - 1) / kWide; }
  // bfloat16 in [blocks, depths, upper and rest, halves of the block, 16 pairs of inputs, 16 outputs, 2].
  size_t packed() const { return static_cast<size_t>(blocks() * depths() * 2 * 2 * kTile * kDepth); }
  size_t scratch(int64_t rows) const;  // floats
};

// weights: [inputs, outputs] -> `packed` bfloat16, the nearest and then the nearest to the rest.
void pack(const Dense& shape, const float* weights, uint16_t* to);

// Whether this processor has them and the kernel lets this process use them; asks it once.
bool has_tiles();

// rows: [count, inputs]; weights as above; bias: [outputs]; out: [count, outputs]. Scratch is aligned to 64
// bytes. A row with an infinity or NaN in it, or what rounds to one, is multiplied in plain loops, so that they
// stay what they are.
void dense(const Dense& shape, const float* rows, int64_t count, const uint16_t* weights, const float* bias,
           float* out, float* scratch);

}  // namespace leptonic::ops
