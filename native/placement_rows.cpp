// Which state is best for a shape: rows of scores, and the log that they are brought up to date by.
#include <algorithm>

#include "placement.h"

namespace leptonic::placement {

namespace {

constexpr int64_t kLeftMax = 1 << 16;  // more than the milli of a node's GPUs
// Scores kept: 256 MB, which is 128 shapes for 131,072 states.
constexpr size_t kScoresMax = size_t(1) << 24, kRowsMax = 4096;
constexpr size_t kAhead = 8;  // lines of the log whose states are on their way

}  // namespace

// --- the log

void Pool::note(uint32_t state) {
  auto& nodes = states_[state].nodes;
  marks_[state].first = nodes.empty() ? kNobody : nodes_[*nodes.begin()].order;
  if (log_.size() > 2 * states_.size()) shorten_log();
  marks_[state].changed = log_.size();
  log_.push_back(state);
}

// Only the last line of each state counts.
void Pool::shorten_log() {
  std::vector<size_t> kept_before(log_.size() + 1);
  std::vector<uint32_t> kept;
  for (size_t i = 0; i < log_.size(); ++i) {
    kept_before[i] = kept.size();
    if (marks_[log_[i]].changed == i) {
      marks_[log_[i]].changed = kept.size();
      kept.push_back(log_[i]);
    }
  }
  kept_before.back() = kept.size();
  for (auto& [_, row] : rows_)
    if (row->read != SIZE_MAX) row->read = kept_before[row->read];
  log_ = std::move(kept);
}

// --- rows

uint32_t Pool::shape(const Shape& shape) {
  auto [at, is_new] = shape_ids_.try_emplace(shape, static_cast<uint32_t>(shapes_.size()));
  if (is_new) {
    shapes_.push_back(shape);
    admitted_.emplace_back();
  }
  return at->second;
}

void Pool::forget_shapes() {
  shapes_.clear();
  shape_ids_.clear();
  admitted_.clear();
  rows_.clear();
}

void Pool::learn(const std::vector<std::pair<uint32_t, int64_t>>& typical, std::vector<int64_t> steps) {
  std::vector<Typical> known;
  for (auto& [shape, weight] : typical) known.push_back({shapes_.at(shape), weight});
  known_.learn(std::move(known), std::move(steps));
  value_all();
}

void Pool::price(Prices prices) {
  known_.price(std::move(prices));
  value_all();
}

// All that is known of the states is known no more.
void Pool::value_all() {
  for (Alike& state : states_)
    if (!state.nodes.empty()) state.value = value(state);
  for (auto& [_, row] : rows_) {
    row->read = SIZE_MAX;
    row->born = 0;
  }
}

int64_t Pool::value(const State& state) const {
  if (policy_ == Policy::kFgd) return known_.fragment(state);
  return policy_ == Policy::kPriced ? known_.worth(state) : 0;
}

Pool::Row& Pool::row(uint32_t shape) {
  auto at = rows_.find(shape);
  if (at == rows_.end()) {
    if (rows_.size() >= std::clamp<size_t>(kScoresMax / states_.size(), 16, kRowsMax)) drop_oldest_row();
    at = rows_.emplace(shape, std::make_unique<Row>()).first;
    at->second->shape = shape;
  }
  Row& row = *at->second;
  row.asked = ++asked_;
  auto& admitted = admitted_[shape];
  for (size_t kind = admitted.size(); kind < known_.kinds(); ++kind)
    admitted.push_back(known_.of(static_cast<uint32_t>(kind)).admits(shapes_[shape]));
  bool is_old = row.score.size() != states_.size() || row.read == SIZE_MAX;
  if (is_old || log_.size() - row.read > states_.size() / 4) make(row);
  else catch_up(row);
  row.read = log_.size();
  row.born = born_;
  return row;
}

void Pool::drop_oldest_row() {
  auto oldest = std::min_element(rows_.begin(), rows_.end(),
                                 [](auto& a, auto& b) { return a.second->asked < b.second->asked; });
  rows_.erase(oldest);
}

bool Pool::is_better(const Row& row, uint32_t left, uint32_t right) const {
  if (row.score[left] != row.score[right]) return row.score[left] > row.score[right];
  return row.score[left] == kNone || marks_[left].first < marks_[right].first;
}

// Anew only what came since the row was read.
void Pool::score(Row& row, uint32_t state) const {
  const Mark& mark = marks_[state];
  if (mark.first == kNobody) row.score[state] = kNone;
  else if (mark.born > row.born)
    row.score[state] = fits(row, states_[state]) ? evaluate(shapes_[row.shape], states_[state]) : kNone;
}

void Pool::make(Row& row) const {
  size_t size = states_.size();
  row.score.resize(size, kNone);
  row.best.resize(size);
  for (uint32_t i = 0; i < size; ++i) score(row, i);
  for (size_t i = size - 1; i > 0; --i) {
    bool are_states = 2 * i >= size;
    uint32_t left = are_states ? static_cast<uint32_t>(2 * i - size) : row.best[2 * i];
    uint32_t right = are_states ? left + 1 : row.best[2 * i + 1];
    row.best[i] = is_better(row, left, right) ? left : right;
  }
}

void Pool::catch_up(Row& row) const {
  for (size_t i = row.read; i < log_.size(); ++i) {
    uint32_t state = log_[i];
    uint32_t ahead = log_[std::min(i + kAhead, log_.size() - 1)];
    __builtin_prefetch(&states_[ahead]);
    __builtin_prefetch(&row.score[ahead]);
    if (marks_[state].changed != i) continue;
    bool was_none = row.score[state] == kNone;
    score(row, state);
    if (!was_none || row.score[state] != kNone) replay(row, state);
  }
}

// Up to where another state wins as before; an equal score may have another first node.
void Pool::replay(Row& row, uint32_t state) const {
  size_t size = states_.size();
  uint32_t other = state ^ 1;
  for (size_t i = (size + state) / 2;; i /= 2) {
    uint32_t winner = is_better(row, state, other) ? state : other;
    if (2 * i < size) {
      winner = is_better(row, row.best[2 * i], row.best[2 * i + 1]) ? row.best[2 * i] : row.best[2 * i + 1];
    }
    if (row.best[i] == winner && winner != state) return;
    row.best[i] = winner;
    if (i == 1) return;
  }
}

bool Pool::fits(const Row& row, const State& state) const {
  const Shape& shape = shapes_[row.shape];
  if (state.cpu_milli < shape.cpu_milli || state.memory_mib < shape.memory_mib) return false;
  if (!admitted_[row.shape][state.kind]) return false;
  return shape.is_part() ? state.most >= shape.gpu_milli : state.whole >= shape.gpus;
}

// Of a shape that fits.
int64_t Pool::evaluate(const Shape& shape, const State& state) const {
  if (shape.spread) return spread(known_.of(state.kind), state, shape);
  switch (policy_) {
    case Policy::kRandom: return 0;  // of each node its lot counts
    case Policy::kDotProduct: return dot_product(state, shape).first;
    case Policy::kClustering: return clustering(state, shape);
    case Policy::kPacking: return packing(state, shape);
    case Policy::kBestFit: return best_fit(state, shape);
    case Policy::kFgd: return known_.score(state.value - known_.fragment_after(state, shape));
    case Policy::kPriced: {
      int64_t left = state.total - int64_t(shape.gpus) * shape.gpu_milli;
      return -Known::lost(state.value - known_.worth_after(state, shape)) * kLeftMax - left;
    }
  }
  throw Broken("no such policy");
}

}  // namespace leptonic::placement
