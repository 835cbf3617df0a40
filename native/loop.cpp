// The front's thread: the listening socket, the connections, and who is to be seen off.
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <system_error>

#include "clock.h"
#include "front.h"

namespace leptonic {

namespace {

constexpr size_t kReadBytes = 256 << 10;
constexpr size_t kWriteBytes = 256 << 10;
constexpr size_t kConnectionsMax = 4096;
constexpr int kEventsMax = 128;
constexpr int kBacklog = 1024;
constexpr int kSweepMs = 50;                   // how often those who are to go are looked at
constexpr int kStrangersMs = 1000;             // how often those who have not spoken are
constexpr int64_t kStrangerNs = 60'000'000'000;  // for a client to open its HTTP/2
constexpr int kUnheardMs = 90'000;              // for a client to acknowledge what it was sent
constexpr int64_t kFarewellNs = 1'000'000'000;  // for a client to hear the first goodbye
constexpr int64_t kLingerNs = 1'000'000'000;    // for a client to read its last answers
constexpr uint64_t kListener = 0, kMailbox = UINT64_MAX;  // of what epoll tells; else a serial

[[noreturn]] void raise(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

std::string name_of(const sockaddr_storage& address, socklen_t size) {
  char host[NI_MAXHOST], port[NI_MAXSERV];
  auto* any = reinterpret_cast<const sockaddr*>(&address);
  if (getnameinfo(any, size, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV))
    return "unknown";
  if (address.ss_family == AF_INET6) return "ipv6:[" + std::string(host) + "]:" + port;
  return "ipv4:" + std::string(host) + ":" + port;
}

void set(int socket, int level, int option, int value) {
  setsockopt(socket, level, option, &value, sizeof value);
}

class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

int bound(const addrinfo& address, bool shared, const std::string& named) {
  int socket = ::socket(address.ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (socket < 0) raise("socket");
  set(socket, SOL_SOCKET, SO_REUSEADDR, 1);
  if (shared) set(socket, SOL_SOCKET, SO_REUSEPORT, 1);
  if (bind(socket, address.ai_addr, address.ai_addrlen) || ::listen(socket, kBacklog)) {
    int error = errno;
    ::close(socket);
    errno = error;
    raise("listen on " + named);
  }
  return socket;
}

int port_of(int socket) {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  getsockname(socket, reinterpret_cast<sockaddr*>(&address), &size);
  return ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(address).sin6_port
                                             : reinterpret_cast<sockaddr_in&>(address).sin_port);
}

}  // namespace

struct Front::Connection {
  Connection(Desk& desk, uint64_t serial, std::string peer, int socket)
      : session(desk, serial, std::move(peer)), socket(socket) {}
  ~Connection() { ::close(socket); }

  Session session;
  int socket;
  std::string out;
  size_t out_at = 0;
  bool marked = false;      // to be flushed
  bool writable = true;
  uint32_t watched = 0;
  int64_t goodbye_ns = 0;   // when it was said
  int64_t linger_ns = 0;    // everything is said, by both
};

Front::Front(std::vector<std::string> tokens, size_t gathered_max)
    : Desk(gathered_max),
      tokens_(std::move(tokens)),
      mailbox_(std::make_shared<Mailbox>()),
      helm_(std::make_shared<Helm>([this](const Batcher* mine, bool may_sleep) { return round(mine, may_sleep); })),
      routes_(std::make_shared<Routes>()),
      events_event_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      received_(new char[kReadBytes]) {
  epoll_ = epoll_create1(EPOLL_CLOEXEC);
  if (epoll_ < 0 || events_event_ < 0) raise("epoll");
}

Front::~Front() {
  close(0);
  if (thread_.joinable()) thread_.join();
  stop_listening();
  ::close(epoll_);
  ::close(events_event_);
}

int Front::listen(const std::string& host, int port, bool shared) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_flags = AI_PASSIVE;
  hints.ai_socktype = SOCK_STREAM;
  int failed = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
  if (failed)
    throw std::system_error(EADDRNOTAVAIL, std::generic_category(), host + ": " + gai_strerror(failed));
  std::unique_ptr<addrinfo, void (*)(addrinfo*)> owned(found, freeaddrinfo);
  listener_ = bound(*found, shared, host + ":" + std::to_string(port));
  auto add = [&](int descriptor, uint64_t what) {
    epoll_event event{EPOLLIN, {.u64 = what}};
    if (epoll_ctl(epoll_, EPOLL_CTL_ADD, descriptor, &event)) raise("epoll_ctl");
  };
  add(listener_, kListener);
  add(mailbox_->descriptor(), kMailbox);
  helm_->lend(true);
  // The signals are Python's: a thread that is born with them blocked gets none.
  {
    SignalsBlocked blocked;
    thread_ = std::thread(&Front::run, this);
  }
  pthread_setname_np(thread_.native_handle(), "front");
  return port_of(listener_);
}

void Front::run() {
  for (helm_->wait(); !is_done(); helm_->wait()) {
    while (!is_done() && round(nullptr, true) && !helm_->is_wanted()) {}
    helm_->leave();
  }
  connections_.clear();
  tell({Event::kClosed, {}, {}, {}, {}});
}

bool Front::is_done() const {
  int64_t give_up_ns = give_up_ns_;
  // Who is to close may have said so after the goodbye of this round.
  return give_up_ns && told_goodbye_ && listener_ < 0 && (connections_.empty() || now_ns() >= give_up_ns);
}

int Front::patience_ms() const {
  if (!marked_.empty()) return 0;
  if (told_goodbye_ || lingering_ > 0 || deaf_) return kSweepMs;
  return strangers_.empty() ? -1 : kStrangersMs;
}

// Reads everything that is there before the runners hear of it: that makes batches.
bool Front::round(const Batcher* mine, bool may_sleep) {
  if (handle_mail()) may_sleep = false;
  epoll_event events[kEventsMax];
  int timeout_ms = may_sleep && mailbox_->may_sleep() ? patience_ms() : 0;
  int count = epoll_wait(epoll_, events, kEventsMax, timeout_ms);
  auto is_bell = [](const epoll_event& event) { return event.data.u64 == kMailbox; };
  mailbox_->awake(std::any_of(events, events + std::max(0, count), is_bell));
  refresh_routes();
  if (deaf_) hear_listener(true);
  for (int i = 0; i < count; ++i) {
    if (events[i].data.u64 == kListener) accept_all();
    else if (events[i].data.u64 != kMailbox) hear(events[i].data.u64, events[i].events);
  }
  drop_strangers();
  return wake_joined(mine) && (mine == nullptr || !goodbye_);
}

// False: others than `mine` go on, and one of them will take the helm.
bool Front::wake_joined(const Batcher* mine) {
  bool others = false, own = false;
  for (auto& batcher : joined_) {
    helm_->saw(batcher.get());
    if (batcher.get() == mine) own = true;
    else others |= batcher->wake();
  }
  joined_.clear();
  return own || !others;
}

void Front::refresh_routes() {
  uint64_t version = routes_version_.load(std::memory_order_acquire);
  if (version == known_version_) return;
  std::shared_ptr<const Routes> current;
  {
    std::lock_guard held(lock_);
    current = routes_;
  }
  known_routes_.swap(current);
  known_version_ = version;
}

void Front::hear(uint64_t serial, uint32_t what) {
  auto found = connections_.find(serial);
  if (found == connections_.end()) return;
  Connection& connection = *found->second;
  if (what & EPOLLOUT) {
    connection.writable = true;
    mark(connection);
  }
  if (what & (EPOLLIN | EPOLLHUP | EPOLLERR)) read(connection);
}

// And sends what follows from it. True: somebody wants to be looked for.
bool Front::handle_mail() {
  int64_t began_ns = now_ns();
  int answers = 0;
  bool woken = false;
  mailbox_->collect(mails_);
  for (Mail& mail : mails_) {
    auto found = connections_.find(mail.call.connection);
    if (found != connections_.end()) {
      found->second->session.handle(mail);
      mark(*found->second);
    }
    answers += mail.kind == Mail::kAnswer;
    woken |= mail.kind == Mail::kWake;
    if (mail.request) recycle(std::move(mail.request));
  }
  mails_.clear();
  if (goodbye_) begin_goodbye();
  if (told_goodbye_ || lingering_ > 0) see_off();
  flush_marked();
  if (answers > 0) write_.add(now_ns() - began_ns, answers);
  return woken;
}

void Front::accept_all() {
  for (;;) {
    sockaddr_storage address{};
    socklen_t size = sizeof address;
    int socket = accept4(listener_, reinterpret_cast<sockaddr*>(&address), &size,
                         SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (socket < 0) {
      // Who waits makes the listener readable until somebody is accepted: it is let be for a while.
      if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) hear_listener(false);
      return;
    }
    if (connections_.size() >= kConnectionsMax) ::close(socket);
    else admit(socket, name_of(address, size));
  }
}

void Front::hear_listener(bool heard) {
  deaf_ = !heard;
  epoll_event event{heard ? uint32_t{EPOLLIN} : 0, {.u64 = kListener}};
  if (listener_ >= 0) epoll_ctl(epoll_, EPOLL_CTL_MOD, listener_, &event);
}

void Front::admit(int socket, const std::string& peer) {
  set(socket, IPPROTO_TCP, TCP_NODELAY, 1);
  // A client that vanished without a word is found out after 90 s.
  set(socket, SOL_SOCKET, SO_KEEPALIVE, 1);
  set(socket, IPPROTO_TCP, TCP_KEEPIDLE, 60);
  set(socket, IPPROTO_TCP, TCP_KEEPINTVL, 10);
  set(socket, IPPROTO_TCP, TCP_KEEPCNT, 3);
  set(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, kUnheardMs);
  uint64_t serial = ++serials_;
  auto& connection = connections_[serial];
  connection = std::make_unique<Connection>(*this, serial, peer, socket);
  epoll_event event{EPOLLIN, {.u64 = serial}};
  connection->watched = EPOLLIN;
  if (epoll_ctl(epoll_, EPOLL_CTL_ADD, socket, &event)) return drop(*connection);
  strangers_.emplace_back(serial, now_ns());
  mark(*connection);
}

// Who has opened no HTTP/2 for so long never will.
void Front::drop_strangers() {
  int64_t now = strangers_.empty() ? 0 : now_ns();
  while (!strangers_.empty()) {
    auto [serial, since_ns] = strangers_.front();
    auto found = connections_.find(serial);
    bool strange = found != connections_.end() && !found->second->session.has_greeted();
    if (strange && now - since_ns <= kStrangerNs) return;
    strangers_.pop_front();
    if (strange) drop(*found->second);
  }
}

void Front::read(Connection& connection) {
  int64_t began_ns = now_ns();
  ssize_t size = recv(connection.socket, received_.get(), kReadBytes, 0);
  if (size < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (size <= 0) return drop(connection);
  if (connection.linger_ns) return;
  uint64_t before = parsed_;
  if (!connection.session.receive({received_.get(), static_cast<size_t>(size)}, began_ns)) {
    push(connection);
    return drop(connection);
  }
  if (parsed_ != before) read_.add(now_ns() - began_ns, static_cast<int64_t>(parsed_ - before));
  if (told_goodbye_ && connection.session.open_streams()) connection.session.say_goodbye();
  mark(connection);
}

void Front::mark(Connection& connection) {
  if (std::exchange(connection.marked, true)) return;
  marked_.push_back(connection.session.serial);
}

// Who has more to say than a turn allows is marked again.
void Front::flush_marked() {
  turn_.swap(marked_);
  for (uint64_t serial : turn_) {
    auto found = connections_.find(serial);
    if (found == connections_.end()) continue;
    found->second->marked = false;
    flush(*found->second);
  }
  turn_.clear();
}

void Front::flush(Connection& connection) {
  if (connection.linger_ns) return;
  if (!push(connection)) return drop(connection);
  if (connection.writable && connection.session.wants_to_send()) mark(connection);
  if (connection.out.empty() && connection.session.is_over()) {
    shutdown(connection.socket, SHUT_WR);
    connection.linger_ns = now_ns();
    ++lingering_;
  }
  watch(connection);
}

// False when the connection is broken.
bool Front::push(Connection& connection) {
  std::string& out = connection.out;
  if (!connection.session.send(out, kWriteBytes)) return false;
  while (connection.writable && connection.out_at < out.size()) {
    ssize_t size = ::send(connection.socket, out.data() + connection.out_at,
                          out.size() - connection.out_at, MSG_NOSIGNAL);
    if (size >= 0) connection.out_at += static_cast<size_t>(size);
    else if (errno == EAGAIN) connection.writable = false;
    else if (errno != EINTR) return false;
  }
  if (connection.out_at == out.size()) {
    out.clear();
    connection.out_at = 0;
  }
  return true;
}

// A client that does not read is not listened to: what it asks would only pile up.
void Front::watch(Connection& connection) {
  uint32_t wanted = connection.writable ? uint32_t{EPOLLIN} : uint32_t{EPOLLOUT};
  if (wanted == connection.watched) return;
  connection.watched = wanted;
  epoll_event event{wanted, {.u64 = connection.session.serial}};
  epoll_ctl(epoll_, EPOLL_CTL_MOD, connection.socket, &event);
}

void Front::drop(Connection& connection) {
  lingering_ -= connection.linger_ns != 0;
  connections_.erase(connection.session.serial);
}

// Those that come later hear it with their first request, or when the front closes.
void Front::begin_goodbye() {
  bool closes = give_up_ns_ != 0;
  if (closes && listener_ >= 0) {
    accept_all();
    stop_listening();
  }
  if (std::exchange(told_goodbye_, true) && !closes) return;
  for (auto& [_, connection] : connections_) {
    if (connection->session.said_goodbye()) continue;
    connection->session.say_goodbye();
    mark(*connection);
  }
}

// Those who have heard the goodbye, or had time to, and those who have nothing more to say.
void Front::see_off() {
  int64_t now = now_ns();
  std::vector<Connection*> over;
  for (auto& [_, one] : connections_) {
    if (one->session.said_goodbye() && !one->goodbye_ns) one->goodbye_ns = now;
    if (one->goodbye_ns && now - one->goodbye_ns > kFarewellNs) {
      one->session.say_last_goodbye();
      mark(*one);
    }
    if (one->linger_ns && now - one->linger_ns > kLingerNs) over.push_back(one.get());
  }
  for (Connection* one : over) drop(*one);
}

void Front::stop_listening() {
  if (listener_ >= 0) ::close(std::exchange(listener_, -1));
}

}  // namespace leptonic
