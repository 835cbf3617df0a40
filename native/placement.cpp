#include "placement.h"

#include <algorithm>

namespace leptonic::placement {

namespace {

constexpr uint64_t kFirst = uint64_t(1) << 63, kGap = uint64_t(1) << 32;

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

// Orders leave room for names between names; when there is none, all are spread anew.
void Pool::spread_orders() {
  uint64_t order = kFirst - names_.size() / 2 * kGap;
  for (auto& [_, node] : names_) nodes_[node].order = order += kGap;
  for (size_t i = 0; i < states_.size(); ++i)
    if (marks_[i].first != kNobody) marks_[i].first = nodes_[*states_[i].nodes.begin()].order;
}

uint32_t Pool::join(const std::string& name, const Kind& kind) {
  uint32_t number = gone_.empty() ? static_cast<uint32_t>(nodes_.size()) : gone_.back();
  auto [at, is_new] = names_.try_emplace(name, number);
  require(is_new, name + " has joined already");
  if (gone_.empty()) nodes_.emplace_back();
  else gone_.pop_back();
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
  node.count_gpus();
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
  open(at->second, false);
  node.is_there = false;
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
  settle(number);
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

// --- states

// What is kept of a node beside what is free, and the state it is in now.
void Pool::settle(uint32_t number) {
  Node& node = nodes_[number];
  node.count_gpus();
  if (node.state != kNowhere) retire(number);
  if (node.is_open) enter(number);
}

void Pool::enter(uint32_t number) {
  Node& node = nodes_[number];
  auto at = state_ids_.find(key(node));
  if (at == state_ids_.end()) {
    if (unused_.empty()) grow();
    at = state_ids_.emplace(key_, unused_.back()).first;
    unused_.pop_back();
    Alike& state = states_[at->second];
    static_cast<State&>(state) = node;
    std::sort(state.gpus.begin(), state.gpus.end());
    state.value = value(state);
    state.key = key_;
    marks_[at->second].born = ++born_;
  }
  node.state = at->second;
  states_[node.state].nodes.insert(number);
  if (node.order < marks_[node.state].first) note(node.state);
}

void Pool::retire(uint32_t number) {
  Node& node = nodes_[number];
  uint32_t gone_from = node.state;
  Alike& state = states_[gone_from];
  state.nodes.erase(number);
  node.state = kNowhere;
  if (state.nodes.empty()) {
    state_ids_.erase(state.key);
    unused_.push_back(gone_from);
  }
  if (node.order == marks_[gone_from].first) note(gone_from);
}

// All that a score depends on; which GPU has how much is not among it.
const std::string& Pool::key(const Node& node) {
  Levels levels = node.gpus;
  std::sort(levels.begin(), levels.end());
  const int64_t amounts[] = {node.kind, node.cpu_milli, node.memory_mib};
  key_.assign(reinterpret_cast<const char*>(amounts), sizeof amounts);
  key_.append(reinterpret_cast<const char*>(levels.data()), levels.size() * sizeof levels[0]);
  if (policy_ == Policy::kClustering) {
    std::vector<int> sorts;
    for (auto& [sort, _] : node.held) sorts.push_back(sort);
    std::sort(sorts.begin(), sorts.end());
    key_.append(reinterpret_cast<const char*>(sorts.data()), sorts.size() * sizeof sorts[0]);
  }
  return key_;
}

void Pool::grow() {
  size_t before = states_.size(), now = before ? 2 * before : 64;
  states_.resize(now, Alike(&nodes_));
  marks_.resize(now);
  for (size_t i = now; i > before; --i) unused_.push_back(static_cast<uint32_t>(i - 1));
}

}  // namespace leptonic::placement
