#include "session.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <new>

#include "batcher.h"
#include "clock.h"
#include "headers.h"

namespace leptonic {

namespace {

constexpr uint32_t kStreamWindow = 1 << 20;
constexpr int32_t kConnectionWindow = 16 << 20;
constexpr size_t kKeptBytes = 4 << 10;        // of a buffer that the next stream uses again
constexpr size_t kReservedBytes = 256 << 10;  // before they have come: more is only a claim
constexpr size_t kToldBytes = 256 << 10;      // sent, before Python is told
constexpr size_t kOwedBytes = 64 << 10;       // of a window, before nghttp2 is told: it waits for half of one

using Nv = nghttp2_nv;

// Both texts live as long as the program.
Nv constant(std::string_view name, std::string_view value) {
  return {reinterpret_cast<uint8_t*>(const_cast<char*>(name.data())),
          reinterpret_cast<uint8_t*>(const_cast<char*>(value.data())), name.size(), value.size(),
          NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE};
}

Nv copied(std::string_view name, std::string_view value) {
  Nv nv = constant(name, value);
  nv.flags = NGHTTP2_NV_FLAG_NONE;
  return nv;
}

const Nv kStatus200 = constant(":status", "200");
const Nv kContentType = constant("content-type", "application/grpc");
const Nv kGrpcOk = constant("grpc-status", "0");

size_t message_bytes(std::string_view prefix) {
  size_t size = 0;
  for (size_t i = 1; i < kPrefixBytes; ++i) size = size << 8 | static_cast<uint8_t>(prefix[i]);
  return size;
}

void wipe(std::string& buffer) {
  if (buffer.capacity() > kKeptBytes) std::string().swap(buffer);
  else buffer.clear();
}

struct Statuses {
  std::vector<Nv> nvs;
  std::string code;
  std::string text;

  Statuses(const Stream& stream) : code(std::to_string(stream.code)), text(encoded(stream.text)) {
    nvs.push_back(copied("grpc-status", code));
    if (!text.empty()) nvs.push_back(copied("grpc-message", text));
    for (auto& [name, value] : stream.trailing) nvs.push_back(copied(name, value));
  }
};

}  // namespace

// nghttp2's callbacks -> the session's methods.
struct Session::Callbacks {
  static Session& self(void* user) { return *static_cast<Session*>(user); }

  static int begin_headers(nghttp2_session*, const nghttp2_frame* frame, void* user) {
    if (frame->headers.cat == NGHTTP2_HCAT_REQUEST) self(user).acquire(frame->hd.stream_id);
    return 0;
  }

  static int header(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name,
                    size_t name_size, const uint8_t* value, size_t value_size, uint8_t, void* user) {
    Stream* stream = self(user).find(frame->hd.stream_id);
    if (stream && frame->hd.type == NGHTTP2_HEADERS && frame->headers.cat == NGHTTP2_HCAT_REQUEST)
      self(user).on_header(*stream, {reinterpret_cast<const char*>(name), name_size},
                           {reinterpret_cast<const char*>(value), value_size});
    return 0;
  }

  static int data(nghttp2_session*, uint8_t, int32_t id, const uint8_t* bytes, size_t size,
                  void* user) {
    Stream* stream = self(user).find(id);
    if (stream) self(user).on_data(*stream, {reinterpret_cast<const char*>(bytes), size});
    else nghttp2_session_consume(self(user).http_, id, size);
    return 0;
  }

  static int frame(nghttp2_session*, const nghttp2_frame* frame, void* user) {
    Session& session = self(user);
    session.greeted_ = true;
    if (frame->hd.type == NGHTTP2_PING && frame->hd.flags & NGHTTP2_FLAG_ACK && session.goodbye_)
      session.say_last_goodbye();
    if (frame->hd.type != NGHTTP2_HEADERS && frame->hd.type != NGHTTP2_DATA) return 0;
    Stream* stream = session.find(frame->hd.stream_id);
    if (!stream) return 0;
    if (frame->hd.type == NGHTTP2_HEADERS && frame->headers.cat == NGHTTP2_HCAT_REQUEST)
      session.on_opened(*stream);
    if (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) session.on_ended(*stream);
    return 0;
  }

  static int sent(nghttp2_session*, const nghttp2_frame* frame, void* user) {
    bool last = frame->hd.type == NGHTTP2_HEADERS && frame->hd.flags & NGHTTP2_FLAG_END_STREAM;
    Stream* stream = last ? self(user).find(frame->hd.stream_id) : nullptr;
    // Answered before it has said everything: it need not go on.
    if (stream && !stream->ended)
      nghttp2_submit_rst_stream(self(user).http_, NGHTTP2_FLAG_NONE, stream->id, NGHTTP2_NO_ERROR);
    return 0;
  }

  // An answer whose headers are more than may be sent: its client need not wait for it.
  static int not_sent(nghttp2_session* http, const nghttp2_frame* frame, int, void* user) {
    if (frame->hd.type == NGHTTP2_HEADERS && self(user).find(frame->hd.stream_id))
      nghttp2_submit_rst_stream(http, NGHTTP2_FLAG_NONE, frame->hd.stream_id, NGHTTP2_INTERNAL_ERROR);
    return 0;
  }

  static int closed(nghttp2_session*, int32_t id, uint32_t, void* user) {
    if (Stream* stream = self(user).find(id)) self(user).release(*stream);
    return 0;
  }

  static ssize_t read(nghttp2_session*, int32_t, uint8_t* to, size_t room, uint32_t* flags,
                      nghttp2_data_source* source, void* user) {
    return self(user).read_out(*static_cast<Stream*>(source->ptr), to, room, flags);
  }

  static nghttp2_session_callbacks* table() {
    nghttp2_session_callbacks* made = nullptr;
    if (nghttp2_session_callbacks_new(&made) != 0) throw std::bad_alloc();
    nghttp2_session_callbacks_set_on_begin_headers_callback(made, begin_headers);
    nghttp2_session_callbacks_set_on_header_callback(made, header);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(made, data);
    nghttp2_session_callbacks_set_on_frame_recv_callback(made, frame);
    nghttp2_session_callbacks_set_on_frame_send_callback(made, sent);
    nghttp2_session_callbacks_set_on_frame_not_send_callback(made, not_sent);
    nghttp2_session_callbacks_set_on_stream_close_callback(made, closed);
    return made;
  }

  static nghttp2_option* options() {
    nghttp2_option* made = nullptr;
    if (nghttp2_option_new(&made) != 0) throw std::bad_alloc();
    nghttp2_option_set_no_auto_window_update(made, 1);
    return made;
  }
};

Session::Session(Desk& desk, uint64_t number, std::string from)
    : serial(number), peer(std::move(from)), desk_(desk) {
  static nghttp2_session_callbacks* callbacks = Callbacks::table();
  static nghttp2_option* options = Callbacks::options();
  if (nghttp2_session_server_new3(&http_, callbacks, this, options, desk_.pool.memory()) != 0) throw std::bad_alloc();
  const nghttp2_settings_entry settings[] = {
      {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, kStreamsMax},
      {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, kStreamWindow},
      {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, kHeaderBytesMax},
#if NGHTTP2_VERSION_NUM >= 0x013000
      // No tree of who waits for whom: 7 % of a request's CPU, and gRPC's clients ask for none.
      {NGHTTP2_SETTINGS_NO_RFC7540_PRIORITIES, 1},
#endif
  };
  nghttp2_submit_settings(http_, NGHTTP2_FLAG_NONE, settings, std::size(settings));
  nghttp2_session_set_local_window_size(http_, NGHTTP2_FLAG_NONE, 0, kConnectionWindow);
}

Session::~Session() {
  for (Stream& stream : streams_)
    if (stream.id != 0) release(stream);
  nghttp2_session_del(http_);
}

bool Session::receive(std::string_view bytes, int64_t now_ns) {
  now_ns_ = now_ns;
  auto* at = reinterpret_cast<const uint8_t*>(bytes.data());
  return nghttp2_session_mem_recv(http_, at, bytes.size()) == static_cast<ssize_t>(bytes.size());
}

bool Session::send(std::string& out, size_t bytes_max) {
  while (out.size() < bytes_max) {
    const uint8_t* bytes = nullptr;
    ssize_t size = nghttp2_session_mem_send(http_, &bytes);
    if (size < 0) return false;
    if (size == 0) break;
    out.append(reinterpret_cast<const char*>(bytes), static_cast<size_t>(size));
  }
  return true;
}

bool Session::is_over() const {
  return !nghttp2_session_want_read(http_) && !nghttp2_session_want_write(http_);
}

Stream& Session::acquire(int32_t id) {
  if (free_.empty()) free_.push_back(&streams_.emplace_back());
  Stream& stream = *free_.back();
  free_.pop_back();
  stream.id = id;
  stream.arrived_ns = now_ns_;
  nghttp2_session_set_stream_user_data(http_, id, &stream);
  latest_ = &stream;
  ++open_;
  return stream;
}

void Session::release(Stream& stream) {
  if (stream.batcher) stream.batcher->leave(stream.ticket);
  if (stream.way == Stream::kSlow && !stream.finished) desk_.gone(*this, stream);
  partial_ -= stream.body.size();
  held_ -= stream.held;
  desk_.let_go(stream.body.size() + stream.held);
  unsent_ -= stream.out.size() - stream.out_at;
  for (auto* text : {&stream.path, &stream.method, &stream.content_type, &stream.authorization, &stream.encoding,
                     &stream.parent, &stream.headers, &stream.body, &stream.out, &stream.text})
    wipe(*text);
  stream.trailing.clear();
  stream.batcher.reset();
  stream.way = Stream::kFast;
  stream.header_bytes = stream.held = stream.owed = stream.out_at = stream.sent = 0;
  stream.deadline_ns = stream.ticket = 0;
  stream.ended = stream.responding = stream.deferred = stream.finished = false;
  stream.id = stream.code = 0;
  free_.push_back(&stream);
  --open_;
  assert(open_ > 0 || (held_ == 0 && partial_ == 0 && unsent_ == 0));
  refill_connection();
}

// Each header of a request asks for the same one. A stream that is free has the id 0.
Stream* Session::find(int32_t id) {
  if (latest_ && latest_->id == id) return latest_;
  auto* found = static_cast<Stream*>(nghttp2_session_get_stream_user_data(http_, id));
  if (found) latest_ = found;
  return found;
}

void Session::on_header(Stream& stream, std::string_view name, std::string_view value) {
  stream.header_bytes += name.size() + value.size();
  if (stream.header_bytes > kHeaderBytesMax) return;
  if (name.starts_with(':')) {
    if (name == ":path") stream.path = value;
    else if (name == ":method") stream.method = value;
    return;
  }
  if (name == "content-type") stream.content_type = value;
  else if (name == "authorization") stream.authorization = value;
  else if (name == "traceparent") stream.parent = value;
  else if (name == "grpc-timeout") {
    int64_t left = timeout_ns(value);
    if (left < 0) stream.text = "grpc-timeout is '" + std::string(value) + "'";
    stream.deadline_ns = stream.arrived_ns + std::max<int64_t>(1, left);
  } else if (name == "grpc-encoding") {
    stream.encoding = value;
  }
  // nghttp2 puts a NUL behind each.
  stream.headers.append(name.data(), name.size() + 1).append(value.data(), value.size() + 1);
}

void Session::on_opened(Stream& stream) {
  if (stream.header_bytes > kHeaderBytesMax)
    return finish(stream, kResourceExhausted,
                  "metadata of more than " + std::to_string(kHeaderBytesMax) + " bytes");
  if (stream.method != "POST") return refuse_http(stream, "405");
  if (!is_grpc(stream.content_type)) return refuse_http(stream, "415");
  if (!desk_.is_allowed(stream))
    return finish(stream, kUnauthenticated, "send the metadata 'authorization: Bearer <token>'");
  if (!stream.text.empty()) return finish(stream, kInternal, std::move(stream.text));
  if (!knows_encoding(stream.encoding))
    return finish(stream, kUnimplemented,
                  "messages may be compressed by gzip or deflate, not by '" + stream.encoding + "'",
                  {{"grpc-accept-encoding", "identity,gzip,deflate"}});
  if (!desk_.is_fast(stream.path)) to_python(stream);
}

void Session::on_data(Stream& stream, std::string_view bytes) {
  stream.owed += bytes.size();
  owed_ += bytes.size();
  if (stream.way != Stream::kOver) {
    stream.body.append(bytes);
    partial_ += bytes.size();
    desk_.gather(bytes.size());
    bool is_more = stream.way == Stream::kFast && stream.body.size() >= kPrefixBytes &&
                   stream.body.size() > kPrefixBytes + message_bytes(stream.body);
    if (check_size(stream) && is_more) to_python(stream);
    if (stream.way == Stream::kSlow) pass_messages(stream);
  }
  refill(stream, 0);
}

// False when it was too much, and the call is answered.
bool Session::check_size(Stream& stream) {
  if (stream.body.size() < kPrefixBytes) return true;
  size_t size = message_bytes(stream.body);
  if (size > kMessageBytesMax) {
    finish(stream, kResourceExhausted, "message of " + std::to_string(size) + " bytes: at most " +
                                           std::to_string(kMessageBytesMax) + " are taken");
    return false;
  }
  if (stream.body.size() < kPrefixBytes + size && partial_ > kPartialBytesMax) {
    finish(stream, kResourceExhausted,
           std::to_string(partial_) + " bytes of unfinished requests wait");
    return false;
  }
  if (desk_.gathered > desk_.gathered_max) {
    finish(stream, kResourceExhausted,
           std::to_string(desk_.gathered) + " bytes of large requests wait already");
    return false;
  }
  if (size <= kReservedBytes) stream.body.reserve(kPrefixBytes + size);
  return true;
}

void Session::on_ended(Stream& stream) {
  stream.ended = true;
  stream.arrived_ns = now_ns_;
  if (stream.way == Stream::kFast && !infer(stream)) {
    to_python(stream);
    if (stream.way == Stream::kSlow) pass_messages(stream);
  }
  if (stream.way != Stream::kSlow) return;
  if (stream.body.empty()) return desk_.ended(*this, stream);
  finish(stream, kInternal, "the last message ends after " + std::to_string(stream.body.size()) + " bytes");
}

bool Session::infer(Stream& stream) {
  size_t size = stream.body.size();
  if (size < kPrefixBytes || stream.body[0] != 0) return false;
  if (size != kPrefixBytes + message_bytes(stream.body)) return false;
  std::string body = std::move(stream.body);
  stream.body.clear();
  hold(stream, size);
  bool taken = desk_.infer(*this, stream, body);
  if (taken) body.clear();
  stream.body = std::move(body);
  if (taken) return true;
  partial_ += size;
  stream.held -= size;
  held_ -= size;
  return false;
}

// So many bytes of messages are complete now; `cost` is what Python's memory needs beside them.
void Session::hold(Stream& stream, size_t bytes, size_t cost) {
  partial_ -= bytes;
  stream.held += bytes + cost;
  held_ += bytes + cost;
  desk_.gather(cost);
}

void Session::to_python(Stream& stream) {
  if (!desk_.opened(*this, stream))
    return finish(stream, kResourceExhausted, "the server has too many calls to look at");
  stream.way = Stream::kSlow;
}

void Session::pass_messages(Stream& stream) {
  size_t at = 0, cost = 0;
  std::string_view all = stream.body;
  while (all.size() - at >= kPrefixBytes) {
    size_t size = message_bytes(all.substr(at));
    if (size > kMessageBytesMax || all.size() - at - kPrefixBytes < size) break;
    bool compressed = all[at] != 0;
    bool is_packed = stream.encoding == "gzip" || stream.encoding == "deflate";
    if (static_cast<uint8_t>(all[at]) > 1 || (compressed && !is_packed))
      return finish(stream, kInternal, "a message is marked " + std::to_string(static_cast<uint8_t>(all[at])) +
                                           ", and its grpc-encoding is " +
                                           (stream.encoding.empty() ? "identity" : stream.encoding));
    desk_.message(*this, stream, std::string(all.substr(at + kPrefixBytes, size)), compressed);
    at += kPrefixBytes + size;
    cost += kMessageCost;
  }
  hold(stream, at, cost);
  if (at == all.size()) wipe(stream.body);
  else stream.body.erase(0, at);
  check_size(stream);
}

// Windows grow again by what was received, as long as not too much of it lies around.
void Session::refill(Stream& stream, size_t given_back) {
  stream.held -= given_back;
  held_ -= given_back;
  desk_.let_go(given_back);
  bool may_grow = stream.way != Stream::kSlow || stream.held < kUnreadBytesMax;
  if (may_grow && stream.owed >= kOwedBytes) {
    nghttp2_session_consume_stream(http_, stream.id, stream.owed);
    stream.owed = 0;
  }
  refill_connection();
}

void Session::refill_connection() {
  if (owed_ < kOwedBytes || held_ >= kHeldBytesMax) return;
  nghttp2_session_consume_connection(http_, owed_);
  owed_ = 0;
}

void Session::handle(Mail& mail) {
  Stream* stream = find(mail.call.stream);
  if (!stream || stream->finished) return;
  if (mail.kind == Mail::kTaken)
    return refill(*stream, std::min(stream->held, static_cast<size_t>(mail.code) + kPrefixBytes + kMessageCost));
  if (mail.kind == Mail::kWrite || mail.kind == Mail::kAnswer)
    write(*stream, mail.request ? mail.request->reply : mail.bytes);
  if (mail.kind == Mail::kAnswer) finish(*stream, kOk, {});
  if (mail.kind != Mail::kStatus) return;
  stream->way = Stream::kOver;  // Python knows
  finish(*stream, mail.code, std::move(mail.bytes), std::move(mail.trailing));
}

void Session::write(Stream& stream, std::string& bytes) {
  unsent_ += bytes.size();
  // A client that is always a little behind never lets it run empty.
  if (stream.out_at > stream.out.size() / 2) {
    stream.out.erase(0, stream.out_at);
    stream.out_at = 0;
  }
  if (stream.out.empty()) stream.out.swap(bytes);
  else stream.out.append(bytes);
  if (!stream.responding) respond(stream);
  else if (std::exchange(stream.deferred, false)) nghttp2_session_resume_data(http_, stream.id);
}

void Session::finish(Stream& stream, int code, std::string text, Pairs trailing) {
  assert(!stream.finished);
  if (stream.way == Stream::kSlow) desk_.gone(*this, stream);
  stream.finished = true;
  stream.code = code;
  stream.text = std::move(text);
  stream.trailing = std::move(trailing);
  stream.way = Stream::kOver;
  stream.batcher.reset();
  stream.ticket = 0;
  partial_ -= stream.body.size();
  desk_.let_go(stream.body.size());
  wipe(stream.body);
  refill(stream, stream.held);
  if (!stream.responding) {
    Statuses statuses(stream);
    statuses.nvs.insert(statuses.nvs.begin(), {kStatus200, kContentType});
    nghttp2_submit_response(http_, stream.id, statuses.nvs.data(), statuses.nvs.size(), nullptr);
  } else if (std::exchange(stream.deferred, false)) {
    nghttp2_session_resume_data(http_, stream.id);
  }
}

void Session::respond(Stream& stream) {
  stream.responding = true;
  const Nv headers[] = {kStatus200, kContentType};
  nghttp2_data_provider source{};
  source.source.ptr = &stream;
  source.read_callback = Callbacks::read;
  nghttp2_submit_response(http_, stream.id, headers, std::size(headers), &source);
}

// What comes is no gRPC.
void Session::refuse_http(Stream& stream, const char* status) {
  stream.way = Stream::kOver;
  stream.finished = true;
  const Nv headers[] = {constant(":status", status), constant("allow", "POST")};
  nghttp2_submit_response(http_, stream.id, headers, std::size(headers), nullptr);
}

ssize_t Session::read_out(Stream& stream, uint8_t* to, size_t room, uint32_t* flags) {
  size_t size = std::min(room, stream.out.size() - stream.out_at);
  std::memcpy(to, stream.out.data() + stream.out_at, size);
  stream.out_at += size;
  unsent_ -= size;
  if (stream.way == Stream::kSlow && (stream.sent += size) >= kToldBytes)
    desk_.sent(*this, stream, std::exchange(stream.sent, 0));
  if (stream.out_at < stream.out.size()) return static_cast<ssize_t>(size);
  wipe(stream.out);
  stream.out_at = 0;
  if (stream.finished) {
    *flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
    submit_trailer(stream);
  } else if (size == 0) {
    stream.deferred = true;
    return NGHTTP2_ERR_DEFERRED;
  }
  return static_cast<ssize_t>(size);
}

void Session::submit_trailer(Stream& stream) {
  if (stream.code == kOk && stream.text.empty() && stream.trailing.empty()) {
    nghttp2_submit_trailer(http_, stream.id, &kGrpcOk, 1);
    return;
  }
  Statuses statuses(stream);
  nghttp2_submit_trailer(http_, stream.id, statuses.nvs.data(), statuses.nvs.size());
}

void Session::say_goodbye() {
  if (std::exchange(goodbye_, true)) return;
  nghttp2_submit_shutdown_notice(http_);
  nghttp2_submit_ping(http_, NGHTTP2_FLAG_NONE, nullptr);
}

void Session::say_last_goodbye() {
  if (std::exchange(last_goodbye_, true)) return;
  nghttp2_submit_goaway(http_, NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(http_),
                        NGHTTP2_NO_ERROR, nullptr, 0);
}

}  // namespace leptonic
