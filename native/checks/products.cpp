// Products on tile registers, where the processor has them, against plain loops: any number of rows,
// inputs and outputs, infinities and NaN in their rows only. Memory is of exactly the size asked for.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "../dense.h"
#include "checks.h"

namespace leptonic {

namespace {

using namespace ops;

struct Matrix {
  Dense shape;
  std::vector<float> weights, bias;
  std::vector<uint16_t> packed;

  explicit Matrix(Random& random)
      : shape{1 + int64_t(below(random, 300)), 1 + int64_t(below(random, 100)), below(random, 2) == 1} {
    for (int64_t i = 0; i < shape.inputs * shape.outputs; ++i) weights.push_back(number(random));
    for (int64_t i = 0; i < shape.outputs; ++i) bias.push_back(number(random));
    packed.resize(shape.packed());
    pack(shape, weights.data(), packed.data());
  }

  static float number(Random& random) { return static_cast<float>(below(random, 2001)) / 1000.0f - 1.0f; }

  void check(const float* row, const float* out) const {
    for (int64_t output = 0; output < shape.outputs; ++output) {
      double sum = bias[size_t(output)], size = 0.5;
      for (int64_t input = 0; input < shape.inputs; ++input) {
        double product = double(row[input]) * double(weights[size_t(input * shape.outputs + output)]);
        sum += product;
        size += std::abs(product);
      }
      if (shape.relu && !(sum > 0) && !std::isnan(sum)) sum = 0;
      if (!std::isfinite(sum)) CHECK(!std::isfinite(out[output]) || shape.relu);
      else CHECK(std::abs(out[output] - sum) <= size / 65536);
    }
  }
};

struct Aligned {
  float* at;
  explicit Aligned(size_t floats) : at(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64))) {}
  ~Aligned() { std::free(at); }
};

}  // namespace

void check_products(uint64_t seed, int rounds) {
  if (!has_tiles()) {
    std::printf("products: no tile registers here\n");
    return;
  }
  Random random(seed);
  int odd = 0;
  for (int round = 0; round < rounds; ++round) {
    const Matrix one(random);
    const int64_t count = 1 + int64_t(below(random, 70));
    std::vector<float> rows(size_t(count * one.shape.inputs));
    for (float& value : rows) value = Matrix::number(random);
    if (below(random, 4) == 0) {
      static const float kOdd[] = {std::numeric_limits<float>::infinity(), std::nanf(""), 3e38f,
                                  std::numeric_limits<float>::max(), 1e-40f};
      rows[below(random, rows.size())] = kOdd[below(random, 5)];
      ++odd;
    }
    std::unique_ptr<float[]> out(new float[size_t(count * one.shape.outputs)]);
    Aligned scratch(one.shape.scratch(count));
    std::fill_n(scratch.at, one.shape.scratch(count), std::nanf(""));
    dense(one.shape, rows.data(), count, one.packed.data(), one.bias.data(), out.get(), scratch.at);
    for (int64_t row = 0; row < count; ++row)
      one.check(rows.data() + row * one.shape.inputs, out.get() + row * one.shape.outputs);
  }
  std::printf("products: %d of %d with a strange number\n", odd, rounds);
}

}  // namespace leptonic
