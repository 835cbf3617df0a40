#include "sampling.h"

#include <sys/random.h>

#include <algorithm>
#include <bit>
#include <limits>

namespace leptonic {

namespace {

constexpr double kNs = 1e9;
constexpr std::string_view kDigits = "0123456789abcdef";
constexpr size_t kTraceAt = 3, kTraceHex = 32, kSpanAt = 36, kSpanHex = 16, kFlagsAt = 53;
constexpr size_t kParentChars = 55;
constexpr size_t kIdHex = 32;

// xoshiro256** (Blackman and Vigna), begun by the kernel: ids must differ, nobody's secret hangs on them.
class Dice {
 public:
  Dice() {
    size_t filled = 0;
    while (filled < sizeof state_) {
      ssize_t got = getrandom(reinterpret_cast<char*>(state_) + filled, sizeof state_ - filled, 0);
      if (got > 0) filled += static_cast<size_t>(got);
    }
  }

  uint64_t next() {
    uint64_t drawn = std::rotl(state_[1] * 5, 7) * 9, kept = state_[1] << 17;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= kept;
    state_[3] = std::rotl(state_[3], 45);
    return drawn;
  }

 private:
  uint64_t state_[4];
};

void draw_hex(std::string& text, size_t digits) {
  thread_local Dice dice;
  text.resize(digits);
  uint64_t drawn = 0;
  for (size_t i = 0; i < digits; ++i, drawn >>= 4) {
    if (i % 16 == 0) drawn = dice.next();
    text[i] = kDigits[drawn & 15];
  }
}

std::string random_hex(size_t digits) {
  std::string text;
  draw_hex(text, digits);
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

void draw_id(std::string& id) { draw_hex(id, kIdHex); }

std::string place_under(std::string_view parent) {
  std::string trace = is_parent(parent) ? std::string(parent.substr(kTraceAt, kTraceHex))
                                        : random_hex(kTraceHex);
  return "00-" + trace + "-" + random_hex(kSpanHex) + "-01";
}

}  // namespace leptonic
