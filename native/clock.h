// The one clock: what Python calls time.monotonic_ns().
#pragma once

#include <ctime>

#include <cstdint>

namespace leptonic {

inline int64_t clock_ns(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return now.tv_sec * int64_t{1'000'000'000} + now.tv_nsec;
}

inline int64_t now_ns() { return clock_ns(CLOCK_MONOTONIC); }

}  // namespace leptonic
