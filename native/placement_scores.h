// What policies make of a node: the formulas of services/scheduler/scores.py, number for number.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
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
  bool spread = false;  // where most is free, whatever the policy

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

// What is free of a node, and what it is. What deciding reads of it is one line of the processor's
// cache.
struct alignas(64) State {
  int64_t cpu_milli = 0, memory_mib = 0;
  int64_t value = 0;  // of what is free: fragments (FGD), worth (priced)
  uint32_t kind = 0;
  int32_t total = 0;            // free of its GPUs
  int16_t most = 0, whole = 0;  // free on one GPU; of GPUs
  Levels gpus;
  std::vector<std::pair<int, int>> held;  // sorts of its GPU workers, and how many

  void count_gpus();
  int64_t room(const Shape& shape) const;
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

// What is learned of typical shapes, and a plan's prices, in tables by the kind of node.
//
// A typical worker of one GPU can use what is left of each GPU that has enough for it, whatever the
// others have; one of several needs as many whole ones. So the fragments of a node are a sum over
// its GPUs and a term of its whole ones, and placing a part of a GPU changes one summand.
class Known {
 public:
  uint32_t kind(const Kind& kind);
  const Kind& of(uint32_t kind) const { return kinds_[kind]; }
  size_t kinds() const { return kinds_.size(); }
  void learn(std::vector<Typical> typical, std::vector<int64_t> steps);
  void price(Prices prices);
  int64_t fragment(const State& node) const;
  int64_t worth(const State& node) const;
  // After each choice of GPUs that differs: what is least, of the fragments; most, of the worth.
  int64_t fragment_after(const State& node, const Shape& shape) const;
  int64_t worth_after(const State& node, const Shape& shape) const;
  // 100 x the sigmoid of the fragments that go away.
  int64_t score(int64_t gradient) const;
  // In quanta, rounded down.
  static int64_t lost(int64_t worth);

 private:
  size_t bucket(int64_t cpu_milli) const;
  void tabulate(uint32_t kind);
  const int64_t* parts(uint32_t kind, int64_t cpu_milli) const;
  int64_t fragment_of(const int64_t* parts, int64_t total, int64_t usable, int64_t whole) const;
  int64_t usable_worth(uint32_t kind, int64_t gpus, int64_t cpu_milli, int64_t memory_mib) const;
  int64_t gpu_worth(uint32_t kind, int64_t left) const;

  std::vector<Kind> kinds_;
  std::map<Kind, uint32_t> kind_ids_;
  std::vector<Typical> typical_;
  std::vector<int64_t> steps_;
  int64_t weights_ = 0;
  std::vector<int64_t> cpus_;     // of typical shapes with GPUs, each once, ascending
  std::vector<int64_t> millis_;   // of those with one GPU, likewise
  std::vector<uint16_t> enough_;  // by milli: for how many of millis_
  // By kind and number of cpus_ that are free: the weights that can use a GPU, by enough_; then
  // those that need several, by whole ones.
  std::vector<std::vector<int64_t>> tables_;
  Prices prices_;
  std::vector<int> models_;  // of a plan, by kind
};

uint64_t mixed(uint64_t word);
uint64_t hashed(std::string_view name);
// The tightest GPUs for it, in the order of their numbers.
std::vector<int> tightest(const Levels& gpus, const Shape& shape);
std::vector<int> loosest(const Levels& gpus, const Shape& shape);
int64_t best_fit(const State& node, const Shape& shape);
int64_t spread(const Kind& kind, const State& node, const Shape& shape);
int64_t packing(const State& node, const Shape& shape);
int64_t clustering(const State& node, const Shape& shape);
std::pair<int64_t, std::vector<int>> dot_product(const State& node, const Shape& shape);

}  // namespace leptonic::placement
