// Memory for nghttp2: what is handed out keeps what was written to it until it is given back,
// whatever else is taken, grows and goes meanwhile.
#include <algorithm>
#include <vector>

#include "../pool.h"
#include "checks.h"

namespace leptonic {

namespace {

constexpr size_t kHeldMax = 3000;  // more than are kept of a size

// One that has it may write to all of it.
struct Block {
  uint8_t* at;
  size_t bytes;
  uint8_t mark;

  void write(Random& random) {
    mark = static_cast<uint8_t>(random());
    for (size_t i = 0; i < bytes; ++i) at[i] = mark;
  }
  bool holds(size_t count) const {
    for (size_t i = 0; i < count; ++i)
      if (at[i] != mark) return false;
    return true;
  }
};

// Most of what nghttp2 asks for is small, and much of it of the same size.
size_t some_size(Random& random) {
  if (below(random, 3) == 0) return 1 + below(random, 20'000);
  return below(random, 3) ? 1 + below(random, 600) : 120;
}

Block taken(nghttp2_mem& memory, Random& random) {
  Block block{nullptr, some_size(random), 0};
  if (below(random, 2)) {
    block.at = static_cast<uint8_t*>(memory.malloc(block.bytes, memory.mem_user_data));
  } else {
    block.at = static_cast<uint8_t*>(memory.calloc(block.bytes, 1, memory.mem_user_data));
    CHECK(block.holds(block.bytes));
  }
  CHECK(block.at && reinterpret_cast<uintptr_t>(block.at) % alignof(std::max_align_t) == 0);
  block.write(random);
  return block;
}

void resize(nghttp2_mem& memory, Block& block, Random& random) {
  size_t bytes = some_size(random);
  block.at = static_cast<uint8_t*>(memory.realloc(block.at, bytes, memory.mem_user_data));
  CHECK(block.at && block.holds(std::min(block.bytes, bytes)));
  block.bytes = bytes;
  block.write(random);
}

void give(nghttp2_mem& memory, std::vector<Block>& held, size_t index) {
  CHECK(held[index].holds(held[index].bytes));
  memory.free(held[index].at, memory.mem_user_data);
  held[index] = held.back();
  held.pop_back();
}

}  // namespace

void check_memory(uint64_t seed, int rounds) {
  Random random(seed);
  Pool pool;
  nghttp2_mem& memory = *pool.memory();
  std::vector<Block> held;
  size_t most = 0;
  bool fills = true;
  for (int round = 0; round < rounds; ++round) {
    if (held.empty() || held.size() == kHeldMax) fills = held.empty();
    if (held.empty() || below(random, 4) < (fills ? 2u : 1u)) held.push_back(taken(memory, random));
    else if (below(random, 4) == 0) resize(memory, held[below(random, held.size())], random);
    else if (!fills || below(random, 2)) give(memory, held, below(random, held.size()));
    most = std::max(most, held.size());
  }
  while (!held.empty()) give(memory, held, held.size() - 1);
  memory.free(nullptr, memory.mem_user_data);
  std::printf("memory: at most %zu blocks held in %d rounds\n", most, rounds);
}

}  // namespace leptonic
