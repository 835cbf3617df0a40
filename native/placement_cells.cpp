#include "placement_cells.h"

#include <algorithm>
#include <cassert>

namespace leptonic::placement {

namespace {

constexpr int64_t kCpuUnit = 128'000, kGpuUnit = 8'000, kQuanta = 100;
constexpr int64_t kWorth = 1'000'000, kQuantum = kWorth * 3 / 1000, kLeftMax = 1 << 16, kCpuMax = int64_t(1) << 40;
constexpr int64_t kWorkersMax = 1 << 20;
__extension__ typedef __int128 Wide;  // amounts are below 2^48, and are multiplied

// Rounds down, as Python's.
int64_t divided(Wide amount, Wide by) {
  Wide quotient = amount / by - (amount % by != 0 && (amount < 0) != (by < 0));
  return static_cast<int64_t>(std::clamp<Wide>(quotient, INT64_MIN + 1, INT64_MAX));
}

// The part of so much worth of GPUs that an amount of something else lets be used.
int64_t usable(const std::vector<int64_t>& table, int64_t step, int64_t amount, int64_t gpus) {
  int64_t ratio = std::min(amount, kCpuMax) * kWorth / gpus;
  auto at = static_cast<size_t>(ratio / step);
  if (at + 1 >= table.size()) return table.back();
  return table[at] + divided(Wide(table[at + 1] - table[at]) * (ratio % step), step);
}

}  // namespace

bool Kind::admits(const Shape& shape) const {
  auto among = [](const auto& all, const auto& one) { return std::find(all.begin(), all.end(), one) != all.end(); };
  if (shape.gpus && !shape.gpu_models.empty() && !among(shape.gpu_models, gpu_model)) return false;
  if (!shape.kind.empty() && !among(kinds, shape.kind)) return false;
  return std::all_of(shape.labels.begin(), shape.labels.end(), [&](auto& label) { return among(labels, label); });
}

int Cell::fitting(int64_t milli) const {
  return static_cast<int>(levels.end() - std::lower_bound(levels.begin(), levels.end(), milli));
}

int64_t Cell::room(const Shape& shape, int64_t cpu_milli, int64_t memory_mib) const {
  int64_t room = kWorkersMax;
  if (shape.cpu_milli) room = std::min(room, cpu_milli / shape.cpu_milli);
  if (shape.memory_mib) room = std::min(room, memory_mib / shape.memory_mib);
  if (shape.gpus) {
    int64_t parts = 0;
    for (int16_t left : levels) parts += left / shape.gpu_milli;
    room = std::min(room, parts / shape.gpus);
  }
  return room;
}

uint32_t Cells::kind(const Kind& kind) {
  auto [at, is_new] = kind_ids_.try_emplace(kind, static_cast<uint32_t>(kinds_.size()));
  if (is_new) {
    kinds_.push_back(kind);
    models_.push_back(prices_.model(kind.gpu_model));
  }
  return at->second;
}

uint32_t Cells::intern(uint32_t kind, const Levels& gpus) {
  Levels levels = gpus;
  std::sort(levels.begin(), levels.end());
  std::string key(reinterpret_cast<const char*>(&kind), sizeof kind);
  key.append(reinterpret_cast<const char*>(levels.data()), levels.size() * sizeof(int16_t));
  auto [at, is_new] = ids_.try_emplace(std::move(key), static_cast<uint32_t>(cells_.size()));
  if (is_new) {
    Cell cell{kind, std::move(levels)};
    for (int16_t left : cell.levels) cell.total += left;
    cell.whole = cell.fitting(kGpuMilli);
    cells_.push_back(std::move(cell));
    fragments_.resize(cells_.size() * (cpus_.size() + 1));
  }
  return at->second;
}

uint32_t Cells::need(const Shape& shape) {
  return needs_.try_emplace({shape.gpus, shape.gpu_milli}, static_cast<uint32_t>(needs_.size())).first->second;
}

void Cells::forget() {
  cells_.clear();
  ids_.clear();
  fragments_.clear();
}

void Cells::learn(std::vector<Typical> typical, std::vector<int64_t> steps) {
  typical_ = std::move(typical);
  steps_ = std::move(steps);
  cpus_.clear();
  weights_ = 0;
  for (auto& [shape, weight] : typical_) {
    weights_ += weight;
    if (shape.gpus) cpus_.push_back(shape.cpu_milli);
  }
  std::sort(cpus_.begin(), cpus_.end());
  cpus_.erase(std::unique(cpus_.begin(), cpus_.end()), cpus_.end());
  for (Cell& cell : cells_) cell.is_learned = false;
  fragments_.assign(cells_.size() * (cpus_.size() + 1), 0);
}

size_t Cells::bucket(int64_t cpu_milli) const {
  return static_cast<size_t>(std::upper_bound(cpus_.begin(), cpus_.end(), cpu_milli) - cpus_.begin());
}

// For all amounts of CPU at once: a shape that runs with some runs with more.
void Cells::learn(uint32_t number) {
  Cell& cell = cells_[number];
  int64_t* fragments = &fragments_[number * (cpus_.size() + 1)];
  std::fill_n(fragments, cpus_.size() + 1, 0);
  for (auto& [shape, weight] : typical_) {
    int fitting = shape.gpus ? cell.fitting(shape.gpu_milli) : 0;
    if (!shape.gpus || fitting < shape.gpus || !kinds_[cell.kind].admits(shape)) continue;
    int64_t left = 0;
    for (size_t i = cell.levels.size() - static_cast<size_t>(fitting); i < cell.levels.size(); ++i) left += cell.levels[i];
    fragments[bucket(shape.cpu_milli)] += weight * left;
  }
  int64_t amount = weights_ * cell.total;
  for (size_t i = 0; i <= cpus_.size(); ++i) amount = fragments[i] = amount - fragments[i];
  cell.is_learned = true;
}

int64_t Cells::fragment_at(uint32_t cell, size_t bucket) {
  if (!cells_[cell].is_learned) learn(cell);
  return fragments_[cell * (cpus_.size() + 1) + bucket];
}

const std::vector<uint32_t>& Cells::after(uint32_t cell, const Shape& shape, uint32_t need) {
  if (cells_[cell].after.size() <= need) cells_[cell].after.resize(need + 1);
  if (cells_[cell].after[need].empty()) {
    std::vector<uint32_t> after;
    Levels levels = cells_[cell].levels;
    size_t first = static_cast<size_t>(std::lower_bound(levels.begin(), levels.end(), shape.gpu_milli) - levels.begin());
    size_t last = shape.is_part() ? levels.size() : first + 1;
    for (size_t i = first; i < last; ++i) {
      if (i > first && levels[i] == levels[i - 1]) continue;
      Levels left = levels;
      for (size_t j = i; j < i + static_cast<size_t>(shape.gpus); ++j) left[j] = static_cast<int16_t>(left[j] - shape.gpu_milli);
      after.push_back(intern(cells_[cell].kind, left));
    }
    cells_[cell].after[need] = std::move(after);
  }
  return cells_[cell].after[need];
}

int64_t Cells::score(int64_t gradient) const {
  return std::upper_bound(steps_.begin(), steps_.end(), gradient) - steps_.begin();
}

int64_t Cells::fgd(const Node& node, const Shape& shape, uint32_t need) {
  size_t left = bucket(node.cpu_milli - shape.cpu_milli);
  if (!shape.gpus) return score(node.value - fragment_at(node.cell, left));
  int64_t least = INT64_MAX;
  for (uint32_t cell : after(node.cell, shape, need)) least = std::min(least, fragment_at(cell, left));
  return score(node.value - least);
}

int Prices::model(const std::string& name) const {
  auto at = std::find(models.begin(), models.end(), name);
  return at == models.end() ? -1 : static_cast<int>(at - models.begin());
}

void Cells::price(Prices prices) {
  prices_ = std::move(prices);
  for (size_t i = 0; i < kinds_.size(); ++i) models_[i] = prices_.model(kinds_[i].gpu_model);
  for (Cell& cell : cells_) cell.worth = -1;
}

int64_t Cells::worth(uint32_t number, int64_t cpu_milli, int64_t memory_mib) {
  Cell& cell = cells_[number];
  int model = models_[cell.kind];
  if (model < 0) return cell.total * kWorth / kGpuMilli;
  auto at = static_cast<size_t>(model);
  if (cell.worth < 0) {
    auto& table = prices_.gpu[at];
    auto last = static_cast<int64_t>(table.size()) - 1;
    cell.worth = 0;
    for (int16_t left : cell.levels) cell.worth += table[static_cast<size_t>(left * last / kGpuMilli)];
  }
  if (!cell.worth) return 0;
  int64_t cpu = usable(prices_.cpu[at], prices_.cpu_step, cpu_milli, cell.worth);
  int64_t memory = usable(prices_.memory[at], prices_.memory_step, memory_mib, cell.worth);
  return cell.worth * std::min(cpu, memory) / kWorth;
}

int64_t Cells::lost(int64_t worth) { return worth / kQuantum - (worth % kQuantum < 0); }

int64_t Cells::priced(const Node& node, const Shape& shape, uint32_t need) {
  int64_t cpu_milli = node.cpu_milli - shape.cpu_milli, memory_mib = node.memory_mib - shape.memory_mib;
  int64_t most = INT64_MIN;
  if (!shape.gpus) most = worth(node.cell, cpu_milli, memory_mib);
  else
    for (uint32_t cell : after(node.cell, shape, need)) most = std::max(most, worth(cell, cpu_milli, memory_mib));
  int64_t spare = cells_[node.cell].total - int64_t(shape.gpus) * shape.gpu_milli;
  return -lost(node.value - most) * kLeftMax - spare;
}

uint64_t mixed(uint64_t word) {
  word += 0x9E3779B97F4A7C15;
  word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9;
  word = (word ^ word >> 27) * 0x94D049BB133111EB;
  return word ^ word >> 31;
}

uint64_t hashed(std::string_view name) {
  uint64_t word = 0xCBF29CE484222325;
  for (char byte : name) word = (word ^ static_cast<unsigned char>(byte)) * 0x100000001B3;
  return word;
}

std::vector<int> tightest(const Levels& gpus, const Shape& shape) {
  std::vector<int> fitting;
  for (size_t i = 0; shape.gpus && i < gpus.size(); ++i)
    if (gpus[i] >= shape.gpu_milli) fitting.push_back(static_cast<int>(i));
  std::stable_sort(fitting.begin(), fitting.end(), [&](int a, int b) { return gpus[size_t(a)] < gpus[size_t(b)]; });
  fitting.resize(static_cast<size_t>(shape.gpus));
  std::sort(fitting.begin(), fitting.end());
  return fitting;
}

int64_t best_fit(const Node& node, const Cell& cell, const Shape& shape) {
  Wide spare = Wide(node.cpu_milli - shape.cpu_milli) * kGpuUnit +
               Wide(cell.total - int64_t(shape.gpus) * shape.gpu_milli) * kCpuUnit;
  Wide whole = 2 * kCpuUnit * kGpuUnit;
  return divided(kQuanta * (whole - spare), whole);
}

int64_t packing(const Cell& cell, const Shape& shape) {
  if (!shape.gpus) return 0;
  if (static_cast<size_t>(cell.whole) == cell.levels.size()) return std::max<int64_t>(kQuanta / 3 - cell.whole, cell.whole);
  size_t first = cell.levels.size() - static_cast<size_t>(cell.fitting(shape.gpu_milli));
  int64_t fresh = 0, spare = 0;
  for (size_t i = first; i < first + static_cast<size_t>(shape.gpus); ++i) {
    fresh += cell.levels[i] == kGpuMilli;
    spare += cell.levels[i] * 100 / kGpuMilli;
  }
  if (fresh) return std::max(kQuanta / 2 - fresh, kQuanta / 3);
  return std::max(kQuanta - spare / 10, kQuanta / 2);
}

int64_t clustering(const Node& node, const Cell& cell, const Shape& shape) {
  if (!shape.gpus) return 0;
  bool beside = std::any_of(node.held.begin(), node.held.end(), [&](auto& one) { return one.first == shape.sort(); });
  int64_t quarter = beside ? (node.held.size() == 1 ? 3 : 2) : (node.held.empty() ? 1 : 0);
  int64_t used = std::max<int64_t>(0, kGpuUnit - cell.total);
  return kQuanta / 4 * (used + quarter * kGpuUnit) / kGpuUnit;
}

std::pair<int64_t, std::vector<int>> dot_product(const Node& node, const Shape& shape) {
  Wide full = 2 * Wide(kCpuUnit) * kCpuUnit;
  Wide wanted = Wide(shape.gpus) * shape.gpu_milli * (kCpuUnit / kGpuUnit) * (kCpuUnit / kGpuUnit);
  std::pair<int64_t, std::vector<int>> best{kNone, {}};
  auto offer = [&](int64_t left, std::vector<int> gpus) {
    Wide dot = Wide(shape.cpu_milli) * node.cpu_milli + wanted * left;
    int64_t score = divided(kQuanta * (full - dot), full);
    if (score > best.first) best = {score, std::move(gpus)};
  };
  std::vector<int> whole;
  for (size_t i = 0; i < node.gpus.size(); ++i) {
    int64_t left = node.gpus[i];
    if (left == kGpuMilli) whole.push_back(static_cast<int>(i));
    else if (shape.gpus <= 1 && shape.gpu_milli < kGpuMilli && left >= shape.gpu_milli)
      offer(left, shape.gpus ? std::vector<int>{static_cast<int>(i)} : std::vector<int>{});
  }
  int64_t idle = static_cast<int64_t>(whole.size()) * kGpuMilli;
  if (whole.size() >= static_cast<size_t>(shape.gpus)) {
    whole.resize(static_cast<size_t>(shape.gpus));
    offer(idle, std::move(whole));
  }
  return best;
}

}  // namespace leptonic::placement
