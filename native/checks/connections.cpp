// Connections: whatever bytes come, in whatever pieces, a session goes on or says that it is over;
// every call that was opened is ended or gone, once.
#include <cstring>
#include <map>
#include <set>

#include "../batcher.h"
#include "../session.h"
#include "checks.h"

namespace leptonic {

namespace {

// Hands some calls to "Python", answers some at once, and keeps some for later.
class SomeDesk : public Desk {
 public:
  explicit SomeDesk(Random& random) : Desk(5000), random_(random) {}

  bool is_fast(std::string_view path) const override { return path == "/fast"; }
  bool is_allowed(const Stream& stream) const override { return stream.authorization != "bad"; }
  bool infer(Session& session, Stream& stream, std::string& body) override {
    ++inferred;
    CHECK(body.size() >= kPrefixBytes);
    if (below(random_, 3) == 0) return false;
    if (below(random_, 3) == 0) session.finish(stream, kResourceExhausted, "too many\n%", {{"retry-after", "1"}});
    else waiting.insert(stream.id);
    body = "an old buffer";
    return true;
  }
  bool opened(Session&, Stream& stream) override {
    if (below(random_, 8) == 0) return false;
    CHECK(python.insert(stream.id).second);
    return true;
  }
  void message(Session&, Stream& stream, std::string bytes, bool) override {
    CHECK(python.contains(stream.id));
    unread.emplace_back(stream.id, bytes.size());
  }
  void ended(Session&, Stream& stream) override { CHECK(python.contains(stream.id)); }
  void gone(Session&, Stream& stream) override { CHECK(python.erase(stream.id) == 1); }
  void sent(Session&, Stream&, size_t bytes) override { CHECK(bytes > 0); }

  std::set<int32_t> waiting, python;
  std::vector<std::pair<int32_t, size_t>> unread;
  int inferred = 0;

 private:
  Random& random_;
};

std::string framed(const std::string& message) {
  std::string bytes(kPrefixBytes, '\0');
  write_prefix(bytes.data(), message.size());
  return bytes + message;
}

// What a client of nghttp2 says when it makes some calls.
class Recorder {
 public:
  explicit Recorder(Random& random) : random_(random) {
    nghttp2_session_callbacks* callbacks = nullptr;
    nghttp2_session_callbacks_new(&callbacks);
    nghttp2_session_client_new(&http_, callbacks, this);
    nghttp2_session_callbacks_del(callbacks);
    nghttp2_submit_settings(http_, NGHTTP2_FLAG_NONE, nullptr, 0);
  }
  ~Recorder() { nghttp2_session_del(http_); }

  void call() {
    const char* paths[] = {"/fast", "/slow", "/fast", "/fast"};
    std::vector<std::pair<std::string, std::string>> headers = {
        {":method", below(random_, 20) ? "POST" : "GET"}, {":scheme", "http"},
        {":path", paths[below(random_, 4)]}, {":authority", "here"},
        {"content-type", below(random_, 20) ? "application/grpc" : "text/plain"}};
    if (below(random_, 4) == 0) headers.push_back({"grpc-timeout", below(random_, 2) ? "99999999H" : "1x"});
    if (below(random_, 4) == 0) headers.push_back({"grpc-encoding", below(random_, 2) ? "gzip" : "snappy"});
    if (below(random_, 8) == 0) headers.push_back({"authorization", "bad"});
    if (below(random_, 8) == 0) headers.push_back({"x-long", std::string(below(random_, 20'000), 'h')});
    std::string body = framed(some_request(random_));
    if (below(random_, 5) == 0) body += framed("more");
    if (below(random_, 10) == 0) body[1 + below(random_, 4)] = static_cast<char>(random_());
    bodies_.push_back({std::move(body), 0});
    nghttp2_data_provider source{};
    source.source.ptr = &bodies_.back();
    source.read_callback = read;
    std::vector<nghttp2_nv> nvs;
    for (auto& [name, value] : headers)
      nvs.push_back({reinterpret_cast<uint8_t*>(name.data()), reinterpret_cast<uint8_t*>(value.data()),
                     name.size(), value.size(), NGHTTP2_NV_FLAG_NONE});
    int32_t id = nghttp2_submit_request(http_, nullptr, nvs.data(), nvs.size(), &source, nullptr);
    if (id > 0 && below(random_, 6) == 0) nghttp2_submit_rst_stream(http_, NGHTTP2_FLAG_NONE, id, NGHTTP2_CANCEL);
    if (below(random_, 10) == 0) nghttp2_submit_ping(http_, NGHTTP2_FLAG_NONE, nullptr);
  }

  std::string said() {
    std::string bytes;
    const uint8_t* some = nullptr;
    for (ssize_t size; (size = nghttp2_session_mem_send(http_, &some)) > 0;)
      bytes.append(reinterpret_cast<const char*>(some), static_cast<size_t>(size));
    return bytes;
  }

 private:
  struct Body {
    std::string bytes;
    size_t at;
  };

  static ssize_t read(nghttp2_session*, int32_t, uint8_t* to, size_t room, uint32_t* flags,
                      nghttp2_data_source* source, void*) {
    auto& body = *static_cast<Body*>(source->ptr);
    size_t size = std::min(room, body.bytes.size() - body.at);
    std::memcpy(to, body.bytes.data() + body.at, size);
    body.at += size;
    if (body.at == body.bytes.size()) *flags |= NGHTTP2_DATA_FLAG_EOF;
    return static_cast<ssize_t>(size);
  }

  Random& random_;
  nghttp2_session* http_ = nullptr;
  std::deque<Body> bodies_;
};

// Says something about a call that may be over by now.
void meddle(Session& session, SomeDesk& desk, Random& random) {
  auto some = [&](const std::set<int32_t>& of) { return *std::next(of.begin(), static_cast<long>(below(random, of.size()))); };
  if (!desk.waiting.empty() && below(random, 2)) {
    int32_t id = some(desk.waiting);
    Mail mail{Mail::kAnswer, {1, id}, 0, framed(std::string(below(random, 100'000), 'a')), {}};
    session.handle(mail);
    desk.waiting.erase(id);
  }
  if (!desk.python.empty() && below(random, 2)) {
    int32_t id = some(desk.python);
    Mail mail{below(random, 2) ? Mail::kWrite : Mail::kStatus, {1, id}, static_cast<int>(below(random, 17)), "text", {{"x-y", "z"}}};
    if (mail.kind == Mail::kStatus) desk.python.erase(id);
    session.handle(mail);
  }
  if (!desk.unread.empty()) {
    auto [id, size] = desk.unread.back();
    desk.unread.pop_back();
    Mail mail{Mail::kTaken, {1, id}, static_cast<int>(size), {}, {}};
    session.handle(mail);
  }
  if (below(random, 100) == 0) session.say_goodbye();
  if (below(random, 100) == 0) session.say_last_goodbye();
}

int serve(const std::string& said, Random& random) {
  SomeDesk desk(random);
  {
    Session session(desk, 1, "somewhere");
    std::string out;
    for (size_t at = 0; at < said.size();) {
      size_t size = std::min<size_t>(said.size() - at, below(random, 4) ? 1 + below(random, 2000) : 1);
      if (!session.receive(std::string_view(said).substr(at, size), 1)) break;
      at += size;
      meddle(session, desk, random);
      if (!session.send(out, 1 << 20)) break;
      out.clear();
      if (session.is_over()) break;
    }
  }
  CHECK(desk.gathered == 0);
  // Those that Python itself did not end are gone now.
  CHECK(desk.python.empty());
  return desk.inferred;
}

}  // namespace

void check_connections(uint64_t seed, int rounds) {
  Random random(seed);
  int inferred = 0;
  for (int round = 0; round < rounds; ++round) {
    Recorder client(random);
    std::string said;
    for (uint64_t calls = 1 + below(random, 12); calls > 0; --calls) {
      client.call();
      if (below(random, 2)) said += client.said();
    }
    said += client.said();
    if (below(random, 4)) {
      // Past the preface, most of the time: nothing gets far without.
      size_t kept = below(random, 10) ? 24 : 0;
      said = said.substr(0, kept) + mutated(said.substr(kept), random);
    }
    inferred += serve(said, random);
  }
  CHECK(rounds < 100 || inferred > rounds / 2);
  std::printf("connections: %d calls inferred over %d broken and whole ones\n", inferred, rounds);
}

}  // namespace leptonic
