#include "line.h"

#include <algorithm>
#include <cassert>
#include <utility>

namespace leptonic {

namespace {

constexpr int64_t kNsInUs = 1000;
constexpr int64_t kBackShare = 16;  // of what a batch took: so long those answered may take to ask again
constexpr int64_t kBackNsMin = 100'000, kBackNsMax = 5'000'000;
constexpr int kPaceBits = 3;  // of the pace of batches the latest is an eighth
constexpr int64_t kPartMin = 8;  // so many requests are one batch however many runners there are
constexpr uint64_t kDelayed = uint64_t{1} << 32;  // behind all priorities

int64_t sooner(int64_t one, int64_t other) {
  if (one == 0 || other == 0) return one + other;
  return std::min(one, other);
}

int64_t later_by(int64_t now_ns, int64_t us) {
  int64_t when = 0;
  bool over = __builtin_mul_overflow(us, kNsInUs, &when);
  over |= __builtin_add_overflow(now_ns, when, &when);
  return over ? INT64_MAX : when;
}

}  // namespace

int64_t Place::expiry_ns() const {
  int64_t when = sooner(deadline_ns, timeout_ns);
  return when == 0 ? INT64_MAX : when;
}

Line::Line(Limits limits) { configure(std::move(limits)); }

void Line::configure(Limits limits) {
  limits_ = std::move(limits);
  const auto& sizes = limits_.preferred_batch_size;
  enough_rows_ = sizes.empty() ? limits_.max_batch_size : *std::min_element(sizes.begin(), sizes.end());
  is_free_ = limits_.max_queue_delay_ns == 0 && sizes.empty();
}

bool Line::join(uint64_t key, int64_t rows, uint64_t kind, int64_t now_ns, int64_t deadline_ns,
                int64_t timeout_us, uint64_t priority, void* request) {
  assert(rows >= 1 && rows <= limits_.max_batch_size);
  if (waiting_ >= limits_.max_queue_size) return false;
  add(Place{key, rows, kind, now_ns, deadline_ns, timeout_ns(now_ns, timeout_us), level(priority),
            ++arrivals_, request});
  back_ = std::max<int64_t>(0, back_ - 1);
  return true;
}

void Line::over(int64_t requests) {
  --running_;
  running_requests_ -= requests;
}

void Line::answered(int64_t requests, int64_t took_ns, int64_t now_ns) {
  int64_t change_ns = took_ns - pace_ns_;
  pace_ns_ += pace_ns_ == 0 ? change_ns : change_ns >> kPaceBits;
  int64_t patience_ns = std::min(took_ns / kBackShare, kBackNsMax);
  if (patience_ns < kBackNsMin) return;
  back_ = requests + (now_ns < back_ns_ ? back_ : 0);
  back_ns_ = std::max(back_ns_, now_ns + patience_ns);
}

void Line::add(const Place& place) {
  levels_[place.level].push_back(place);
  soonest_ns_ = std::min(soonest_ns_, place.expiry_ns());
  ++waiting_;
}

void* Line::leave(uint64_t key) {
  for (auto& [level, row] : levels_) {
    auto found = std::find_if(row.begin(), row.end(), [&](auto& one) { return one.key == key; });
    if (found == row.end()) continue;
    void* request = found->request;
    row.erase(found);
    --waiting_;
    if (row.empty()) levels_.erase(level);
    return request;
  }
  return nullptr;
}

void Line::take(int64_t now_ns, Turn& turn, int runners) {
  turn.batch.clear();
  turn.late.clear();
  if (soonest_ns_ <= now_ns) expire(now_ns, turn);
  turn.wait_ns = wait_ns(now_ns);
  if (turn.wait_ns > 0 || waiting_ == 0) return;
  gather(turn.batch);
  cut(turn.batch);
  share(turn.batch, runners);
  remove(turn.batch);
  ++running_;
  running_requests_ += static_cast<int64_t>(turn.batch.size());
}

std::vector<void*> Line::dissolve() {
  std::vector<void*> all;
  for (auto& [_, row] : levels_)
    for (auto& place : row) all.push_back(place.request);
  levels_.clear();
  waiting_ = 0;
  return all;
}

// Until a batch is due or somebody expires. Of those who wait none has expired.
int64_t Line::wait_ns(int64_t now_ns) const {
  bool is_back_soon = is_free_ && back_ > 0;
  if (waiting_ == 0 || (limits_.max_queue_delay_ns == 0 && !is_back_soon)) return 0;
  const Place& head = levels_.begin()->second.front();
  int64_t wait = (is_back_soon ? back_ns_ : head.arrived_ns + limits_.max_queue_delay_ns) - now_ns;
  if (wait <= 0 || is_enough(head.kind)) return 0;
  if (is_shared() && waiting_ >= part(1)) return 0;
  for (auto& [_, row] : levels_)
    for (auto& place : row) wait = std::min(wait, place.expiry_ns() - now_ns);
  return std::max<int64_t>(1, wait);
}

bool Line::is_enough(uint64_t kind) const {
  int64_t rows = 0;
  for (auto& [_, row] : levels_)
    for (auto& place : row)
      if (place.kind == kind && (rows += place.rows) >= enough_rows_) return true;
  return false;
}

// The head, and those of its kind behind it until the next would be too many.
void Line::gather(std::vector<Place>& batch) const {
  uint64_t kind = levels_.begin()->second.front().kind;
  int64_t left = limits_.max_batch_size;
  for (auto& [_, row] : levels_) {
    for (auto& place : row) {
      if (place.kind != kind) continue;
      left -= place.rows;
      if (left < 0 && !batch.empty()) return;
      batch.push_back(place);
    }
  }
}

// To the largest preferred size that it reaches; the head stays.
void Line::cut(std::vector<Place>& batch) const {
  if (limits_.preferred_batch_size.empty()) return;
  int64_t rows = 0, best = 0;
  for (auto& place : batch) rows += place.rows;
  for (int64_t size : limits_.preferred_batch_size)
    if (size <= rows) best = std::max(best, size);
  if (best == 0) return;
  while (batch.size() > 1 && rows > best) {
    rows -= batch.back().rows;
    batch.pop_back();
  }
}

// Runners that have nothing to do get as much each, unless there is enough for whole batches, or
// batches are quick, or of a size that is asked for. While others run, as much is left for the next.
void Line::share(std::vector<Place>& batch, int runners) const {
  if (!is_free_) return;
  int64_t rows = 0, size = static_cast<int64_t>(batch.size());
  for (auto& place : batch) rows += place.rows;
  bool whole = waiting_ > size || (0 < pace_ns_ && pace_ns_ < kSlowNsMin);
  int64_t most_rows = !whole ? (rows + runners - 1) / runners : rows;
  int64_t most = is_shared() ? part(runners) : size;
  while (batch.size() > 1 && (rows > most_rows || size > most)) {
    rows -= batch.back().rows;
    --size;
    batch.pop_back();
  }
}

// Half of what comes to each runner, of all requests that are known of.
int64_t Line::part(int runners) const {
  int64_t everyone = waiting_ + running_requests_ + back_, parts = 2 * (runners + running_);
  return std::max(kPartMin, (everyone + parts - 1) / parts);
}

// `batch` lies in the line in the same order, mostly at its very front.
void Line::remove(const std::vector<Place>& batch) {
  size_t next = 0;
  for (auto at = levels_.begin(); at != levels_.end() && next < batch.size();) {
    Row& row = at->second;
    while (!row.empty() && next < batch.size() && row.front().key == batch[next].key) {
      row.pop_front();
      ++next;
    }
    auto taken = [&](const Place& place) {
      bool is = next < batch.size() && place.key == batch[next].key;
      next += is;
      return is;
    };
    if (next < batch.size()) row.erase(std::remove_if(row.begin(), row.end(), taken), row.end());
    at = row.empty() ? levels_.erase(at) : std::next(at);
  }
  assert(next == batch.size());
  waiting_ -= static_cast<int64_t>(batch.size());
}

void Line::expire(int64_t now_ns, Turn& turn) {
  std::vector<Place> expired;
  soonest_ns_ = INT64_MAX;
  auto is_over = [&](const Place& place) {
    int64_t when = place.expiry_ns();
    if (when <= now_ns) expired.push_back(place);
    else soonest_ns_ = std::min(soonest_ns_, when);
    return when <= now_ns;
  };
  for (auto at = levels_.begin(); at != levels_.end();) {
    Row& row = at->second;
    row.erase(std::remove_if(row.begin(), row.end(), is_over), row.end());
    at = row.empty() ? levels_.erase(at) : std::next(at);
  }
  waiting_ -= static_cast<int64_t>(expired.size());
  std::sort(expired.begin(), expired.end(), [](auto& a, auto& b) {
    return std::pair(a.expiry_ns(), a.arrival) < std::pair(b.expiry_ns(), b.arrival);
  });
  for (Place& place : expired) {
    bool by_client = place.deadline_ns > 0 && place.deadline_ns <= now_ns;
    if (by_client || !limits_.delay_late) {
      turn.late.push_back({place, by_client});
      continue;
    }
    place.level = kDelayed;
    place.timeout_ns = 0;
    add(place);
  }
}

// When a request's queue timeout is over: the smaller one of its own and the default.
int64_t Line::timeout_ns(int64_t now_ns, int64_t timeout_us) const {
  int64_t own_us = limits_.allow_timeout_override ? std::max<int64_t>(0, timeout_us) : 0;
  int64_t us = sooner(own_us, std::max<int64_t>(0, limits_.default_timeout_us));
  return us == 0 ? 0 : later_by(now_ns, us);
}

uint64_t Line::level(uint64_t priority) const {
  if (priority >= 1 && priority <= limits_.priority_levels) return priority;
  return limits_.default_priority_level ? limits_.default_priority_level : limits_.priority_levels;
}

}  // namespace leptonic
