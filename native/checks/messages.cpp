// Messages: whatever bytes come, the reader says no or gives views that lie inside of them, and what
// fits has as many bytes as its shape says.
#include "../batcher.h"
#include "checks.h"

namespace leptonic {

namespace {

std::string varint(uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes += static_cast<char>(value | 0x80);
  return bytes + static_cast<char>(value);
}

std::string field(uint32_t number, const std::string& bytes) {
  return varint(number << 3 | 2) + varint(bytes.size()) + bytes;
}

// Mostly small, sometimes what multiplies to nonsense.
uint64_t some_size(Random& random) {
  const uint64_t wild[] = {0, 1ull << 31, 1ull << 62, ~0ull, 1ull << 63, 0x7fffffff, 5'000'000'000};
  return below(random, 8) ? 1 + below(random, 4) : wild[below(random, std::size(wild))];
}

std::string some_shape(Random& random, uint64_t rows) {
  if (below(random, 2)) return field(3, varint(rows) + varint(2));
  std::string loose = varint(3 << 3) + varint(rows) + varint(3 << 3) + varint(2);
  return below(random, 20) ? loose : field(3, varint(some_size(random)) + varint(some_size(random)));
}

std::string some_input(Random& random, const char* name, const char* datatype, uint64_t rows) {
  return field(5, field(1, name) + field(2, datatype) + some_shape(random, rows));
}

std::string some_parameter(Random& random) {
  const char* names[] = {"timeout", "priority", "triton_enable_empty_final_response", "sequence_id"};
  uint32_t kinds[] = {1, 2, 5};
  std::string value = varint(kinds[below(random, 3)] << 3) + varint(some_size(random));
  return field(4, field(1, names[below(random, 4)]) + field(2, value));
}

bool is_inside(std::string_view view, std::string_view whole) {
  return view.empty() || (view.data() >= whole.data() && view.data() + view.size() <= whole.data() + whole.size());
}

const std::vector<Tensor> kInputs = {{"x", "FP32", {-1, 2}, 4}, {"b", "BOOL", {-1, -1}, 1}};
const std::vector<Tensor> kOutputs = {{"y", "FP32", {-1, 2}, 4}, {"z", "INT64", {-1}, 8}};

// Through a batcher and back, as the front and a runner do it.
void serve(const std::string& message, const Asked& asked, const Fit& fit) {
  auto mailbox = std::make_shared<Mailbox>();
  Lane lane{"m", "1", kInputs, kOutputs, true, false};
  auto batcher = std::make_shared<Batcher>(lane, mailbox, std::make_shared<Helm>(nullptr));
  auto request = std::make_unique<Request>();
  request->body = message;
  for (size_t i = 0; i < kInputs.size(); ++i)
    request->raws[i] = {request->body.data() + (fit.raws[i].data() - message.data()), fit.raws[i].size()};
  request->rows = fit.rows;
  request->outputs = fit.outputs;
  request->id = asked.id;
  request->shapes = {fit.shapes[0], fit.shapes[1]};
  request->arrived_ns = 1;
  if (batcher->join(request) <= 0) return;
  std::unique_ptr<Batch> batch;
  std::vector<Refused> late;
  CHECK(batcher->take(batch, late) && batch && batch->rows() == fit.rows);
  for (size_t i = 0; i < kInputs.size(); ++i) {
    Shape shape = batch->input_shape(i);
    std::vector<char> rows(static_cast<size_t>(shape.dims[0] * shape.dims[1]) * kInputs[i].item_bytes);
    CHECK(rows.size() == fit.raws[i].size());
    batch->gather(i, rows.data());
  }
  std::vector<char> y(static_cast<size_t>(fit.rows) * 8), z(static_cast<size_t>(fit.rows) * 8);
  Shape two{{fit.rows, 2}, 2}, one{{fit.rows}, 1};
  batch->answer({{y.data(), two}, {z.data(), one}});
  std::vector<Mail> mails;
  mailbox->collect(mails);
  CHECK(mails.size() == 1 && mails[0].kind == Mail::kAnswer);
}

}  // namespace

std::string mutated(std::string bytes, Random& random) {
  for (uint64_t times = 1 + below(random, 4); times > 0 && !bytes.empty(); --times) {
    size_t at = below(random, bytes.size());
    switch (below(random, 5)) {
      case 0: bytes[at] = static_cast<char>(random()); break;
      case 1: bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(random, 8))); break;
      case 2: bytes.resize(at); break;
      case 3: bytes.insert(at, bytes.substr(below(random, bytes.size()), below(random, 40))); break;
      default: bytes.erase(at, below(random, 20));
    }
  }
  return bytes;
}

std::string some_request(Random& random) {
  uint64_t rows = 1 + below(random, 4);
  std::string x(rows * 8, 'x'), b(rows * 2, '\2');
  std::string message = field(1, "m");
  if (below(random, 3) == 0) message += field(2, "1");
  if (below(random, 2)) message += field(3, std::string(below(random, 40), 'i'));
  if (below(random, 4) == 0) message += some_parameter(random);
  message += some_input(random, "x", "FP32", rows) + some_input(random, "b", "BOOL", rows);
  if (below(random, 3) == 0) message += field(6, field(1, below(random, 2) ? "y" : "z"));
  message += field(7, x) + field(7, b);
  return message;
}

void check_messages(uint64_t seed, int rounds) {
  Random random(seed);
  Asked asked;
  Fit fit;
  int fitted = 0;
  for (int round = 0; round < rounds; ++round) {
    std::string message = some_request(random);
    if (below(random, 4)) message = mutated(message, random);
    // Exactly as long as its memory: one byte further is seen.
    std::vector<char> exact(message.begin(), message.end());
    std::string_view view(exact.data(), exact.size());
    if (!read_request(view, asked)) continue;
    for (size_t i = 0; i < asked.raw_count; ++i) CHECK(is_inside(asked.raws[i], view));
    CHECK(is_inside(asked.model, view) && is_inside(asked.id, view));
    if (!fits(asked, kInputs, kOutputs, true, fit)) continue;
    for (size_t i = 0; i < kInputs.size(); ++i) {
      auto bytes = static_cast<uint64_t>(fit.rows * fit.shapes[i].dims[1]) * kInputs[i].item_bytes;
      CHECK(fit.raws[i].size() == bytes);
    }
    if (fit.raws[0].empty() || ++fitted % 8) continue;
    read_request(message, asked);
    CHECK(fits(asked, kInputs, kOutputs, true, fit));
    serve(message, asked, fit);
  }
  CHECK(rounds < 1000 || fitted > rounds / 10);
  std::printf("messages: %d of %d mutated requests fitted\n", fitted, rounds);
}

}  // namespace leptonic
