// One HTTP/2 connection that speaks gRPC: bytes in, calls out; answers in, bytes out. Knows no
// socket and no thread.
#pragma once

#include <nghttp2/nghttp2.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "mailbox.h"
#include "pool.h"

namespace leptonic {

constexpr size_t kMessageBytesMax = 64 << 20;
constexpr size_t kHeaderBytesMax = 64 << 10;
constexpr uint32_t kStreamsMax = 1024;
constexpr size_t kHeldBytesMax = 64 << 20;      // of a connection: complete and not answered
constexpr size_t kPartialBytesMax = 128 << 20;  // of a connection: messages that are still coming
constexpr size_t kUnreadBytesMax = 1 << 20;     // of a stream: messages Python has not taken
constexpr size_t kMessageCost = 128;            // of a message that Python has not taken, beside its bytes
constexpr size_t kUnsentBytesMax = 256 << 20;   // of a connection: answers the client does not read

class Batcher;

struct Stream {
  int32_t id = 0;  // 0: free
  // Fast: one message, then perhaps into a line. Slow: Python's. Over: has its answer.
  enum Way { kFast, kSlow, kOver } way = kFast;

  std::string path;
  std::string method;
  std::string content_type;
  std::string authorization;
  std::string encoding;
  std::string parent;   // traceparent
  std::string headers;  // all that are no pseudo headers: name, NUL, value, NUL
  size_t header_bytes = 0;
  int64_t arrived_ns = 0;
  int64_t deadline_ns = 0;

  std::string body;      // what came of the next message, with its prefix
  bool ended = false;    // the client has sent its last
  size_t held = 0;       // bytes of complete messages that are not answered, or not taken by Python
  size_t owed = 0;       // bytes that the stream's window does not have back yet

  std::string out;
  size_t out_at = 0;
  size_t sent = 0;        // since Python was told last
  bool responding = false;
  bool deferred = false;  // nothing to send for now
  bool finished = false;
  int code = 0;
  std::string text;
  Pairs trailing;

  std::shared_ptr<Batcher> batcher;  // where it waits, with this ticket
  int64_t ticket = 0;
};

class Session;

// Whoever has sessions: the front.
class Desk {
 public:
  explicit Desk(size_t gathered_max = SIZE_MAX) : gathered_max(gathered_max) {}
  virtual ~Desk() = default;

  // Bytes of requests that are coming or not answered, of all sessions.
  std::atomic<size_t> gathered{0};
  const size_t gathered_max;
  Pool pool;  // of its sessions; outlives them

  // By who is at the helm: one thread at a time writes, and no bus is locked for it.
  void gather(size_t bytes) {
    gathered.store(gathered.load(std::memory_order_relaxed) + bytes, std::memory_order_relaxed);
  }
  void let_go(size_t bytes) { gather(-bytes); }

  virtual bool is_fast(std::string_view path) const = 0;
  virtual bool is_allowed(const Stream& stream) const = 0;
  // `body` is the whole message of a fast call, with its prefix. False: it is left, and Python is
  // to look at it. True: it is taken, and some buffer that is not needed is there instead.
  virtual bool infer(Session& session, Stream& stream, std::string& body) = 0;
  // False: too much waits for Python already.
  virtual bool opened(Session& session, Stream& stream) = 0;
  virtual void message(Session& session, Stream& stream, std::string bytes, bool compressed) = 0;
  virtual void ended(Session& session, Stream& stream) = 0;
  // The client has gone before its answer.
  virtual void gone(Session& session, Stream& stream) = 0;
  // The client has read so many bytes of what Python wrote.
  virtual void sent(Session& session, Stream& stream, size_t bytes) = 0;
};

// What it counts, in bytes; `Desk::gathered` is partial and held, of all sessions.
//             added                         subtracted
//   partial   data comes (on_data)          its message is complete (hold), or the call is over
//   held      a message is complete (hold)  Python takes it (handle), or the call is over (finish)
//   owed      data comes (on_data)          the client may send as much again (refill)
//   unsent    an answer is written (write)  it is sent (read_out), or its stream is gone (release)
class Session {
 public:
  Session(Desk& desk, uint64_t serial, std::string peer);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  const uint64_t serial;
  const std::string peer;

  // False when this is no HTTP/2 (any more).
  bool receive(std::string_view bytes, int64_t now_ns);
  // Appends what is to be sent, until `out` is so long. False as of `receive`.
  bool send(std::string& out, size_t bytes_max);
  // Whether the client has opened its HTTP/2.
  bool has_greeted() const { return greeted_; }
  bool wants_to_send() const { return nghttp2_session_want_write(http_) != 0; }
  bool is_over() const;
  size_t open_streams() const { return open_; }
  size_t unsent() const { return unsent_; }

  // What Python or a batcher says about a call; nothing happens when it is over.
  void handle(Mail& mail);
  void finish(Stream& stream, int code, std::string text, Pairs trailing = {});
  // Tells the client to open no more streams here; the last word follows once it has heard.
  void say_goodbye();
  void say_last_goodbye();
  bool said_goodbye() const { return goodbye_; }

 private:
  struct Callbacks;
  friend struct Callbacks;

  Stream& acquire(int32_t id);
  void release(Stream& stream);
  Stream* find(int32_t id);

  void on_header(Stream& stream, std::string_view name, std::string_view value);
  void on_opened(Stream& stream);
  void on_data(Stream& stream, std::string_view bytes);
  void on_ended(Stream& stream);
  bool infer(Stream& stream);
  bool check_size(Stream& stream);
  void to_python(Stream& stream);
  void pass_messages(Stream& stream);
  void hold(Stream& stream, size_t bytes, size_t cost = 0);
  void refill(Stream& stream, size_t given_back);
  void refill_connection();
  void write(Stream& stream, std::string& bytes);
  void respond(Stream& stream);
  void refuse_http(Stream& stream, const char* status);
  ssize_t read_out(Stream& stream, uint8_t* to, size_t room, uint32_t* flags);
  void submit_trailer(Stream& stream);

  Desk& desk_;
  nghttp2_session* http_ = nullptr;
  std::deque<Stream> streams_;  // where they stay
  std::vector<Stream*> free_;
  Stream* latest_ = nullptr;  // that was asked for
  size_t open_ = 0;
  int64_t now_ns_ = 0;
  size_t held_ = 0;
  size_t partial_ = 0;
  size_t owed_ = 0;    // bytes that the connection's window does not have back yet
  size_t unsent_ = 0;
  bool greeted_ = false;
  bool goodbye_ = false;
  bool last_goodbye_ = false;
};

}  // namespace leptonic
