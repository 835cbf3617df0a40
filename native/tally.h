// The sums behind `front.Counts`. Whoever calls holds the batcher's lock.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <vector>

namespace leptonic {

// Upper bounds in ns: LATENCY_BOUNDS_NS of services/inference/front.py. One more takes the rest.
constexpr std::array<int64_t, 15> kLatencyBounds = {
    100'000,    200'000,    500'000,     1'000'000,   2'000'000,     5'000'000,     10'000'000,   20'000'000,
    50'000'000, 100'000'000, 200'000'000, 500'000'000, 1'000'000'000, 2'000'000'000, 5'000'000'000};

using Histogram = std::array<int64_t, kLatencyBounds.size() + 1>;

struct Spent {
  int64_t input_ns;   // gathering
  int64_t infer_ns;
  int64_t output_ns;  // what came after
};

struct Runs {
  int64_t count;
  Spent spent;
};

struct Failures {
  int64_t requests;
  int64_t ns;
};

struct Tally {
  int64_t requests = 0;
  int64_t rows = 0;
  int64_t success_ns = 0;
  int64_t queue_ns = 0;
  Spent spent{};  // a request counts the whole of its batch
  std::map<int, Failures> failures;
  std::map<int64_t, Runs> batches;
  Histogram latency{};
  Histogram queue{};
  int64_t last_ms = 0;

  // When it was.
  int64_t answered(const std::vector<int64_t>& arrived_ns, int64_t batch_rows, int64_t taken_ns,
                   const Spent& batch_spent);
  void failed(int code, int64_t requests, int64_t ns);
};

}  // namespace leptonic
