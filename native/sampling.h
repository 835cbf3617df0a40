// Which requests are traced and which are logged, decided as they arrive: as sampling.py does.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace leptonic {

// A walk over 100 slots in steps of 61; see services/inference/router.py.
constexpr uint64_t kSlots = 100;
constexpr uint64_t kStep = 61;
inline uint64_t slot(uint64_t position) { return position % kSlots * kStep % kSlots; }

struct Sampling {
  double traces_per_s = 0;
  int64_t log_percent = 0;
  double log_per_s = 0;

  bool operator==(const Sampling&) const = default;
};

// Tokens of one second, at least one; full at first.
class Bucket {
 public:
  explicit Bucket(double per_s);
  bool take(int64_t now_ns);

 private:
  double cost_ns_;
  double credit_ns_;
  double paid_ns_;  // until when everything that was taken is paid for
};

class Sampler {
 public:
  struct Marks {
    bool traced;
    bool logged;
  };

  // Said again, the same sampling fills no bucket.
  void configure(const Sampling& sampling);
  Marks arrived(std::string_view parent, int64_t now_ns);

 private:
  uint64_t position_ = 0;
  Sampling sampling_;
  Bucket traces_{0};
  Bucket logs_{0};
};

// A new id instead of what is there, in the same memory; the traceparent of a new span below `parent`.
void draw_id(std::string& id);
std::string place_under(std::string_view parent);

}  // namespace leptonic
