// Every instruction set's ConvPool against one in plain loops, on images and windows of any size; what
// does not fit is refused. Memory is of exactly the size that was asked for.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "../conv_pool.h"
#include "checks.h"

namespace leptonic {

namespace {

using namespace ops;

Window some_window(Random& random, int64_t most, bool is_pool) {
  Window window{1 + int64_t(below(random, most)), 1 + int64_t(below(random, 3))};
  uint64_t around = is_pool ? window.size : 4;
  window.before = int64_t(below(random, around));
  window.after = int64_t(below(random, around));
  return window;
}

Geometry some_geometry(Random& random) {
  return {some_window(random, 5, false), some_window(random, 5, false), some_window(random, 4, true),
          some_window(random, 4, true),  1 + int64_t(below(random, 40)), below(random, 2) == 1, false};
}

std::vector<float> numbers(Random& random, size_t count) {
  std::vector<float> found(count);
  for (float& one : found) one = static_cast<float>(below(random, 2001)) / 1000.0f - 1.0f;
  return found;
}

struct Case {
  Geometry geometry;
  Images images;
  std::vector<float> pixels, weights, bias;

  explicit Case(Random& random) : geometry(some_geometry(random)) {
    geometry.channels_last = below(random, 4) == 0;
    if (geometry.channels_last) geometry.channels = geometry.pitch();
    images = {nullptr, int64_t(below(random, 3)), 1 + int64_t(below(random, 4)), 1 + int64_t(below(random, 40)),
              1 + int64_t(below(random, 40))};
    pixels = numbers(random, size_t(images.count * images.channels * images.height * images.width));
    images.data = pixels.data();
    weights = numbers(random, size_t(images.channels * geometry.conv_y.size * geometry.conv_x.size * geometry.pitch()));
    bias = numbers(random, size_t(geometry.pitch()));
  }

  double convolved(int64_t image, int64_t channel, int64_t y, int64_t x) const {
    double sum = bias[size_t(channel)];
    for (int64_t c = 0; c < images.channels; ++c)
      for (int64_t i = 0; i < geometry.conv_y.size; ++i)
        for (int64_t j = 0; j < geometry.conv_x.size; ++j) {
          int64_t row = y * geometry.conv_y.stride - geometry.conv_y.before + i;
          int64_t column = x * geometry.conv_x.stride - geometry.conv_x.before + j;
          if (row < 0 || row >= images.height || column < 0 || column >= images.width) continue;
          int64_t tap = (c * geometry.conv_y.size + i) * geometry.conv_x.size + j;
          sum += double(pixels[size_t(((image * images.channels + c) * images.height + row) * images.width + column)]) *
                 double(weights[size_t(tap * geometry.pitch() + channel)]);
        }
    return sum;
  }

  double pooled(const Plan& plan, int64_t image, int64_t channel, int64_t y, int64_t x) const {
    double most = -std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < geometry.pool_y.size; ++i)
      for (int64_t j = 0; j < geometry.pool_x.size; ++j) {
        int64_t row = y * geometry.pool_y.stride - geometry.pool_y.before + i;
        int64_t column = x * geometry.pool_x.stride - geometry.pool_x.before + j;
        bool inside = row >= 0 && row < plan.conv_height && column >= 0 && column < plan.conv_width;
        if (inside) most = std::max(most, convolved(image, channel, row, column));
      }
    return geometry.relu ? std::max(most, 0.0) : most;
  }

  void check(ConvPool run, const Plan& plan) const {
    size_t size = size_t(images.count * geometry.channels * plan.height * plan.width);
    std::unique_ptr<float[]> out(new float[size]), scratch(new float[plan.scratch()]);
    std::fill_n(out.get(), size, std::nanf(""));
    std::fill_n(scratch.get(), plan.scratch(), std::nanf(""));
    run(plan, weights.data(), bias.data(), out.get(), scratch.get());
    for (int64_t image = 0; image < images.count; ++image)
      for (int64_t channel = 0; channel < geometry.channels; ++channel)
        for (int64_t y = 0; y < plan.height; ++y)
          for (int64_t x = 0; x < plan.width; ++x) {
            int64_t pixel = y * plan.width + x, pixels = plan.height * plan.width;
            int64_t at = geometry.channels_last ? pixel * geometry.channels + channel : channel * pixels + pixel;
            double given = out[size_t(image * geometry.channels * pixels + at)];
            CHECK(std::abs(given - pooled(plan, image, channel, y, x)) < 1e-4);
          }
  }
};

bool is_refused(const Geometry& geometry) {
  try {
    geometry.check();
    return false;
  } catch (const std::invalid_argument&) {
    return true;
  }
}

}  // namespace

void check_operators(uint64_t seed, int rounds) {
  Random random(seed);
  int run = 0;
  for (int round = 0; round < rounds; ++round) {
    Case one(random);
    CHECK(!is_refused(one.geometry));
    try {
      Plan plan(one.geometry, one.images);
      for (ConvPool kernel : conv_pools()) one.check(kernel, plan);
      ++run;
    } catch (const std::invalid_argument&) {
      const Geometry& asked = one.geometry;
      CHECK(asked.conv_y.places(one.images.height) < 1 || asked.conv_x.places(one.images.width) < 1);
    }
  }
  CHECK(run > rounds / 2);
  Geometry plain;
  plain.channels = 1;
  CHECK(!is_refused(plain));
  for (auto spoil : {+[](Geometry& it) { it.channels = 0; }, +[](Geometry& it) { it.conv_x.stride = 0; },
                     +[](Geometry& it) { it.conv_y.before = -1; }, +[](Geometry& it) { it.pool_y.size = 9; },
                     +[](Geometry& it) { it.pool_x.after = 1; }, +[](Geometry& it) { it.conv_x.size = 5000; }}) {
    Geometry spoilt = plain;
    spoil(spoilt);
    CHECK(is_refused(spoilt));
  }
  std::printf("operators: %d of %d shapes, %zu instruction sets\n", run, rounds, conv_pools().size());
}

}  // namespace leptonic
