#include "helm.h"

#include <algorithm>
#include <cassert>
#include <chrono>

#include "clock.h"

namespace leptonic {

namespace {

constexpr int64_t kAbsentNs = 1'000'000;  // so long nobody may look after the sockets
constexpr int64_t kLatelyNs = 100'000'000;

}  // namespace

bool Helm::take() {
  std::lock_guard held(lock_);
  wanted_ = held_ || !lent_ || handed_over_;
  return !wanted_ && (held_ = true);
}

void Helm::leave(int64_t away_ns) {
  std::lock_guard held(lock_);
  assert(held_);
  held_ = false;
  away_ns_ = std::max(kAbsentNs, away_ns);
  back_ns_ = now_ns() + away_ns_;
  ++leaves_;
  if (asleep_ || !lent_) changed_.notify_one();
}

void Helm::hand_over() {
  std::lock_guard held(lock_);
  assert(held_);
  held_ = false;
  handed_over_ = true;
  changed_.notify_one();
}

void Helm::lend(bool lent) {
  std::lock_guard held(lock_);
  lent_ = lent;
  changed_.notify_one();
}

bool Helm::is_free() const {
  return !held_ && (!lent_ || handed_over_ || now_ns() >= back_ns_);
}

// Under load it looks as often as somebody could be late; while nobody leaves, not at all.
void Helm::wait() {
  std::unique_lock held(lock_);
  uint64_t seen = leaves_;
  while (!is_free()) {
    asleep_ = held_ && seen == leaves_;
    seen = leaves_;
    if (asleep_) changed_.wait(held);
    else changed_.wait_for(held, std::chrono::nanoseconds(away_ns_));
    asleep_ = false;
  }
  held_ = true;
  handed_over_ = wanted_ = false;
}

bool Helm::is_wanted() {
  std::lock_guard held(lock_);
  return lent_ && wanted_;
}

void Helm::saw(const Batcher* asked) {
  if (asked == seen_ && asked) return;
  seen_ = asked;
  changed_ns_.store(now_ns(), std::memory_order_relaxed);
}

bool Helm::is_of_one() const {
  return now_ns() - changed_ns_.load(std::memory_order_relaxed) >= kLatelyNs;
}

}  // namespace leptonic
