#include "batcher.h"

#include <sys/random.h>

#include <algorithm>
#include <cassert>
#include <chrono>

#include "clock.h"

namespace leptonic {

namespace {

constexpr int64_t kNsInMs = 1'000'000;
constexpr int64_t kQuickNs = 300'000;  // a batch: so long the sockets may wait for its runner
constexpr int64_t kQuickAloneNs = 3'000'000;  // where nobody else is asked
constexpr int64_t kAwayPaces = 2;

Limits within(Limits limits, const Lane& lane) {
  if (lane.batched) return limits;
  limits.max_batch_size = 1;
  limits.preferred_batch_size.clear();
  return limits;
}

std::unique_ptr<Request> owned(void* request) {
  return std::unique_ptr<Request>(static_cast<Request*>(request));
}

}  // namespace

bool Lane::is_alike() const {
  if (!batched) return true;
  return std::all_of(inputs.begin(), inputs.end(), [](const Tensor& tensor) {
    return std::all_of(tensor.shape.begin() + !tensor.shape.empty(), tensor.shape.end(), [](auto n) { return n > 0; });
  });
}

bool Lane::is_fixed() const {
  auto is_open = [&](const Tensor& tensor) {
    auto from = tensor.shape.begin() + (batched && !tensor.shape.empty());
    return std::find(from, tensor.shape.end(), -1) != tensor.shape.end();
  };
  return std::none_of(inputs.begin(), inputs.end(), is_open);
}

uint64_t kind_of(const Lane& lane, const Shape* shapes) {
  static const uint64_t key = [] {
    uint64_t random = 0;
    while (getrandom(&random, sizeof random, 0) != sizeof random) {}
    return random;
  }();
  uint64_t kind = key;
  for (size_t input = 0; input < lane.inputs.size(); ++input) {
    for (size_t dim = 1; dim < shapes[input].rank; ++dim) {
      kind = (kind ^ static_cast<uint64_t>(shapes[input].dims[dim])) * 0x9e3779b97f4a7c15;
      kind ^= kind >> 29;
    }
  }
  return kind;
}

Batcher::Batcher(Lane given, std::shared_ptr<Mailbox> mailbox, std::shared_ptr<Helm> helm)
    : lane(std::move(given)),
      is_alike(lane.is_alike()),
      is_fixed(lane.is_fixed()),
      mailbox_(std::move(mailbox)),
      helm_(std::move(helm)),
      line_(within(Limits{}, lane)) {}

Batcher::~Batcher() {
  Requests left;
  for (void* request : line_.dissolve()) left.push_back(owned(request));
  if (left.empty()) return;
  std::string text = lane.name() + " is being unloaded";
  fail(left, kUnavailable, text);
  for (auto& request : left)
    if (request->guest) request->guest->failed(kUnavailable, text);
}

void Batcher::configure(Limits limits, const Sampling& sampling) {
  std::lock_guard held(lock_);
  line_.configure(within(std::move(limits), lane));
  sampler_.configure(sampling);
  changed_.notify_one();
}

int64_t Batcher::join(std::unique_ptr<Request>& request) {
  std::lock_guard held(lock_);
  if (closed_) return kClosed;
  Request& one = *request;
  if (one.rows > line_.limits().max_batch_size) return kTooManyRows;
  if (!line_.join(tickets_ + 1, one.rows, one.kind, one.arrived_ns, one.deadline_ns, one.timeout_us,
                  one.priority, &one)) {
    tally_.failed(kResourceExhausted, 1, 0);
    return kFull;
  }
  one.marks = sampler_.arrived(one.parent, one.arrived_ns);
  request.release();
  return static_cast<int64_t>(++tickets_);
}

std::pair<int, std::string> Batcher::refusal(int64_t ticket) {
  if (ticket != kFull) return {kUnavailable, lane.name() + " is being unloaded"};
  std::lock_guard held(lock_);
  return {kResourceExhausted, "exceeds maximum queue size of " + lane.name() + ": " +
                                  std::to_string(line_.waiting()) + " requests wait already"};
}

bool Batcher::wake() {
  std::lock_guard held(lock_);
  if (line_.waiting() == 0) return false;
  if (idle_ > 0) changed_.notify_one();
  else if (steers_ > 0) mailbox_->post(Mail{Mail::kWake, {}, 0, {}, {}});
  return idle_ > 0 && is_quick();
}

std::unique_ptr<Request> Batcher::leave(int64_t ticket) {
  std::lock_guard held(lock_);
  auto request = owned(line_.leave(static_cast<uint64_t>(ticket)));
  if (request) changed_.notify_one();
  return request;
}

bool Batcher::take(std::unique_ptr<Batch>& batch, std::vector<Refused>& late) {
  Requests taken;
  int64_t now = 0;
  {
    std::unique_lock held(lock_);
    // First what was answered goes out, and who has come meanwhile comes into the line.
    bool steers = is_quick() && helm_->take() && steer(held);
    for (;;) {
      now = now_ns();
      line_.take(now, turn_, idle_ + 1);
      bool over = closed_ && line_.waiting() == 0;
      if (over || !turn_.batch.empty() || !turn_.late.empty()) break;
      if (steers && turn_.wait_ns == 0) {
        steers = steer(held);
        continue;
      }
      if (std::exchange(steers, false)) helm_->hand_over();
      rest(held, turn_.wait_ns);
    }
    if (steers) is_quick() ? helm_->leave(kAwayPaces * line_.pace_ns()) : helm_->hand_over();
    if (turn_.batch.empty() && turn_.late.empty()) return false;
    taken.reserve(turn_.batch.size());
    for (const Place& place : turn_.batch) taken.push_back(owned(place.request));
    for (const Late& one : turn_.late) late.push_back(refused(one, now));
    if (idle_ > 0 && line_.waiting() > 0) changed_.notify_one();
  }
  for (Refused& one : late) {
    Requests alone;
    alone.push_back(std::move(one.request));
    fail(alone, one.code, one.text);
    one.request = std::move(alone.front());
  }
  if (!taken.empty()) batch = std::make_unique<Batch>(shared_from_this(), std::move(taken), now);
  return true;
}

Refused Batcher::refused(const Late& late, int64_t now_ns) const {
  auto request = owned(late.place.request);
  if (!late.by_client) return {std::move(request), kUnavailable, "Request timeout expired"};
  int64_t waited_ms = (now_ns - request->arrived_ns) / kNsInMs;
  return {std::move(request), kDeadlineExceeded,
          lane.name() + ": waited " + std::to_string(waited_ms) + " ms for its turn"};
}

// As far as it is known: whoever has run the last batches is back so soon.
bool Batcher::is_quick() const {
  int64_t pace_ns = line_.pace_ns();
  if (pace_ns == 0 || line_.limits().max_queue_delay_ns > 0) return false;
  return pace_ns <= kQuickNs || (pace_ns <= kQuickAloneNs && helm_->is_of_one());
}

// A turn over the sockets. False: it is not at the helm any more.
bool Batcher::steer(std::unique_lock<std::mutex>& held) {
  bool may_sleep = line_.waiting() == 0 && !closed_;
  ++steers_;
  held.unlock();
  bool goes_on = helm_->round(this, may_sleep);
  if (!goes_on) helm_->leave();
  held.lock();
  --steers_;
  return goes_on;
}

void Batcher::rest(std::unique_lock<std::mutex>& held, int64_t wait_ns) {
  ++idle_;
  if (wait_ns > 0) changed_.wait_for(held, std::chrono::nanoseconds(wait_ns));
  else changed_.wait(held);
  --idle_;
}

void Batcher::close() {
  std::lock_guard held(lock_);
  closed_ = true;
  changed_.notify_all();
  if (steers_ > 0) mailbox_->post(Mail{Mail::kWake, {}, 0, {}, {}});
}

Tally Batcher::tally(int64_t& waiting) {
  std::lock_guard held(lock_);
  waiting = line_.waiting();
  return tally_;
}

void Batcher::count(const Requests& requests, int64_t rows, int64_t taken_ns, const Spent& spent) {
  std::vector<int64_t> arrived;
  arrived.reserve(requests.size());
  for (auto& request : requests) arrived.push_back(request->arrived_ns);
  std::lock_guard held(lock_);
  int64_t ended_ns = tally_.answered(arrived, rows, taken_ns, spent);
  line_.over(static_cast<int64_t>(requests.size()));
  line_.answered(static_cast<int64_t>(requests.size()), ended_ns - taken_ns, ended_ns);
}

void Batcher::over(size_t requests) {
  std::lock_guard held(lock_);
  line_.over(static_cast<int64_t>(requests));
}

void Batcher::parted(size_t parts) {
  std::lock_guard held(lock_);
  line_.parted(static_cast<int64_t>(parts));
}

void Batcher::fail(const Requests& requests, int code, const std::string& text) {
  int64_t now = now_ns(), spent = 0;
  std::vector<Mail> mails;
  for (auto& request : requests) {
    spent += now - request->arrived_ns;
    if (!request->guest) mails.push_back({Mail::kStatus, request->call, code, text, {}});
  }
  {
    std::lock_guard held(lock_);
    tally_.failed(code, static_cast<int64_t>(requests.size()), spent);
  }
  if (!mails.empty()) deliver(mails);
}

}  // namespace leptonic
