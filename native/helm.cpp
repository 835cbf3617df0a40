#include "helm.h"

#include <cassert>
#include <chrono>

#include "clock.h"

namespace leptonic {

namespace {

constexpr int64_t kAbsentNs = 1'000'000;  // so long nobody may look after the sockets

}  // namespace

bool Helm::take() {
  std::lock_guard held(lock_);
  wanted_ = held_ || !lent_ || handed_over_;
  return !wanted_ && (held_ = true);
}

void Helm::leave() {
  std::lock_guard held(lock_);
  assert(held_);
  held_ = false;
  left_ns_ = now_ns();
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
  return !held_ && (!lent_ || handed_over_ || now_ns() - left_ns_ >= kAbsentNs);
}

// Under load it looks every millisecond; while nobody leaves, not at all.
void Helm::wait() {
  std::unique_lock held(lock_);
  uint64_t seen = leaves_;
  while (!is_free()) {
    asleep_ = held_ && seen == leaves_;
    seen = leaves_;
    if (asleep_) changed_.wait(held);
    else changed_.wait_for(held, std::chrono::nanoseconds(kAbsentNs));
    asleep_ = false;
  }
  held_ = true;
  handed_over_ = wanted_ = false;
}

bool Helm::is_wanted() {
  std::lock_guard held(lock_);
  return lent_ && wanted_;
}

}  // namespace leptonic
