// Decisions: the node and its GPUs for one worker, and for gangs.
#include <algorithm>
#include <numeric>

#include "placement.h"

namespace leptonic::placement {

std::vector<int> Pool::choose(const State& node, const Shape& shape) const {
  if (shape.spread) return loosest(node.gpus, shape);
  if (policy_ == Policy::kDotProduct) return dot_product(node, shape).second;
  if ((policy_ == Policy::kFgd || policy_ == Policy::kPriced) && shape.is_part()) return choose_part(node, shape);
  return tightest(node.gpus, shape);
}

// Of those with the best score the tightest, then the first.
std::vector<int> Pool::choose_part(const State& node, const Shape& shape) const {
  int64_t best = kNone;
  int chosen = -1;
  State after = node;
  int64_t before = value(node);
  after.cpu_milli -= shape.cpu_milli;
  after.memory_mib -= shape.memory_mib;
  for (size_t i = 0; i < node.gpus.size(); ++i) {
    int16_t left = node.gpus[i];
    auto here = node.gpus.begin() + static_cast<long>(i);
    bool is_tried = std::find(node.gpus.begin(), here, left) != here;
    if (left < shape.gpu_milli || is_tried) continue;
    after.gpus[i] = static_cast<int16_t>(left - shape.gpu_milli);
    after.count_gpus();
    int64_t gone = before - value(after);
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
  auto found = best(shape, 1);
  if (!found) return std::nullopt;
  return Spot{*found, choose(nodes_[*found], shapes_[shape])};
}

// Of those that have room for so many workers.
std::optional<uint32_t> Pool::best(uint32_t shape, int64_t workers) {
  if (is_drawn(shapes_[shape])) return best_of(rooms(shape, workers));
  Row& row = this->row(shape);
  uint32_t found = row.best[1];
  if (workers > 1) {
    found = kNowhere;
    for (uint32_t i = 0; i < states_.size(); ++i)
      if (row.score[i] != kNone && states_[i].room(shapes_[shape]) >= workers &&
          (found == kNowhere || is_better(row, i, found)))
        found = i;
  }
  if (found == kNowhere || row.score[found] == kNone) return std::nullopt;
  return *states_[found].nodes.begin();
}

bool Pool::fits_empty(uint32_t shape, int64_t workers, bool one_node) const {
  const Shape& one = shapes_.at(shape);
  int64_t all = 0;
  for (size_t i = 0; i < known_.kinds(); ++i) {
    const Kind& kind = known_.of(static_cast<uint32_t>(i));
    if (!opened_[i] || !kind.admits(one)) continue;
    State empty;
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
  std::vector<int64_t> workers(states_.size());
  for (size_t i = 0; i < states_.size(); ++i)
    if (row.score[i] != kNone) workers[i] = states_[i].room(shapes_[shape]);
  bool is_drawn = this->is_drawn(shapes_[shape]);
  std::vector<Room> found;
  for (uint32_t i = 0; i < nodes_.size(); ++i) {
    uint32_t state = nodes_[i].state;
    if (state == kNowhere || row.score[state] == kNone || workers[state] < least) continue;
    found.push_back({workers[state], is_drawn ? lot(nodes_[i]) : row.score[state], i});
  }
  return found;
}

// Drawn anew for every placement, by what is taken.
int64_t Pool::lot(const Node& node) const { return static_cast<int64_t>(mixed(mixed(lots_) ^ node.lot) >> 1); }

std::optional<uint32_t> Pool::best_of(const std::vector<Room>& rooms) const {
  auto at = std::min_element(rooms.begin(), rooms.end(), [&](const Room& a, const Room& b) {
    return a.score != b.score ? a.score > b.score : nodes_[a.node].order < nodes_[b.node].order;
  });
  if (at == rooms.end()) return std::nullopt;
  return at->node;
}

std::optional<std::vector<Spot>> Pool::find_together(uint32_t number, int64_t workers) {
  Shape shape = shapes_[number];
  std::optional<uint32_t> found;
  if (shape.is_part()) {
    found = best(number, workers);
  } else {
    Shape all = shape;
    all.cpu_milli *= workers;
    all.memory_mib *= workers;
    all.gpus *= static_cast<int>(workers);
    found = best(this->shape(all), 1);
  }
  if (!found) return std::nullopt;
  std::vector<Spot> spots;
  fill(*found, shape, workers, spots);
  return spots;
}

void Pool::fill(uint32_t number, const Shape& shape, int64_t workers, std::vector<Spot>& spots) const {
  State node = nodes_[number];
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
