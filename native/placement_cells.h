// What policies make of a node: formulas of services/scheduler/scores.py, number for number, and
// the states of a node's GPUs, each kept once.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace leptonic::placement {

constexpr int64_t kGpuMilli = 1000;
constexpr int64_t kNone = INT64_MIN;  // the score of a node that cannot take it

enum class Policy { kRandom, kDotProduct, kClustering, kPacking, kBestFit, kFgd, kPriced };

using Label = std::pair<std::string, std::string>;

struct Shape {
  int64_t cpu_milli = 0, memory_mib = 0;
  int gpus = 0, gpu_milli = 0;
  std::vector<std::string> gpu_models;
  std::string kind;
  std::vector<Label> labels;

  auto operator<=>(const Shape&) const = default;
  bool is_part() const { return gpus == 1 && gpu_milli < kGpuMilli; }
  int sort() const { return gpu_milli == kGpuMilli ? gpus : 0; }
};

// What machines may have in common; most are of a few kinds.
struct Kind {
  int64_t cpu_milli = 0, memory_mib = 0;
  int gpus = 0;
  std::string gpu_model;
  std::vector<std::string> kinds;
  std::vector<Label> labels;

  auto operator<=>(const Kind&) const = default;
  bool admits(const Shape& shape) const;
};

using Levels = std::vector<int16_t>;  // milli free of each GPU

// All nodes of a kind whose GPUs, in some order, have as much free.
struct Cell {
  uint32_t kind;
  Levels levels;  // ascending
  int64_t total = 0;
  int whole = 0;
  int64_t worth = -1;                        // of its GPUs; -1 until asked
  bool is_learned = false;                   // its fragments are known
  std::vector<std::vector<uint32_t>> after;  // by need: the cell after each choice that differs

  int fitting(int64_t milli) const;
  int64_t room(const Shape& shape, int64_t cpu_milli, int64_t memory_mib) const;
};

// What deciding reads of a node is one line of the processor's cache.
struct alignas(64) Node {
  uint64_t order = 0;  // as the names
  size_t changed = 0;  // its last place in the log
  int64_t cpu_milli = 0, memory_mib = 0;
  int64_t value = 0;  // of what is free: fragments (FGD), worth (priced)
  uint32_t kind = 0, cell = 0;
  int16_t most = 0, whole = 0;  // free on one GPU; of GPUs
  bool is_there = false, is_open = false;

  uint64_t lot = 0;
  Levels gpus;
  std::vector<std::pair<int, int>> held;  // sorts of its GPU workers, and how many
};

struct Typical {
  Shape shape;
  int64_t weight;
};

// A plan's: scores.Prices.
struct Prices {
  std::vector<std::string> models;
  std::vector<std::vector<int64_t>> gpu, cpu, memory;
  int64_t cpu_step = 1, memory_step = 1;

  // -1 for one that it does not name.
  int model(const std::string& name) const;
};

// The states that nodes are or were in, and what each is to the typical shapes.
class Cells {
 public:
  uint32_t kind(const Kind& kind);
  const Kind& of(uint32_t kind) const { return kinds_[kind]; }
  size_t kinds() const { return kinds_.size(); }
  size_t size() const { return cells_.size(); }
  uint32_t intern(uint32_t kind, const Levels& gpus);
  const Cell& operator[](uint32_t cell) const { return cells_[cell]; }
  // For `after`; a shape's (GPUs, milli) is a need.
  uint32_t need(const Shape& shape);
  void learn(std::vector<Typical> typical, std::vector<int64_t> steps);
  int64_t fragment(uint32_t cell, int64_t cpu_milli) { return fragment_at(cell, bucket(cpu_milli)); }
  // The score of the best choice of GPUs.
  int64_t fgd(const Node& node, const Shape& shape, uint32_t need);
  // 100 x the sigmoid of the fragments that go away.
  int64_t score(int64_t gradient) const;
  void price(Prices prices);
  int64_t worth(uint32_t cell, int64_t cpu_milli, int64_t memory_mib);
  // In quanta, rounded down.
  static int64_t lost(int64_t worth);
  // The score of the best choice of GPUs.
  int64_t priced(const Node& node, const Shape& shape, uint32_t need);
  void forget();

 private:
  size_t bucket(int64_t cpu_milli) const;
  int64_t fragment_at(uint32_t cell, size_t bucket);
  void learn(uint32_t cell);
  const std::vector<uint32_t>& after(uint32_t cell, const Shape& shape, uint32_t need);

  std::vector<Kind> kinds_;
  std::map<Kind, uint32_t> kind_ids_;
  std::vector<Cell> cells_;
  std::unordered_map<std::string, uint32_t> ids_;
  std::map<std::pair<int, int>, uint32_t> needs_;
  std::vector<Typical> typical_;
  Prices prices_;
  std::vector<int> models_;  // of a plan, by kind
  std::vector<int64_t> fragments_;  // by cell and by how many typical amounts of CPU are free
  std::vector<int64_t> cpus_;       // of typical shapes with GPUs, each once, ascending
  std::vector<int64_t> steps_;
  int64_t weights_ = 0;
};

uint64_t mixed(uint64_t word);
uint64_t hashed(std::string_view name);
// The tightest GPUs for it, in the order of their numbers.
std::vector<int> tightest(const Levels& gpus, const Shape& shape);
int64_t best_fit(const Node& node, const Cell& cell, const Shape& shape);
int64_t packing(const Cell& cell, const Shape& shape);
int64_t clustering(const Node& node, const Cell& cell, const Shape& shape);
std::pair<int64_t, std::vector<int>> dot_product(const Node& node, const Shape& shape);

}  // namespace leptonic::placement
