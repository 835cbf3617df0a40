#include "placement.h"

#include <algorithm>
#include <numeric>

namespace leptonic::placement {

namespace {

constexpr uint64_t kFirst = uint64_t(1) << 63, kGap = uint64_t(1) << 32;
constexpr int64_t kLeftMax = 1 << 16;  // more than the milli of a node's GPUs
// Scores kept: 256 MB, which is 128 shapes for 131,072 nodes.
constexpr size_t kScoresMax = size_t(1) << 24, kRowsMax = 4096;
constexpr size_t kAhead = 8;  // lines of the log whose nodes are on their way

void require(bool holds, const std::string& what) {
  if (!holds) throw Broken(what);
}

}  // namespace

Pool::Pool(Policy policy, uint64_t seed) : policy_(policy), lots_(mixed(seed)) { grow(); }

// --- nodes

const Node& Pool::node(uint32_t node) const {
  require(node < nodes_.size() && nodes_[node].is_there, "no such node");
  return nodes_[node];
}

void Pool::grow() {
  size_t before = nodes_.size(), now = before ? 2 * before : 64;
  nodes_.resize(now);
  for (size_t i = now; i > before; --i) gone_.push_back(static_cast<uint32_t>(i - 1));
  rows_.clear();
}

// Orders leave room for names between names; when there is none, all are spread anew.
void Pool::spread_orders() {
  uint64_t order = kFirst - names_.size() / 2 * kGap;
  for (auto& [_, node] : names_) nodes_[node].order = order += kGap;
}

uint32_t Pool::join(const std::string& name, const Kind& kind) {
  if (gone_.empty()) grow();
  uint32_t number = gone_.back();
  auto [at, is_new] = names_.try_emplace(name, number);
  require(is_new, name + " has joined already");
  gone_.pop_back();
  Node& node = nodes_[number];
  node = Node{};
  node.is_there = true;
  node.kind = known_.kind(kind);
  node.cpu_milli = kind.cpu_milli;
  node.memory_mib = kind.memory_mib;
  node.gpus.assign(static_cast<size_t>(kind.gpus), kGpuMilli);
  node.lot = hashed(name);
  uint64_t below = at == names_.begin() ? 0 : nodes_[std::prev(at)->second].order;
  uint64_t above = std::next(at) == names_.end() ? 0 : nodes_[std::next(at)->second].order;
  if (names_.size() == 1) node.order = kFirst;
  else if (!above) node.order = below + std::min(kGap, (UINT64_MAX - below) / 2);
  else if (!below) node.order = above - std::min(kGap, above / 2);
  else node.order = below + (above - below) / 2;
  if (node.order == below || node.order == above) spread_orders();
  opened_.resize(known_.kinds());
  settle(number);
  return number;
}

void Pool::leave(const std::string& name) {
  auto at = names_.find(name);
  require(at != names_.end(), name + " is not there");
  Node& node = nodes_[at->second];
  const Kind& kind = known_.of(node.kind);
  bool is_empty = node.cpu_milli == kind.cpu_milli && node.memory_mib == kind.memory_mib &&
                  node.whole == kind.gpus;
  require(is_empty, name + " holds work");
  if (node.is_open) --opened_[node.kind];
  node.is_there = node.is_open = false;
  note(at->second);
  gone_.push_back(at->second);
  names_.erase(at);
}

void Pool::change(uint32_t number, const Kind& kind) {
  this->node(number);
  Node& node = nodes_[number];
  const Kind& old = known_.of(node.kind);
  int64_t cpu_milli = node.cpu_milli + kind.cpu_milli - old.cpu_milli;
  int64_t memory_mib = node.memory_mib + kind.memory_mib - old.memory_mib;
  require(cpu_milli >= 0 && memory_mib >= 0, "a node shrinks below what it holds");
  for (size_t i = static_cast<size_t>(kind.gpus); i < node.gpus.size(); ++i)
    require(node.gpus[i] == kGpuMilli, "a node loses a GPU that is taken");
  if (node.is_open) --opened_[node.kind];
  node.kind = known_.kind(kind);
  opened_.resize(known_.kinds());
  if (node.is_open) ++opened_[node.kind];
  node.cpu_milli = cpu_milli;
  node.memory_mib = memory_mib;
  node.gpus.resize(static_cast<size_t>(kind.gpus), kGpuMilli);
  settle(number);
}

void Pool::open(uint32_t number, bool is_open) {
  this->node(number);
  Node& node = nodes_[number];
  if (node.is_open == is_open) return;
  node.is_open = is_open;
  opened_[node.kind] += is_open ? 1 : -1;
  note(number);
}

void Pool::move(uint32_t shape, uint32_t number, const std::vector<int>& gpus, int sign) {
  this->node(number);
  Node& node = nodes_[number];
  const Shape& one = shapes_.at(shape);
  const Kind& kind = known_.of(node.kind);
  int64_t cpu_milli = node.cpu_milli - sign * one.cpu_milli;
  int64_t memory_mib = node.memory_mib - sign * one.memory_mib;
  require(cpu_milli >= 0 && cpu_milli <= kind.cpu_milli, "more CPU than there is");
  require(memory_mib >= 0 && memory_mib <= kind.memory_mib, "more memory than there is");
  require(gpus.size() == static_cast<size_t>(one.gpus), "another number of GPUs than the shape has");
  Levels left = node.gpus;
  for (size_t i = 0; i < gpus.size(); ++i) {
    size_t at = static_cast<size_t>(gpus[i]);
    require(at < left.size() && std::find(gpus.begin(), gpus.begin() + static_cast<long>(i), gpus[i]) ==
                                    gpus.begin() + static_cast<long>(i), "no such GPU");
    int milli = left[at] - sign * one.gpu_milli;
    require(milli >= 0 && milli <= kGpuMilli, "more of a GPU than there is");
    left[at] = static_cast<int16_t>(milli);
  }
  node.cpu_milli = cpu_milli;
  node.memory_mib = memory_mib;
  node.gpus = std::move(left);
  if (one.gpus) {
    auto held = std::find_if(node.held.begin(), node.held.end(), [&](auto& h) { return h.first == one.sort(); });
    if (held == node.held.end()) node.held.emplace_back(one.sort(), sign);
    else if ((held->second += sign) == 0) node.held.erase(held);
  }
  lots_ += static_cast<uint64_t>(sign) * node.lot;
  settle(number);
}

// What is kept of a node beside what is free.
void Pool::settle(uint32_t number) {
  nodes_[number].count_gpus();
  nodes_[number].value = value(nodes_[number]);
  note(number);
}

// --- the log

void Pool::note(uint32_t node) {
  if (log_.size() > 2 * nodes_.size()) shorten_log();
  nodes_[node].changed = log_.size();
  log_.push_back(node);
}

// Only the last line of each node counts.
void Pool::shorten_log() {
  std::vector<size_t> kept_before(log_.size() + 1);
  std::vector<uint32_t> kept;
  for (size_t i = 0; i < log_.size(); ++i) {
    kept_before[i] = kept.size();
    if (nodes_[log_[i]].changed == i) {
      nodes_[log_[i]].changed = kept.size();
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

// All that is known of the nodes is known no more.
void Pool::value_all() {
  for (Node& node : nodes_)
    if (node.is_there) node.value = value(node);
  for (auto& [_, row] : rows_) row->read = SIZE_MAX;
}

int64_t Pool::value(const Node& node) const {
  if (policy_ == Policy::kFgd) return known_.fragment(node);
  return policy_ == Policy::kPriced ? known_.worth(node) : 0;
}

Pool::Row& Pool::row(uint32_t shape) {
  auto at = rows_.find(shape);
  if (at == rows_.end()) {
    if (rows_.size() >= std::clamp<size_t>(kScoresMax / nodes_.size(), 16, kRowsMax)) drop_oldest_row();
    at = rows_.emplace(shape, std::make_unique<Row>()).first;
    at->second->shape = shape;
  }
  Row& row = *at->second;
  row.asked = ++asked_;
  auto& admitted = admitted_[shape];
  for (size_t kind = admitted.size(); kind < known_.kinds(); ++kind)
    admitted.push_back(known_.of(static_cast<uint32_t>(kind)).admits(shapes_[shape]));
  // A lot is drawn for every placement, so nothing can be kept of them.
  bool is_old = row.read == SIZE_MAX || log_.size() - row.read > nodes_.size() / 2;
  if (is_old || policy_ == Policy::kRandom) make(row);
  else catch_up(row);
  row.read = log_.size();
  return row;
}

void Pool::drop_oldest_row() {
  auto oldest = std::min_element(rows_.begin(), rows_.end(),
                                 [](auto& a, auto& b) { return a.second->asked < b.second->asked; });
  rows_.erase(oldest);
}

bool Pool::is_better(const Row& row, uint32_t left, uint32_t right) const {
  if (row.score[left] != row.score[right]) return row.score[left] > row.score[right];
  return row.score[left] == kNone || nodes_[left].order < nodes_[right].order;
}

void Pool::make(Row& row) {
  size_t size = nodes_.size();
  row.score.resize(size);
  row.best.resize(size);
  for (uint32_t i = 0; i < size; ++i) row.score[i] = evaluate(row, i);
  for (size_t i = size - 1; i > 0; --i) {
    bool are_nodes = 2 * i >= size;
    uint32_t left = are_nodes ? static_cast<uint32_t>(2 * i - size) : row.best[2 * i];
    uint32_t right = are_nodes ? left + 1 : row.best[2 * i + 1];
    row.best[i] = is_better(row, left, right) ? left : right;
  }
}

void Pool::catch_up(Row& row) {
  for (size_t i = row.read; i < log_.size(); ++i) {
    uint32_t node = log_[i];
    __builtin_prefetch(&nodes_[log_[std::min(i + kAhead, log_.size() - 1)]]);
    if (nodes_[node].changed != i) continue;
    int64_t score = evaluate(row, node);
    if (score == kNone && row.score[node] == kNone) continue;
    row.score[node] = score;
    replay(row, node);
  }
}

// Up to where another node wins as before; an equal score may have another order.
void Pool::replay(Row& row, uint32_t node) const {
  size_t size = nodes_.size();
  uint32_t other = node ^ 1;
  for (size_t i = (size + node) / 2;; i /= 2) {
    uint32_t winner = is_better(row, node, other) ? node : other;
    if (2 * i < size) {
      winner = is_better(row, row.best[2 * i], row.best[2 * i + 1]) ? row.best[2 * i] : row.best[2 * i + 1];
    }
    if (row.best[i] == winner && winner != node) return;
    row.best[i] = winner;
    if (i == 1) return;
  }
}

bool Pool::fits(const Row& row, const Node& node) const {
  const Shape& shape = shapes_[row.shape];
  if (!node.is_open || node.cpu_milli < shape.cpu_milli || node.memory_mib < shape.memory_mib) return false;
  if (!admitted_[row.shape][node.kind]) return false;
  return shape.is_part() ? node.most >= shape.gpu_milli : node.whole >= shape.gpus;
}

int64_t Pool::evaluate(const Row& row, uint32_t number) const {
  const Node& node = nodes_[number];
  if (!fits(row, node)) return kNone;
  const Shape& shape = shapes_[row.shape];
  switch (policy_) {
    case Policy::kRandom: return static_cast<int64_t>(mixed(mixed(lots_) ^ node.lot) >> 1);
    case Policy::kDotProduct: return dot_product(node, shape).first;
    case Policy::kClustering: return clustering(node, shape);
    case Policy::kPacking: return packing(node, shape);
    case Policy::kBestFit: return best_fit(node, shape);
    case Policy::kFgd: return known_.score(node.value - known_.fragment_after(node, shape));
    case Policy::kPriced: {
      int64_t left = node.total - int64_t(shape.gpus) * shape.gpu_milli;
      return -Known::lost(node.value - known_.worth_after(node, shape)) * kLeftMax - left;
    }
  }
  throw Broken("no such policy");
}

// --- decisions

std::vector<int> Pool::choose(const Node& node, const Shape& shape) const {
  if (policy_ == Policy::kDotProduct) return dot_product(node, shape).second;
  if ((policy_ == Policy::kFgd || policy_ == Policy::kPriced) && shape.is_part()) return choose_part(node, shape);
  return tightest(node.gpus, shape);
}

// Of those with the best score the tightest, then the first.
std::vector<int> Pool::choose_part(const Node& node, const Shape& shape) const {
  int64_t best = kNone;
  int chosen = -1;
  Node after = node;
  after.cpu_milli -= shape.cpu_milli;
  after.memory_mib -= shape.memory_mib;
  for (size_t i = 0; i < node.gpus.size(); ++i) {
    int16_t left = node.gpus[i];
    if (left < shape.gpu_milli) continue;
    after.gpus[i] = static_cast<int16_t>(left - shape.gpu_milli);
    after.count_gpus();
    int64_t gone = value(node) - value(after);
    int64_t score = policy_ == Policy::kFgd ? known_.score(gone) : -Known::lost(gone);
    if (score > best || (score == best && left < node.gpus[static_cast<size_t>(chosen)])) {
      best = score;
      chosen = static_cast<int>(i);
    }
    after.gpus[i] = left;
  }
  return {chosen};
}

std::optional<Spot> Pool::find(uint32_t shape) {
  Row& row = this->row(shape);
  uint32_t best = row.best[1];
  if (row.score[best] == kNone) return std::nullopt;
  return Spot{best, choose(nodes_[best], shapes_[shape])};
}

bool Pool::fits_empty(uint32_t shape, int64_t workers, bool one_node) const {
  const Shape& one = shapes_.at(shape);
  int64_t all = 0;
  for (size_t i = 0; i < known_.kinds(); ++i) {
    const Kind& kind = known_.of(static_cast<uint32_t>(i));
    if (!opened_[i] || !kind.admits(one)) continue;
    Node empty;
    empty.cpu_milli = kind.cpu_milli;
    empty.memory_mib = kind.memory_mib;
    empty.gpus.assign(static_cast<size_t>(kind.gpus), kGpuMilli);
    int64_t room = empty.room(one);
    all = one_node ? std::max(all, room) : all + room * opened_[i];
  }
  return all >= workers;
}

std::optional<std::vector<Spot>> Pool::find_gang(uint32_t shape, int64_t workers, bool one_node) {
  bool together = one_node || (shapes_.at(shape).gpus && fits_empty(shape, workers, true));
  return together ? find_together(shape, workers) : find_spread(shape, workers);
}

// Those that can take that many.
std::vector<Pool::Room> Pool::rooms(uint32_t shape, int64_t least) {
  Row& row = this->row(shape);
  std::vector<Room> found;
  for (uint32_t i = 0; i < row.score.size(); ++i) {
    if (row.score[i] == kNone) continue;
    int64_t workers = nodes_[i].room(shapes_[shape]);
    if (workers >= least) found.push_back({workers, row.score[i], i});
  }
  return found;
}

std::optional<std::vector<Spot>> Pool::find_together(uint32_t number, int64_t workers) {
  Shape shape = shapes_[number];
  uint32_t best = UINT32_MAX;
  if (shape.is_part()) {
    auto able = rooms(number, workers);
    auto at = std::min_element(able.begin(), able.end(), [&](const Room& a, const Room& b) {
      return a.score != b.score ? a.score > b.score : nodes_[a.node].order < nodes_[b.node].order;
    });
    if (at != able.end()) best = at->node;
  } else {
    Shape all = shape;
    all.cpu_milli *= workers;
    all.memory_mib *= workers;
    all.gpus *= static_cast<int>(workers);
    Row& row = this->row(this->shape(all));
    if (row.score[row.best[1]] != kNone) best = row.best[1];
  }
  if (best == UINT32_MAX) return std::nullopt;
  std::vector<Spot> spots;
  fill(best, shape, workers, spots);
  return spots;
}

void Pool::fill(uint32_t number, const Shape& shape, int64_t workers, std::vector<Spot>& spots) const {
  Node node = nodes_[number];
  for (int64_t i = 0; i < workers; ++i) {
    spots.push_back({number, choose(node, shape)});
    for (int gpu : spots.back().gpus) node.gpus[static_cast<size_t>(gpu)] -= static_cast<int16_t>(shape.gpu_milli);
    node.cpu_milli -= shape.cpu_milli;
    node.memory_mib -= shape.memory_mib;
    node.count_gpus();
  }
}

std::optional<std::vector<Spot>> Pool::find_spread(uint32_t number, int64_t workers) {
  auto rooms = this->rooms(number, 1);
  int64_t all = std::accumulate(rooms.begin(), rooms.end(), int64_t(0),
                                [](int64_t sum, const Room& room) { return sum + room.workers; });
  if (all < workers) return std::nullopt;
  std::sort(rooms.begin(), rooms.end(), [&](const Room& a, const Room& b) {
    if (a.workers != b.workers) return a.workers > b.workers;
    return a.score != b.score ? a.score > b.score : nodes_[a.node].order < nodes_[b.node].order;
  });
  Shape shape = shapes_[number];
  std::vector<Spot> spots;
  auto at = rooms.begin();
  for (; workers > at->workers; workers -= at->workers, ++at) fill(at->node, shape, at->workers, spots);
  // The last: of the smallest that have room for the rest, the first in this order.
  auto last = at;
  for (auto one = at; one != rooms.end() && one->workers >= workers; ++one)
    if (one->workers < last->workers) last = one;
  fill(last->node, shape, workers, spots);
  return spots;
}

}  // namespace leptonic::placement
