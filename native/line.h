// Who waits for a model, and who is served together: a state machine that knows no clock.
// The same rules as services/inference/line.py, step by step; the same tests run over both.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <vector>

namespace leptonic {

// Triton's names; see libs/contracts/pipeline.py.
struct Limits {
  int64_t max_batch_size = 64;
  std::vector<int64_t> preferred_batch_size;
  int64_t max_queue_delay_ns = 0;
  int64_t max_queue_size = 1024;
  uint64_t priority_levels = 0;
  uint64_t default_priority_level = 0;
  int64_t default_timeout_us = 0;
  bool allow_timeout_override = true;
  bool delay_late = false;  // timeout_action DELAY, else REJECT
};

// Quicker batches cost about as much to hand out as to run: they are not made smaller.
constexpr int64_t kSlowNsMin = 150'000;

// A request's place in the line. Times of 0 are none.
struct Place {
  uint64_t key;
  int64_t rows;
  uint64_t kind;
  int64_t arrived_ns;
  int64_t deadline_ns;
  int64_t timeout_ns;  // when its queue timeout is over
  uint64_t level;
  uint64_t arrival;  // how many had come before
  void* request;     // whoever owns the line knows what it is

  int64_t expiry_ns() const;
};

struct Late {
  Place place;
  bool by_client;  // the client's deadline rather than a queue timeout
};

// What to do now: answer `late` with an error, then run the batch, or look again.
struct Turn {
  std::vector<Place> batch;
  std::vector<Late> late;
  int64_t wait_ns = 0;  // 0 with an empty batch: nothing waits
};

class Line {
 public:
  explicit Line(Limits limits);

  // Priorities and timeouts of those who wait already stay as they are.
  void configure(Limits limits);
  // False when max_queue_size requests wait already.
  bool join(uint64_t key, int64_t rows, uint64_t kind, int64_t now_ns, int64_t deadline_ns,
            int64_t timeout_us, uint64_t priority, void* request = nullptr);
  // A batch of so many, which took so long.
  void answered(int64_t requests, int64_t took_ns, int64_t now_ns);
  // A batch of so many that was taken is answered or failed; or it goes on as so many.
  void over(int64_t requests);
  void parted(int64_t parts) { running_ += parts - 1; }
  // What was given with it; nullptr when it is not in line.
  void* leave(uint64_t key);
  // `runners`: those who have nothing to do.
  void take(int64_t now_ns, Turn& turn, int runners = 1);
  // Everybody's, in order; nobody waits any more.
  std::vector<void*> dissolve();
  int64_t waiting() const { return waiting_; }
  int64_t pace_ns() const { return pace_ns_; }
  const Limits& limits() const { return limits_; }

 private:
  using Row = std::deque<Place>;

  void add(const Place& place);
  int64_t timeout_ns(int64_t now_ns, int64_t timeout_us) const;
  uint64_t level(uint64_t priority) const;
  void share(std::vector<Place>& batch, int runners) const;
  bool is_shared() const { return is_free_ && running_ > 0 && pace_ns_ >= kSlowNsMin; }
  int64_t part(int runners) const;
  void expire(int64_t now_ns, Turn& turn);
  int64_t wait_ns(int64_t now_ns) const;
  bool is_enough(uint64_t kind) const;
  void gather(std::vector<Place>& batch) const;
  void cut(std::vector<Place>& batch) const;
  void remove(const std::vector<Place>& batch);

  Limits limits_;
  int64_t enough_rows_ = 0;
  bool is_free_ = true;  // how long to wait for more is left to this line
  int64_t back_ = 0;     // how many of those answered may ask again until back_ns_
  int64_t back_ns_ = 0;
  int64_t running_ = 0, running_requests_ = 0;  // batches that were taken and are not over
  int64_t pace_ns_ = 0;  // of a batch, those answered last count most; 0: none was
  std::map<uint64_t, Row> levels_;  // priority -> in order of arrival; no empty ones
  int64_t waiting_ = 0;
  uint64_t arrivals_ = 0;
  int64_t soonest_ns_ = INT64_MAX;  // nobody expires before; who left may have
};

}  // namespace leptonic
