#include "tally.h"

#include <algorithm>

#include "clock.h"

namespace leptonic {

namespace {

void count(Histogram& histogram, int64_t ns) {
  auto above = std::lower_bound(kLatencyBounds.begin(), kLatencyBounds.end(), ns);
  ++histogram[static_cast<size_t>(above - kLatencyBounds.begin())];
}

void add(Spent& sum, const Spent& one, int64_t times) {
  sum.input_ns += times * one.input_ns;
  sum.infer_ns += times * one.infer_ns;
  sum.output_ns += times * one.output_ns;
}

}  // namespace

int64_t Tally::answered(const std::vector<int64_t>& arrived_ns, int64_t batch_rows, int64_t taken_ns,
                        const Spent& batch_spent) {
  int64_t ended_ns = now_ns(), count_in_batch = static_cast<int64_t>(arrived_ns.size());
  requests += count_in_batch;
  rows += batch_rows;
  for (int64_t at_ns : arrived_ns) {
    success_ns += ended_ns - at_ns;
    queue_ns += taken_ns - at_ns;
    count(latency, ended_ns - at_ns);
    count(queue, taken_ns - at_ns);
  }
  add(spent, batch_spent, count_in_batch);
  Runs& runs = batches[batch_rows];
  ++runs.count;
  add(runs.spent, batch_spent, 1);
  last_ms = clock_ns(CLOCK_REALTIME) / 1'000'000;
  return ended_ns;
}

void Tally::failed(int code, int64_t count_failed, int64_t ns) {
  failures[code].requests += count_failed;
  failures[code].ns += ns;
}

}  // namespace leptonic
