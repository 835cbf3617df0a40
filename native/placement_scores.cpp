#include "placement_scores.h"

#include <algorithm>
#include <cassert>
#include <numeric>

namespace leptonic::placement {

namespace {

constexpr int64_t kCpuUnit = 128'000, kGpuUnit = 8'000, kQuanta = 100, kMillion = 1'000'000;
constexpr int64_t kWorth = 1'000'000, kQuantum = kWorth * 3 / 1000, kCpuMax = int64_t(1) << 40;
constexpr int64_t kWorkersMax = 1 << 20;
__extension__ typedef __int128 Wide;  // amounts are below 2^48, and are multiplied

// Rounds down, as Python's. A division of words is several times faster than one of `Wide`.
int64_t divided(Wide amount, int64_t by) {
  auto word = static_cast<int64_t>(amount);
  if (word == amount) return word / by - (word % by < 0);
  Wide quotient = amount / by - (amount % by < 0);
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

void State::count_gpus() {
  total = most = whole = 0;
  for (int16_t left : gpus) {
    total += left;
    most = std::max(most, left);
    whole = static_cast<int16_t>(whole + (left == kGpuMilli));
  }
}

int64_t State::room(const Shape& shape) const {
  int64_t room = kWorkersMax;
  if (shape.cpu_milli) room = std::min(room, cpu_milli / shape.cpu_milli);
  if (shape.memory_mib) room = std::min(room, memory_mib / shape.memory_mib);
  if (shape.gpus) {
    int64_t parts = 0;
    for (int16_t left : gpus) parts += left / shape.gpu_milli;
    room = std::min(room, parts / shape.gpus);
  }
  return room;
}

uint32_t Known::kind(const Kind& kind) {
  auto [at, is_new] = kind_ids_.try_emplace(kind, static_cast<uint32_t>(kinds_.size()));
  if (is_new) {
    kinds_.push_back(kind);
    models_.push_back(prices_.model(kind.gpu_model));
    tables_.emplace_back();
    tabulate(at->second);
  }
  return at->second;
}

void Known::learn(std::vector<Typical> typical, std::vector<int64_t> steps) {
  typical_ = std::move(typical);
  steps_ = std::move(steps);
  cpus_.clear();
  millis_.clear();
  weights_ = 0;
  for (auto& [shape, weight] : typical_) {
    weights_ += weight;
    if (shape.gpus) cpus_.push_back(shape.cpu_milli);
    if (shape.gpus == 1) millis_.push_back(shape.gpu_milli);
  }
  for (auto* each : {&cpus_, &millis_}) {
    std::sort(each->begin(), each->end());
    each->erase(std::unique(each->begin(), each->end()), each->end());
  }
  enough_.clear();
  for (int64_t milli = 0; milli <= kGpuMilli; ++milli)
    enough_.push_back(static_cast<uint16_t>(std::upper_bound(millis_.begin(), millis_.end(), milli) - millis_.begin()));
  for (uint32_t kind = 0; kind < kinds_.size(); ++kind) tabulate(kind);
}

size_t Known::bucket(int64_t cpu_milli) const {
  return static_cast<size_t>(std::upper_bound(cpus_.begin(), cpus_.end(), cpu_milli) - cpus_.begin());
}

// Weights that need just so much, then summed over those that need less.
void Known::tabulate(uint32_t kind) {
  size_t gpus = static_cast<size_t>(kinds_[kind].gpus) + 1, first = millis_.size() + 1, width = first + gpus;
  std::vector<int64_t> table((cpus_.size() + 1) * width);
  for (auto& [shape, weight] : typical_) {
    if (!shape.gpus || shape.gpus > kinds_[kind].gpus || !kinds_[kind].admits(shape)) continue;
    size_t at = shape.gpus == 1 ? enough_[static_cast<size_t>(shape.gpu_milli)] : first + static_cast<size_t>(shape.gpus);
    table[bucket(shape.cpu_milli) * width + at] += weight;
  }
  for (size_t i = 0; i < table.size(); ++i)
    if (i % width != 0 && i % width != first) table[i] += table[i - 1];
  for (size_t i = width; i < table.size(); ++i) table[i] += table[i - width];
  tables_[kind] = std::move(table);
}

const int64_t* Known::parts(uint32_t kind, int64_t cpu_milli) const {
  size_t width = millis_.size() + 2 + static_cast<size_t>(kinds_[kind].gpus);
  return &tables_[kind][bucket(cpu_milli) * width];
}

int64_t Known::fragment_of(const int64_t* parts, int64_t total, int64_t usable, int64_t whole) const {
  return weights_ * total - usable - whole * kGpuMilli * parts[millis_.size() + 1 + static_cast<size_t>(whole)];
}

int64_t Known::fragment(const State& node) const {
  if (enough_.empty()) return 0;
  const int64_t* parts = this->parts(node.kind, node.cpu_milli);
  int64_t usable = 0;
  for (int16_t left : node.gpus) usable += left * parts[enough_[static_cast<size_t>(left)]];
  return fragment_of(parts, node.total, usable, node.whole);
}

int64_t Known::fragment_after(const State& node, const Shape& shape) const {
  if (enough_.empty()) return 0;
  const int64_t* parts = this->parts(node.kind, node.cpu_milli - shape.cpu_milli);
  auto used = [&](int64_t left) { return left * parts[enough_[static_cast<size_t>(left)]]; };
  int64_t usable = 0;
  for (int16_t left : node.gpus) usable += used(left);
  int64_t total = node.total - int64_t(shape.gpus) * shape.gpu_milli;
  if (!shape.is_part()) {
    int64_t left = usable - shape.gpus * used(kGpuMilli);
    return fragment_of(parts, total, left, node.whole - shape.gpus);
  }
  int64_t least = INT64_MAX;
  for (size_t i = 0; i < node.gpus.size(); ++i) {
    int16_t left = node.gpus[i];
    if (left < shape.gpu_milli || (i && left == node.gpus[i - 1])) continue;
    int64_t after = usable - used(left) + used(left - shape.gpu_milli);
    least = std::min(least, fragment_of(parts, total, after, node.whole - (left == kGpuMilli)));
  }
  return least;
}

int64_t Known::score(int64_t gradient) const {
  return std::upper_bound(steps_.begin(), steps_.end(), gradient) - steps_.begin();
}

int Prices::model(const std::string& name) const {
  auto at = std::find(models.begin(), models.end(), name);
  return at == models.end() ? -1 : static_cast<int>(at - models.begin());
}

void Known::price(Prices prices) {
  prices_ = std::move(prices);
  for (size_t i = 0; i < kinds_.size(); ++i) models_[i] = prices_.model(kinds_[i].gpu_model);
}

int64_t Known::gpu_worth(uint32_t kind, int64_t left) const {
  auto& table = prices_.gpu[static_cast<size_t>(models_[kind])];
  return table[static_cast<size_t>(left * (static_cast<int64_t>(table.size()) - 1) / kGpuMilli)];
}

int64_t Known::usable_worth(uint32_t kind, int64_t gpus, int64_t cpu_milli, int64_t memory_mib) const {
  if (!gpus) return 0;
  auto model = static_cast<size_t>(models_[kind]);
  int64_t cpu = usable(prices_.cpu[model], prices_.cpu_step, cpu_milli, gpus);
  int64_t memory = usable(prices_.memory[model], prices_.memory_step, memory_mib, gpus);
  return gpus * std::min(cpu, memory) / kWorth;
}

int64_t Known::worth(const State& node) const {
  if (models_[node.kind] < 0) return node.total * kWorth / kGpuMilli;
  int64_t gpus = 0;
  for (int16_t left : node.gpus) gpus += gpu_worth(node.kind, left);
  return usable_worth(node.kind, gpus, node.cpu_milli, node.memory_mib);
}

int64_t Known::worth_after(const State& node, const Shape& shape) const {
  int64_t taken = int64_t(shape.gpus) * shape.gpu_milli;
  if (models_[node.kind] < 0) return (node.total - taken) * kWorth / kGpuMilli;
  int64_t cpu_milli = node.cpu_milli - shape.cpu_milli, memory_mib = node.memory_mib - shape.memory_mib;
  int64_t gpus = 0;
  for (int16_t left : node.gpus) gpus += gpu_worth(node.kind, left);
  if (!shape.is_part()) {
    int64_t each = shape.gpus ? gpu_worth(node.kind, kGpuMilli) - gpu_worth(node.kind, 0) : 0;
    return usable_worth(node.kind, gpus - shape.gpus * each, cpu_milli, memory_mib);
  }
  int64_t most = INT64_MIN;
  for (size_t i = 0; i < node.gpus.size(); ++i) {
    int16_t left = node.gpus[i];
    if (left < shape.gpu_milli || (i && left == node.gpus[i - 1])) continue;
    int64_t after = gpus - gpu_worth(node.kind, left) + gpu_worth(node.kind, left - shape.gpu_milli);
    most = std::max(most, usable_worth(node.kind, after, cpu_milli, memory_mib));
  }
  return most;
}

int64_t Known::lost(int64_t worth) { return worth / kQuantum - (worth % kQuantum < 0); }

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

std::vector<int> loosest(const Levels& gpus, const Shape& shape) {
  std::vector<int> order(gpus.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return gpus[size_t(a)] > gpus[size_t(b)]; });
  order.resize(static_cast<size_t>(shape.gpus));
  std::sort(order.begin(), order.end());
  return order;
}

int64_t spread(const Kind& kind, const State& node, const Shape& shape) {
  auto share = [](int64_t whole, int64_t left) { return whole ? kMillion * (whole - left) / whole : 0; };
  int64_t used = std::max(share(kind.cpu_milli, node.cpu_milli - shape.cpu_milli),
                          share(kind.memory_mib, node.memory_mib - shape.memory_mib));
  return -std::max(used, share(kind.gpus * kGpuMilli, node.total - int64_t(shape.gpus) * shape.gpu_milli));
}

int64_t best_fit(const State& node, const Shape& shape) {
  Wide spare = Wide(node.cpu_milli - shape.cpu_milli) * kGpuUnit +
               Wide(node.total - int64_t(shape.gpus) * shape.gpu_milli) * kCpuUnit;
  constexpr int64_t whole = 2 * kCpuUnit * kGpuUnit;
  return divided(kQuanta * (whole - spare), whole);
}

int64_t packing(const State& node, const Shape& shape) {
  if (!shape.gpus) return 0;
  if (static_cast<size_t>(node.whole) == node.gpus.size()) return std::max<int64_t>(kQuanta / 3 - node.whole, node.whole);
  int64_t fresh = 0, spare = 0;
  for (int gpu : tightest(node.gpus, shape)) {
    int16_t left = node.gpus[static_cast<size_t>(gpu)];
    fresh += left == kGpuMilli;
    spare += left * 100 / kGpuMilli;
  }
  if (fresh) return std::max(kQuanta / 2 - fresh, kQuanta / 3);
  return std::max(kQuanta - spare / 10, kQuanta / 2);
}

int64_t clustering(const State& node, const Shape& shape) {
  if (!shape.gpus) return 0;
  bool beside = std::any_of(node.held.begin(), node.held.end(), [&](auto& one) { return one.first == shape.sort(); });
  int64_t quarter = beside ? (node.held.size() == 1 ? 3 : 2) : (node.held.empty() ? 1 : 0);
  int64_t used = std::max<int64_t>(0, kGpuUnit - node.total);
  return kQuanta / 4 * (used + quarter * kGpuUnit) / kGpuUnit;
}

std::pair<int64_t, std::vector<int>> dot_product(const State& node, const Shape& shape) {
  constexpr int64_t full = 2 * kCpuUnit * kCpuUnit;
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
