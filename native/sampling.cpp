#include "sampling.h"

#include <sys/random.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <limits>

namespace leptonic {

namespace {

constexpr double kNs = 1e9;
constexpr std::string_view kDigits = "0123456789abcdef";
constexpr size_t kTraceAt = 3, kTraceHex = 32, kSpanAt = 36, kSpanHex = 16, kFlagsAt = 53;
constexpr size_t kParentChars = 55;

// The kernel's randomness, bought by the page: a call costs more than 16 bytes are worth.
class Dice {
 public:
  uint8_t byte() {
    if (at_ == page_.size()) refill();
    return page_[at_++];
  }

 private:
  void refill() {
    size_t filled = 0;
    while (filled < page_.size()) {
      ssize_t got = getrandom(page_.data() + filled, page_.size() - filled, 0);
      if (got > 0) filled += static_cast<size_t>(got);
    }
    at_ = 0;
  }

  std::array<uint8_t, 4096> page_;
  size_t at_ = page_.size();
};

std::string random_hex(size_t digits) {
  thread_local Dice dice;
  std::string text(digits, '0');
  for (size_t i = 0; i < digits; i += 2) {
    uint8_t byte = dice.byte();
    text[i] = kDigits[byte >> 4];
    text[i + 1] = kDigits[byte & 15];
  }
  return text;
}

bool is_hex(std::string_view text) { return text.find_first_not_of(kDigits) == text.npos; }
bool is_zero(std::string_view text) { return text.find_first_not_of('0') == text.npos; }

// W3C: version-trace-span-flags, neither id zero.
bool is_parent(std::string_view text) {
  if (text.size() != kParentChars) return false;
  if (text[2] != '-' || text[kSpanAt - 1] != '-' || text[kFlagsAt - 1] != '-') return false;
  std::string_view version = text.substr(0, 2), trace = text.substr(kTraceAt, kTraceHex);
  std::string_view span = text.substr(kSpanAt, kSpanHex), flags = text.substr(kFlagsAt);
  return is_hex(version) && version != "ff" && is_hex(trace) && !is_zero(trace) && is_hex(span) &&
         !is_zero(span) && is_hex(flags);
}

bool is_traced(std::string_view parent) {
  return is_parent(parent) && kDigits.find(parent.back()) % 2 == 1;
}

}  // namespace

Bucket::Bucket(double per_s)
    : cost_ns_(per_s > 0 ? kNs / per_s : 0),
      credit_ns_(std::max(kNs, cost_ns_) - cost_ns_),
      paid_ns_(-std::numeric_limits<double>::infinity()) {}

bool Bucket::take(int64_t now_ns) {
  double now = static_cast<double>(now_ns);
  double owed_from = std::max(paid_ns_, now);
  if (cost_ns_ == 0 || owed_from - now > credit_ns_) return false;
  paid_ns_ = owed_from + cost_ns_;
  return true;
}

void Sampler::configure(const Sampling& sampling) {
  if (sampling == sampling_) return;
  sampling_ = sampling;
  traces_ = Bucket(sampling.traces_per_s);
  logs_ = Bucket(sampling.log_per_s);
}

Sampler::Marks Sampler::arrived(std::string_view parent, int64_t now_ns) {
  ++position_;
  Marks marks{};
  marks.traced = is_traced(parent) || traces_.take(now_ns);
  bool sampled = static_cast<int64_t>(slot(position_)) < sampling_.log_percent;
  marks.logged = sampled && logs_.take(now_ns);
  return marks;
}

std::string new_id() { return random_hex(32); }

std::string place_under(std::string_view parent) {
  std::string trace = is_parent(parent) ? std::string(parent.substr(kTraceAt, kTraceHex))
                                        : random_hex(kTraceHex);
  return "00-" + trace + "-" + random_hex(kSpanHex) + "-01";
}

}  // namespace leptonic
