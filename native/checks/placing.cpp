// Random walks of two pools with the same seed, one of which forgets what it may: whatever is taken,
// given back, joined and left, they answer alike, and a place that is found can be taken.
#include "../placement.h"

#include "checks.h"

namespace leptonic {

namespace {

using namespace placement;

Shape some_shape(Random& random) {
  static const std::pair<int, int> kGpus[] = {{0, 0}, {1, 100}, {1, 330}, {1, 500}, {1, 1000}, {2, 1000}, {4, 1000}};
  auto [gpus, milli] = kGpus[below(random, 7)];
  Shape shape{int64_t(below(random, 5)) * 1000, int64_t(below(random, 3)) * 100, gpus, milli, {}, {}, {}};
  if (below(random, 4) == 0) shape.gpu_models = {"T4"};
  return shape;
}

Kind some_kind(Random& random) {
  static const int kGpus[] = {0, 1, 2, 4, 8};
  return {int64_t(1 + below(random, 32)) * 1000, int64_t(1 + below(random, 9)) * 100, kGpus[below(random, 5)],
          below(random, 2) ? "T4" : "V100", {}, {}};
}

bool are_alike(const std::optional<std::vector<Spot>>& one, const std::optional<std::vector<Spot>>& other) {
  if (one.has_value() != other.has_value()) return false;
  for (size_t i = 0; one && i < one->size(); ++i)
    if ((*one)[i].node != (*other)[i].node || (*one)[i].gpus != (*other)[i].gpus) return false;
  return true;
}

struct Twins {
  explicit Twins(Policy policy, uint64_t seed) : random(seed), one(policy, 1), other(policy, 1) {}

  void join() {
    std::string name = std::to_string(below(random, 200));
    if (numbers.contains(name)) return;
    Kind kind = some_kind(random);
    uint32_t number = one.join(name, kind);
    CHECK(number == other.join(name, kind));
    one.open(number, true);
    other.open(number, true);
    numbers[name] = number;
  }

  void leave() {
    if (numbers.empty()) return;
    auto at = std::next(numbers.begin(), static_cast<long>(below(random, numbers.size())));
    for (auto& [_, spot] : held)
      if (spot.node == at->second) return;
    one.leave(at->first);
    other.leave(at->first);
    numbers.erase(at);
  }

  void place() {
    Shape shape = some_shape(random);
    int64_t workers = below(random, 3) ? 1 : 1 + static_cast<int64_t>(below(random, 12));
    bool one_node = below(random, 2);
    if (below(random, 16) == 0) other.forget_shapes();
    auto found = one.find_gang(one.shape(shape), workers, one_node);
    CHECK(are_alike(found, other.find_gang(other.shape(shape), workers, one_node)));
    if (!found) return;
    CHECK(found->size() == static_cast<size_t>(workers) && one.fits_empty(one.shape(shape), workers, one_node));
    for (auto& spot : *found) {
      one.take(one.shape(shape), spot.node, spot.gpus);
      other.take(other.shape(shape), spot.node, spot.gpus);
      held.emplace_back(shape, spot);
    }
  }

  void finish() {
    if (held.empty()) return;
    std::swap(held[below(random, held.size())], held.back());
    auto [shape, spot] = held.back();
    held.pop_back();
    one.release(one.shape(shape), spot.node, spot.gpus);
    other.release(other.shape(shape), spot.node, spot.gpus);
  }

  void learn() {
    for (Pool* pool : {&one, &other}) {
      Random same(held.size());
      std::vector<std::pair<uint32_t, int64_t>> typical;
      for (int i = 0; i < 5; ++i) typical.emplace_back(pool->shape(some_shape(same)), 1 + i);
      pool->learn(typical, {-15'000, -1000, 0, 1000, 15'000});
      pool->price({{"T4"}, {{0, 200'000, 1'000'000}}, {{0, 500'000, 900'000, 1'000'000}}, {{1'000'000}}, 4000, 1});
    }
  }

  Random random;
  Pool one, other;
  std::map<std::string, uint32_t> numbers;
  std::vector<std::pair<Shape, Spot>> held;
};

}  // namespace

void check_placement(uint64_t seed, int rounds) {
  for (int policy = 0; policy <= static_cast<int>(Policy::kPriced); ++policy) {
    Twins twins(static_cast<Policy>(policy), seed);
    for (int i = 0; i < rounds; ++i) {
      switch (below(twins.random, 16)) {
        case 0: case 1: twins.join(); break;
        case 2: twins.leave(); break;
        case 3: case 4: case 5: case 6: case 7: twins.finish(); break;
        case 8: if (i % 64 == 0) twins.learn(); break;
        default: twins.place();
      }
    }
  }
}

}  // namespace leptonic
