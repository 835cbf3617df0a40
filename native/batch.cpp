// A taken batch: rows in, rows out.
#include <algorithm>
#include <cassert>
#include <cstring>

#include "batcher.h"
#include "clock.h"

namespace leptonic {

Batch::Batch(std::shared_ptr<Batcher> home, Requests requests, int64_t taken_ns)
    : home_(std::move(home)),
      requests_(std::move(requests)),
      taken_ns_(taken_ns),
      asked_ns_(taken_ns),
      gathered_ns_(taken_ns) {
  int64_t stop = 0;
  stops_.reserve(requests_.size());
  for (auto& request : requests_) {
    stops_.push_back(stop += request->rows);
    if (request->id.empty()) draw_id(request->id);
    if (request->marks.traced && request->place.empty())
      request->place = place_under(request->parent);
  }
}

void Batch::begin_gathering() { asked_ns_ = now_ns(); }
void Batch::end_gathering() { gathered_ns_ = now_ns(); }
void Batch::end_inferring() { inferred_ns_ = now_ns(); }

bool Batch::has_wire() const {
  return std::any_of(requests_.begin(), requests_.end(), [](auto& one) { return !one->guest; });
}

Shape Batch::input_shape(size_t input) const {
  const Lane& lane = home_->lane;
  Shape shape;
  if (home_->is_fixed) {
    auto& given = lane.inputs[input].shape;
    std::copy(given.begin(), given.end(), shape.dims.begin());
    shape.rank = given.size();
  } else {
    shape = requests_.front()->shapes[input];
  }
  if (lane.batched) shape.dims[0] = rows();
  return shape;
}

// That the line says so follows from a hash; that no byte is out of place must not.
bool Batch::is_one_kind() const {
  const auto& first = requests_.front()->shapes;
  auto is_same = [](const Shape& one, const Shape& other) {
    return one.rank == other.rank &&
           std::equal(one.dims.begin() + 1, one.dims.begin() + one.rank, other.dims.begin() + 1);
  };
  return requests_.size() == 1 || std::all_of(requests_.begin(), requests_.end(), [&](auto& one) {
           return std::equal(first.begin(), first.end(), one->shapes.begin(), is_same);
         });
}

void Batch::gather(size_t input, char* to) const {
  bool is_bool = home_->lane.inputs[input].datatype == "BOOL";
  for (auto& request : requests_) {
    std::string_view raw = request->raws[input];
    if (is_bool) std::transform(raw.begin(), raw.end(), to, [](char byte) { return byte != 0; });
    else std::memcpy(to, raw.data(), raw.size());
    to += raw.size();
  }
}

Mail Batch::reply(size_t index, std::vector<OutputView>& views) {
  Request& request = *requests_[index];
  const Lane& lane = home_->lane;
  std::array<Output, kTensorsMax> outputs;
  size_t count = 0;
  for (size_t i = 0; i < views.size(); ++i) {
    if (!(request.outputs >> i & 1)) continue;
    size_t bytes = lane.outputs[i].item_bytes, offset = 0;
    Shape& shape = views[i].shape;
    for (size_t dim = lane.batched; dim < shape.rank; ++dim)
      bytes *= static_cast<size_t>(shape.dims[dim]);
    if (lane.batched) {
      offset = static_cast<size_t>(start(index)) * bytes;
      shape.dims[0] = request.rows;
      bytes *= static_cast<size_t>(request.rows);
    }
    outputs[count++] = {&lane.outputs[i], shape.dims.data(), shape.rank,
                        {views[i].data + offset, bytes}};
  }
  write_response(request.model, lane.version, request.id, request.place, outputs.data(), count,
                 request.reply);
  return {Mail::kAnswer, request.call};
}

void Batch::answer(std::vector<OutputView> views) {
  assert(!is_over_);
  is_over_ = true;
  std::vector<Mail> mails;
  mails.reserve(requests_.size());
  for (size_t i = 0; i < requests_.size(); ++i)
    if (!requests_[i]->guest) mails.push_back(reply(i, views));
  Spent spent{gathered_ns_ - asked_ns_, inferred_ns_ - gathered_ns_, now_ns() - inferred_ns_};
  // Before anybody is told: who has an answer finds it in the statistics.
  home_->count(requests_, rows(), taken_ns_, spent);
  auto mail = mails.begin();
  for (auto& request : requests_) {
    if (request->guest) continue;
    if (request->is_noted()) (mail++)->bytes = std::move(request->reply);
    else (mail++)->request = std::move(request);
  }
  if (!mails.empty()) home_->deliver(mails);
}

void Batch::fail(int code, const std::string& text) {
  assert(!is_over_);
  is_over_ = true;
  home_->over(size());
  home_->fail(requests_, code, text);
}

std::vector<std::unique_ptr<Batch>> Batch::split() {
  assert(!is_over_);
  is_over_ = true;
  home_->parted(size());
  std::vector<std::unique_ptr<Batch>> parts;
  for (auto& request : requests_) {
    Requests alone;
    alone.push_back(std::move(request));
    parts.push_back(std::make_unique<Batch>(home_, std::move(alone), taken_ns_));
  }
  return parts;
}

}  // namespace leptonic
