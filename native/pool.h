// Memory for nghttp2: what it gives back it asks for again with the next request.
#pragma once

#include <nghttp2/nghttp2.h>

#include <array>
#include <cstddef>

namespace leptonic {

// Used by one thread at a time.
class Pool {
 public:
  Pool();
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  nghttp2_mem* memory() { return &memory_; }

 private:
  struct Callbacks;
  struct Block;
  struct Kept {
    Block* first = nullptr;
    size_t count = 0;
  };

  static constexpr size_t kStepBytes = 64;
  static constexpr size_t kSteps = 8;
  static constexpr size_t kKeptMax = 1024;  // of a size

  void* take(size_t bytes);
  void give(void* memory);
  void* resized(void* memory, size_t bytes);

  std::array<Kept, kSteps + 1> kept_;  // by size in steps; what is larger is not kept
  nghttp2_mem memory_;
};

}  // namespace leptonic
