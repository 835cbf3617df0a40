// The queue of one served version, between the front's thread, Python's and the runners.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "helm.h"
#include "line.h"
#include "mailbox.h"
#include "sampling.h"
#include "tally.h"
#include "wire.h"

namespace leptonic {

enum Code {
  kOk = 0,
  kDeadlineExceeded = 4,
  kResourceExhausted = 8,
  kUnimplemented = 12,
  kInternal = 13,
  kUnavailable = 14,
  kUnauthenticated = 16,
};

// What a batcher must know of the version behind it.
struct Lane {
  std::string model;
  std::string version;
  std::vector<Tensor> inputs;
  std::vector<Tensor> outputs;
  bool batched;
  bool opaque;  // only requests from Python

  std::string name() const { return "model '" + model + "' version " + version; }
  // Any requests may share a batch.
  bool is_alike() const;
  // Only the rows may differ.
  bool is_fixed() const;
};

// A request that came from Python: its arrays and who waits for it.
struct Guest {
  virtual ~Guest() = default;
  virtual void failed(int code, const std::string& text) = 0;
};

struct Request {
  CallId call;                    // of a request from the wire
  std::unique_ptr<Guest> guest;   // of one from Python
  std::string body;               // the message; `raws` and `model` point into it
  std::array<std::string_view, kTensorsMax> raws;
  std::vector<Shape> shapes;      // unless the signature fixes them
  std::string model;              // as asked
  std::string id;
  std::string parent;             // the caller's traceparent
  std::string place;              // of the request's own span, when traced
  int64_t rows = 1;
  uint64_t kind = 0;
  uint32_t outputs = ~uint32_t{0};
  int64_t arrived_ns = 0;
  int64_t deadline_ns = 0;
  int64_t timeout_us = 0;
  uint64_t priority = 0;
  Sampler::Marks marks{};
  std::string reply;  // the answer, once it is there

  bool is_noted() const { return marks.traced || marks.logged; }
};

using Requests = std::vector<std::unique_ptr<Request>>;

// Which shapes may share a batch. Keyed, so that no client can make two meet.
uint64_t kind_of(const Lane& lane, const Shape* shapes);

struct Refused {
  std::unique_ptr<Request> request;
  int code;
  std::string text;
};

constexpr int64_t kFull = 0, kClosed = -1, kTooManyRows = -2;

class Batcher;

struct OutputView {
  const char* data;
  Shape shape;
};

// Taken: to be answered or failed, once.
class Batch {
 public:
  Batch(std::shared_ptr<Batcher> home, Requests requests, int64_t taken_ns);

  // The rows of all requests of one input. `to` has room for them.
  Shape input_shape(size_t input) const;
  bool is_one_kind() const;
  void gather(size_t input, char* to) const;
  // `views` in the order of the signature, checked. Guests are the caller's to tell.
  void answer(std::vector<OutputView> views);
  void fail(int code, const std::string& text);
  std::vector<std::unique_ptr<Batch>> split();

  const std::shared_ptr<Batcher>& home() const { return home_; }
  // Those from the wire that nobody notes are gone once they are answered: nullptr.
  const Requests& requests() const { return requests_; }
  int64_t start(size_t index) const { return stops_[index] - requests_[index]->rows; }
  int64_t rows() const { return stops_.back(); }
  size_t size() const { return stops_.size(); }
  int64_t taken_ns() const { return taken_ns_; }
  bool is_over() const { return is_over_; }
  bool has_wire() const;
  void begin_gathering();
  void end_gathering();
  void end_inferring();

 private:
  Mail reply(size_t index, std::vector<OutputView>& views);

  std::shared_ptr<Batcher> home_;
  Requests requests_;
  std::vector<int64_t> stops_;
  int64_t taken_ns_;
  int64_t asked_ns_;
  int64_t gathered_ns_;
  int64_t inferred_ns_ = 0;
  bool is_over_ = false;
};

class Batcher : public std::enable_shared_from_this<Batcher> {
 public:
  Batcher(Lane lane, std::shared_ptr<Mailbox> mailbox, std::shared_ptr<Helm> helm);
  ~Batcher();

  const Lane lane;
  const bool is_alike;
  const bool is_fixed;

  void configure(Limits limits, const Sampling& sampling);
  // A ticket, and `request` is taken; kFull, kClosed or kTooManyRows.
  int64_t join(std::unique_ptr<Request>& request);
  // Status and text for kFull or kClosed.
  std::pair<int, std::string> refusal(int64_t ticket);
  // Tells a runner, if one waits, that somebody has joined. True: it will be back at the helm soon.
  bool wake();
  // nullptr when it is not in line.
  std::unique_ptr<Request> leave(int64_t ticket);
  // Blocks. False once it is closed and nobody waits; without a batch when only `late` ones came.
  bool take(std::unique_ptr<Batch>& batch, std::vector<Refused>& late);
  void close();
  Tally tally(int64_t& waiting);

  void count(const Requests& requests, int64_t rows, int64_t taken_ns, const Spent& spent);
  // Of a taken batch that is not counted.
  void over(size_t requests);
  void parted(size_t parts);
  // Counts, and answers those from the wire.
  void fail(const Requests& requests, int code, const std::string& text);
  void deliver(std::vector<Mail>& mails) { mailbox_->post(mails); }

 private:
  bool is_quick() const;
  bool steer(std::unique_lock<std::mutex>& held);
  void rest(std::unique_lock<std::mutex>& held, int64_t wait_ns);
  Refused refused(const Late& late, int64_t now_ns) const;

  std::shared_ptr<Mailbox> mailbox_;
  std::shared_ptr<Helm> helm_;
  std::mutex lock_;  // of everything below
  std::condition_variable changed_;
  Line line_;
  Turn turn_;
  Sampler sampler_;
  Tally tally_;
  uint64_t tickets_ = 0;
  int idle_ = 0;  // runners that look again when `changed_` says so
  int steers_ = 0;  // runners at the helm, or on their way from it: the next may have it already
  bool closed_ = false;
};

}  // namespace leptonic
