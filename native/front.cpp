#include "front.h"

#include <strings.h>
#include <sys/eventfd.h>

#include <algorithm>

#include "clock.h"

namespace leptonic {

namespace {

constexpr std::string_view kInfer = "/inference.GRPCInferenceService/ModelInfer";
constexpr std::string_view kHealth = "/grpc.health.v1.Health/";
constexpr std::string_view kBearer = "Bearer ";
constexpr uint64_t kTimedOne = 64;
constexpr size_t kSpareMax = 256;
constexpr size_t kToldBytesMax = 64 << 20;  // Python has not heard: more calls are not opened
constexpr size_t kSpareBytesMax = 4 << 10;  // of each buffer

// In time that tells nothing about the token.
bool is_same(std::string_view one, std::string_view other) {
  if (one.size() != other.size()) return false;
  unsigned char differs = 0;
  for (size_t i = 0; i < one.size(); ++i)
    differs |= static_cast<unsigned char>(one[i] ^ other[i]);
  return differs == 0;
}

}  // namespace

void Stage::add(int64_t spent_ns, int64_t times) {
  ns.fetch_add(spent_ns, std::memory_order_relaxed);
  count.fetch_add(times, std::memory_order_relaxed);
}

double Stage::mean_us() const {
  int64_t times = count.load(std::memory_order_relaxed);
  return times ? static_cast<double>(ns.load(std::memory_order_relaxed)) / 1e3 / static_cast<double>(times) : 0;
}

std::shared_ptr<Batcher> Route::choose() const {
  int64_t total = 0;
  for (auto& [_, percent] : shares) total += percent;
  if (total <= 0) return nullptr;
  uint64_t here = position->fetch_add(1, std::memory_order_relaxed) + 1;
  int64_t at = static_cast<int64_t>(slot(here)) * total;
  for (auto& [batcher, percent] : shares)
    if ((at -= percent * static_cast<int64_t>(kSlots)) < 0) return batcher;
  return nullptr;
}

std::shared_ptr<Batcher> Front::batcher(Lane lane) {
  auto made = std::make_shared<Batcher>(std::move(lane), mailbox_, helm_);
  std::lock_guard held(lock_);
  std::erase_if(batchers_, [](auto& one) { return one.expired(); });
  batchers_.push_back(made);
  return made;
}

void Front::route(const std::string& model, std::vector<std::pair<std::string, int64_t>> shares,
                  std::map<std::string, std::shared_ptr<Batcher>, std::less<>> batchers) {
  // Before the lock: who was led here before may be the last to hold a batcher whose guests need
  // the GIL, and who has the GIL may wait for the lock.
  std::shared_ptr<const Routes> before;
  std::lock_guard held(lock_);
  auto routes = std::make_shared<Routes>(*routes_);
  auto known = routes->find(model);
  Route route;
  route.position = known == routes->end() ? std::make_shared<std::atomic<uint64_t>>(0)
                                          : known->second.position;
  for (auto& [version, percent] : shares) route.shares.emplace_back(batchers.at(version), percent);
  route.versions = std::move(batchers);
  if (route.versions.empty()) routes->erase(model);
  else routes->insert_or_assign(model, std::move(route));
  before = std::exchange(routes_, std::move(routes));
  routes_version_.fetch_add(1, std::memory_order_release);
}

void Front::say_goodbye() {
  goodbye_ = true;
  helm_->lend(false);
  mailbox_->post(Mail{Mail::kWake, {}, 0, {}, {}});
}

void Front::close(double patience_s) {
  give_up_ns_ = now_ns() + static_cast<int64_t>(std::clamp(patience_s, 0.0, 1e6) * 1e9);
  say_goodbye();
}

std::vector<Event> Front::events() {
  eventfd_t ignored;
  eventfd_read(events_event_, &ignored);
  std::lock_guard held(lock_);
  told_bytes_ = 0;
  return std::exchange(events_, {});
}

void Front::tell(Event event) {
  helm_->saw(nullptr);
  bool first;
  {
    std::lock_guard held(lock_);
    first = events_.empty();
    told_bytes_ += sizeof event + event.bytes.size() + event.headers.size() + event.peer.size();
    events_.push_back(std::move(event));
  }
  if (first) eventfd_write(events_event_, 1);
}

// Microseconds that a request spends in each.
std::map<std::string, double> Front::stages() {
  std::map<std::string, double> found = {
      {"read", read_.mean_us()}, {"parse", parse_.mean_us()}, {"write", write_.mean_us()}};
  std::vector<std::shared_ptr<Batcher>> batchers;  // let go after the lock, as in `route`
  {
    std::lock_guard held(lock_);
    for (auto& weak : batchers_)
      if (auto one = weak.lock()) batchers.push_back(std::move(one));
  }
  double requests = 0, queue = 0, input = 0, infer = 0, output = 0;
  for (auto& one : batchers) {
    int64_t waiting = 0;
    Tally tally = one->tally(waiting);
    requests += static_cast<double>(tally.requests);
    queue += static_cast<double>(tally.queue_ns);
    for (auto& [_, runs] : tally.batches) {
      input += static_cast<double>(runs.spent.input_ns);
      infer += static_cast<double>(runs.spent.infer_ns);
      output += static_cast<double>(runs.spent.output_ns);
    }
  }
  double scale = requests > 0 ? 1e-3 / requests : 0;
  found["queue"] = queue * scale;
  found["batch"] = input * scale;
  found["compute"] = infer * scale;
  found["serialise"] = output * scale;
  return found;
}

bool Front::is_fast(std::string_view path) const { return path == kInfer; }

bool Front::is_allowed(const Stream& stream) const {
  if (tokens_.empty() || stream.path.starts_with(kHealth)) return true;
  std::string_view given = stream.authorization;
  if (given.size() < kBearer.size() || strncasecmp(given.data(), kBearer.data(), kBearer.size()) != 0)
    return false;
  given.remove_prefix(kBearer.size());
  bool found = false;
  for (auto& token : tokens_) found |= is_same(token, given);
  return found;
}

bool Front::infer(Session& session, Stream& stream, std::string& body) {
  bool timed = ++parsed_ % kTimedOne == 0;
  int64_t began_ns = timed ? now_ns() : 0;
  if (!read_request(std::string_view(body).substr(kPrefixBytes), asked_)) return false;
  std::shared_ptr<Batcher> batcher = led_to();
  if (!batcher || batcher->lane.opaque) return false;
  const Lane& lane = batcher->lane;
  if (!fits(asked_, lane.inputs, lane.outputs, lane.batched, fit_)) return false;
  if (session.unsent() > kUnsentBytesMax) {
    session.finish(stream, kResourceExhausted,
                   std::to_string(session.unsent()) + " bytes of answers wait to be read over this connection");
    return true;
  }
  auto made = request(*batcher, stream, body);
  made->call = {session.serial, stream.id};
  int64_t ticket = batcher->join(made);
  if (timed) parse_.add(now_ns() - began_ns, 1);
  // Closed since the route was read: Python knows who answers now.
  if (ticket == kTooManyRows || ticket == kClosed) {
    body = std::move(made->body);
    return false;
  }
  if (ticket <= 0) {
    auto [code, text] = batcher->refusal(ticket);
    session.finish(stream, code, text, ticket == kFull ? Pairs{{"retry-after", "1"}} : Pairs{});
    return true;
  }
  stream.ticket = ticket;
  if (std::find(joined_.begin(), joined_.end(), batcher) == joined_.end())
    joined_.push_back(batcher);
  stream.batcher = std::move(batcher);
  return true;
}

std::shared_ptr<Batcher> Front::led_to() const {
  auto route = known_routes_->find(asked_.model);
  if (route == known_routes_->end()) return nullptr;
  if (asked_.version.empty()) return route->second.choose();
  auto found = route->second.versions.find(asked_.version);
  return found == route->second.versions.end() ? nullptr : found->second;
}

std::unique_ptr<Request> Front::request(const Batcher& batcher, const Stream& stream,
                                        std::string& body) {
  if (spare_.empty()) spare_.push_back(std::make_unique<Request>());
  auto made = std::move(spare_.back());
  spare_.pop_back();
  made->model = asked_.model;
  made->id = asked_.id;
  made->parent = stream.parent;
  made->rows = fit_.rows;
  made->outputs = fit_.outputs;
  made->arrived_ns = stream.arrived_ns;
  made->deadline_ns = stream.deadline_ns;
  made->timeout_us = asked_.timeout_us;
  made->priority = asked_.priority;
  size_t count = batcher.lane.inputs.size();
  if (!batcher.is_fixed)
    made->shapes.assign(fit_.shapes.begin(), fit_.shapes.begin() + static_cast<ptrdiff_t>(count));
  if (!batcher.is_alike) made->kind = kind_of(batcher.lane, fit_.shapes.data());
  const char* before = body.data();
  made->body.swap(body);
  for (size_t i = 0; i < count; ++i)
    made->raws[i] = {made->body.data() + (fit_.raws[i].data() - before), fit_.raws[i].size()};
  return made;
}

void Front::recycle(std::unique_ptr<Request> request) {
  if (spare_.size() >= kSpareMax) return;
  for (auto* buffer : {&request->body, &request->reply}) {
    if (buffer->capacity() > kSpareBytesMax) std::string().swap(*buffer);
    buffer->clear();
  }
  request->place.clear();
  request->shapes.clear();
  request->kind = 0;
  request->marks = {};
  spare_.push_back(std::move(request));
}

bool Front::opened(Session& session, Stream& stream) {
  if (told_bytes_ > kToldBytesMax) return false;
  tell({Event::kOpened, {session.serial, stream.id}, stream.path, stream.headers, session.peer,
        stream.deadline_ns});
  return true;
}

void Front::message(Session& session, Stream& stream, std::string bytes, bool compressed) {
  tell({Event::kMessage, {session.serial, stream.id}, std::move(bytes), {}, {}, compressed});
}

void Front::ended(Session& session, Stream& stream) {
  tell({Event::kEnded, {session.serial, stream.id}, {}, {}, {}});
}

void Front::gone(Session& session, Stream& stream) {
  tell({Event::kGone, {session.serial, stream.id}, {}, {}, {}});
}

void Front::sent(Session& session, Stream& stream, size_t bytes) {
  tell({Event::kSent, {session.serial, stream.id}, {}, {}, {}, static_cast<int64_t>(bytes)});
}

}  // namespace leptonic
