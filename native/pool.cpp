#include "pool.h"

#include <cstdlib>
#include <cstring>
#include <utility>

namespace leptonic {

namespace {

// Not for the sanitizer: it is to see what is used after it was given back, and each byte past an end.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kKeeps = false;
#else
constexpr bool kKeeps = true;
#endif

}  // namespace

// What is handed out begins behind it.
struct alignas(std::max_align_t) Pool::Block {
  size_t bytes;  // that follow
  Block* next;
};

struct Pool::Callbacks {
  static Pool& self(void* user) { return *static_cast<Pool*>(user); }

  static void* take(size_t bytes, void* user) { return self(user).take(bytes); }
  static void give(void* memory, void* user) { self(user).give(memory); }
  static void* resized(void* memory, size_t bytes, void* user) { return self(user).resized(memory, bytes); }

  // nghttp2 asks for counts and sizes of its own, which do not overflow.
  static void* cleared(size_t count, size_t bytes, void* user) {
    void* memory = self(user).take(count * bytes);
    return memory ? std::memset(memory, 0, count * bytes) : nullptr;
  }
};

Pool::Pool() : memory_{this, Callbacks::take, Callbacks::give, Callbacks::cleared, Callbacks::resized} {}

Pool::~Pool() {
  for (Kept& kept : kept_)
    while (Block* block = kept.first) {
      kept.first = block->next;
      std::free(block);
    }
}

void* Pool::take(size_t bytes) {
  size_t steps = (bytes + kStepBytes - 1) / kStepBytes;
  size_t room = kKeeps ? steps * kStepBytes : bytes;
  if (steps <= kSteps && kept_[steps].first) {
    Kept& kept = kept_[steps];
    --kept.count;
    return std::exchange(kept.first, kept.first->next) + 1;
  }
  auto* block = static_cast<Block*>(std::malloc(sizeof(Block) + room));
  if (!block) return nullptr;
  block->bytes = room;
  return block + 1;
}

void Pool::give(void* memory) {
  if (!memory) return;
  Block* block = static_cast<Block*>(memory) - 1;
  size_t steps = block->bytes / kStepBytes;
  if (!kKeeps || steps > kSteps || kept_[steps].count == kKeptMax) return std::free(block);
  Kept& kept = kept_[steps];
  block->next = std::exchange(kept.first, block);
  ++kept.count;
}

void* Pool::resized(void* memory, size_t bytes) {
  size_t known = memory ? (static_cast<Block*>(memory) - 1)->bytes : 0;
  if (memory && bytes <= known) return memory;
  void* larger = take(bytes);
  if (larger && memory) std::memcpy(larger, memory, known);
  if (larger) give(memory);
  return larger;
}

}  // namespace leptonic
