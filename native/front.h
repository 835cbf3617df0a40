// The gRPC door: a listening socket, one thread, and what the requests are led to.
#pragma once

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "batcher.h"
#include "session.h"

namespace leptonic {

// A model's versions, and which of them answers who names none.
struct Route {
  std::vector<std::pair<std::shared_ptr<Batcher>, int64_t>> shares;  // in percent
  std::map<std::string, std::shared_ptr<Batcher>, std::less<>> versions;
  std::shared_ptr<std::atomic<uint64_t>> position;  // goes on when the route changes

  // nullptr when nobody has a share.
  std::shared_ptr<Batcher> choose() const;
};

using Routes = std::map<std::string, Route, std::less<>>;

// What Python hears of a call that the front does not answer by itself.
struct Event {
  enum Kind { kOpened, kMessage, kEnded, kGone, kSent, kClosed };
  Kind kind;
  CallId call;
  std::string bytes;    // the message; of `kOpened` the method
  std::string headers;  // name, NUL, value, NUL
  std::string peer;
  int64_t number = 0;   // the deadline, the compressed flag, or the bytes sent
};

// Sums in ns of what was timed, and how often it was.
struct Stage {
  std::atomic<int64_t> ns{0};
  std::atomic<int64_t> count{0};

  void add(int64_t spent_ns, int64_t times);
  double mean_us() const;
};

// The loop and its connections live in loop.cpp; what it is asked and tells, in front.cpp.
class Front : public Desk {
 public:
  // `gathered_max`: bytes of requests of all clients together.
  Front(std::vector<std::string> tokens, size_t gathered_max);
  ~Front() override;

  // The bound port. Raises std::system_error.
  int listen(const std::string& host, int port, bool shared);
  std::shared_ptr<Batcher> batcher(Lane lane);
  void route(const std::string& model, std::vector<std::pair<std::string, int64_t>> shares,
             std::map<std::string, std::shared_ptr<Batcher>, std::less<>> batchers);
  void say_goodbye();
  // Once everything is answered or `patience_s` are over, the event kClosed comes.
  void close(double patience_s);
  void post(Mail mail) { mailbox_->post(std::move(mail)); }
  // What has happened; `events_descriptor` is readable when there is something.
  std::vector<Event> events();
  int events_descriptor() const { return events_event_; }
  std::map<std::string, double> stages();

 private:
  struct Connection;

  bool is_fast(std::string_view path) const override;
  bool is_allowed(const Stream& stream) const override;
  bool infer(Session& session, Stream& stream, std::string& body) override;
  bool opened(Session& session, Stream& stream) override;
  void message(Session& session, Stream& stream, std::string bytes, bool compressed) override;
  void ended(Session& session, Stream& stream) override;
  void gone(Session& session, Stream& stream) override;
  void sent(Session& session, Stream& stream, size_t bytes) override;

  std::shared_ptr<Batcher> led_to() const;
  std::unique_ptr<Request> request(const Batcher& batcher, const Stream& stream, std::string& body);
  void recycle(std::unique_ptr<Request> request);
  void tell(Event event);

  void run();
  bool round(const Batcher* mine, bool may_sleep);
  bool wake_joined(const Batcher* mine);
  void hear(uint64_t serial, uint32_t what);
  void refresh_routes();
  bool handle_mail();
  void accept_all();
  void hear_listener(bool heard);
  void drop_strangers();
  void admit(int socket, const std::string& peer);
  void read(Connection& connection);
  void mark(Connection& connection);
  void flush_marked();
  void flush(Connection& connection);
  bool push(Connection& connection);
  void watch(Connection& connection);
  void drop(Connection& connection);
  void begin_goodbye();
  void see_off();
  bool is_done() const;
  int patience_ms() const;
  void stop_listening();

  std::vector<std::string> tokens_;
  std::shared_ptr<Mailbox> mailbox_;
  std::shared_ptr<Helm> helm_;
  std::thread thread_;
  int epoll_ = -1;
  int listener_ = -1;

  std::mutex lock_;  // of the routes, the events and the batchers that were made
  std::shared_ptr<const Routes> routes_;
  std::vector<std::weak_ptr<Batcher>> batchers_;
  std::vector<Event> events_;
  std::atomic<size_t> told_bytes_{0};  // of `events_`
  int events_event_;
  std::atomic<uint64_t> routes_version_{1};
  std::atomic<bool> goodbye_{false};
  std::atomic<int64_t> give_up_ns_{0};  // 0: nobody closes

  // Of who is at the helm.
  std::shared_ptr<const Routes> known_routes_;
  uint64_t known_version_ = 0;
  std::unordered_map<uint64_t, std::unique_ptr<Connection>> connections_;
  uint64_t serials_ = 0;
  std::vector<uint64_t> marked_;
  std::vector<uint64_t> turn_;
  int lingering_ = 0;
  bool deaf_ = false;  // to the listener: there are no descriptors for who comes
  std::deque<std::pair<uint64_t, int64_t>> strangers_;  // by age: serial, since when; some have spoken
  std::vector<std::shared_ptr<Batcher>> joined_;
  std::vector<Mail> mails_;
  Requests spare_;  // used, and to be used again: their buffers are worth more than they
  std::unique_ptr<char[]> received_;
  Asked asked_;
  Fit fit_;
  bool told_goodbye_ = false;
  uint64_t parsed_ = 0;
  Stage read_, parse_, write_;
};

}  // namespace leptonic
