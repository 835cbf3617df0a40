// What is free on the nodes, and where the next worker goes: services/scheduler/pool.py, faster.
//
// Open nodes of one kind with as much free share a state. Scores are of states: each is computed
// once for a shape, however many nodes are in that state or come into it later. A row for each
// shape keeps the scores and, in a tournament tree, the best: of equal ones that of the first node.
// A state that comes, goes or has another first node is one line in a log; a row reads the lines
// since it was last asked. What a row says is a function of the nodes' states, so rows can be
// dropped at any time.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "placement_scores.h"

namespace leptonic::placement {

// A mistake of the scheduler's: more taken than there is, an unknown node.
struct Broken : std::logic_error {
  using std::logic_error::logic_error;
};

struct Spot {
  uint32_t node;
  std::vector<int> gpus;
};

constexpr uint32_t kNowhere = UINT32_MAX;  // the state of a node that is not open
constexpr uint64_t kNobody = UINT64_MAX;   // comes first in a state without nodes

struct Node : State {
  uint64_t order = 0;  // as the names
  uint64_t lot = 0;
  uint32_t state = kNowhere;
  bool is_there = false, is_open = false;
};

class Pool {
 public:
  Pool(Policy policy, uint64_t seed);
  Pool(const Pool&) = delete;

  // A node's number; those of nodes that left are used again.
  uint32_t join(const std::string& name, const Kind& kind);
  void leave(const std::string& name);
  void change(uint32_t node, const Kind& kind);
  void open(uint32_t node, bool is_open);
  uint32_t shape(const Shape& shape);
  size_t shapes() const { return shapes_.size(); }
  // Their numbers mean nothing any more.
  void forget_shapes();
  // Shapes by number, with their weights; the least gradients of scores 1, 2, ...
  void learn(const std::vector<std::pair<uint32_t, int64_t>>& typical, std::vector<int64_t> steps);
  void price(Prices prices);
  std::optional<Spot> find(uint32_t shape);
  std::optional<std::vector<Spot>> find_gang(uint32_t shape, int64_t workers, bool one_node);
  bool fits_empty(uint32_t shape, int64_t workers, bool one_node) const;
  void take(uint32_t shape, uint32_t node, const std::vector<int>& gpus) { move(shape, node, gpus, 1); }
  void release(uint32_t shape, uint32_t node, const std::vector<int>& gpus) { move(shape, node, gpus, -1); }
  const Node& node(uint32_t node) const;

 private:
  struct Earlier {
    const std::vector<Node>* nodes;
    bool operator()(uint32_t one, uint32_t other) const { return (*nodes)[one].order < (*nodes)[other].order; }
  };
  // Nodes in one state.
  struct Alike : State {
    explicit Alike(const std::vector<Node>* all) : nodes(Earlier{all}) {}
    std::set<uint32_t, Earlier> nodes;
    std::string key;
  };
  // What rows read of a state, beside it.
  struct Mark {
    uint64_t first = kNobody;  // the order of its first node
    uint64_t born = 0;
    size_t changed = 0;        // its last line in the log
  };
  struct Row {
    uint32_t shape;
    std::vector<int64_t> score;  // by state
    std::vector<uint32_t> best;  // a heap: of each pair the better state
    size_t read = SIZE_MAX;      // of the log; SIZE_MAX for a row whose tree is to be made anew
    uint64_t born = 0;           // states up to here have their score
    uint64_t asked = 0;
  };
  struct Room {
    int64_t workers, score;
    uint32_t node;
  };

  void move(uint32_t shape, uint32_t node, const std::vector<int>& gpus, int sign);
  void settle(uint32_t node);
  void enter(uint32_t node);
  void retire(uint32_t node);
  const std::string& key(const Node& node);
  void grow();
  void note(uint32_t state);
  void shorten_log();
  void spread_orders();
  Row& row(uint32_t shape);
  void drop_oldest_row();
  void score(Row& row, uint32_t state) const;
  void make(Row& row) const;
  void catch_up(Row& row) const;
  bool is_better(const Row& row, uint32_t left, uint32_t right) const;
  void replay(Row& row, uint32_t state) const;
  int64_t evaluate(const Shape& shape, const State& state) const;
  bool fits(const Row& row, const State& state) const;
  std::vector<int> choose(const State& node, const Shape& shape) const;
  int64_t value(const State& state) const;
  void value_all();
  std::vector<int> choose_part(const State& node, const Shape& shape) const;
  bool is_drawn(const Shape& shape) const { return policy_ == Policy::kRandom && !shape.spread; }
  int64_t lot(const Node& node) const;
  std::optional<uint32_t> best(uint32_t shape, int64_t workers);
  std::optional<uint32_t> best_of(const std::vector<Room>& rooms) const;
  std::optional<std::vector<Spot>> find_together(uint32_t shape, int64_t workers);
  std::optional<std::vector<Spot>> find_spread(uint32_t shape, int64_t workers);
  void fill(uint32_t node, const Shape& shape, int64_t workers, std::vector<Spot>& spots) const;
  std::vector<Room> rooms(uint32_t shape, int64_t least);

  Policy policy_;
  uint64_t lots_;
  Known known_;
  std::vector<Node> nodes_;
  std::vector<int64_t> opened_;  // open nodes by kind
  std::vector<uint32_t> gone_;
  std::map<std::string, uint32_t> names_;
  std::vector<Alike> states_;
  std::vector<Mark> marks_;
  std::vector<uint32_t> unused_;  // states without nodes
  std::unordered_map<std::string, uint32_t> state_ids_;
  std::string key_;
  uint64_t born_ = 0;
  std::vector<Shape> shapes_;
  std::map<Shape, uint32_t> shape_ids_;
  std::vector<std::vector<int8_t>> admitted_;  // by shape and kind: -1 unknown
  std::vector<uint32_t> log_;
  std::unordered_map<uint32_t, std::unique_ptr<Row>> rows_;
  uint64_t asked_ = 0;
};

}  // namespace leptonic::placement
