// What other threads ask of the front's thread: answers, and what Python says about its calls.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace leptonic {

using Pairs = std::vector<std::pair<std::string, std::string>>;

// An RPC: connections are numbered and never twice the same, 0 is none.
struct CallId {
  uint64_t connection = 0;
  int32_t stream = 0;
};

struct Request;

struct Mail {
  enum Kind {
    kAnswer,  // status 0 and a message, `bytes` or the request's `reply`: a whole unary answer
    kStatus,  // the end of a call, with `code`, `bytes` (its text) and `trailing`
    kWrite,   // one more message
    kTaken,   // Python has taken a message of so many bytes (`code`)
    kWake,    // look around: a flag has changed
  };
  Kind kind;
  CallId call;
  int code = 0;
  std::string bytes;
  Pairs trailing;
  std::unique_ptr<Request> request;  // goes back to where it was made, to be used again
};

class Mailbox {
 public:
  Mailbox();
  ~Mailbox();
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;

  void post(Mail mail);
  void post(std::vector<Mail>& mails);  // all at once; leaves them empty

  // For the front's thread. It sleeps only after `may_sleep`, and says when it is awake again;
  // `rang`: because of the bell.
  void collect(std::vector<Mail>& mails);
  bool may_sleep();
  void awake(bool rang);
  int descriptor() const { return event_; }

 private:
  void ring();

  std::mutex lock_;
  std::vector<Mail> mails_;
  bool asleep_ = false;  // under `lock_`: who finds it true rings, once
  int event_;
};

}  // namespace leptonic
