// What the sanitizers watch: each check does a number of rounds from a seed and aborts at what is
// wrong.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

namespace leptonic {

using Random = std::mt19937_64;

// Also where asserts are compiled out.
#define CHECK(holds)                                                         \
  do {                                                                       \
    if (!(holds)) {                                                          \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #holds);       \
      std::abort();                                                          \
    }                                                                        \
  } while (false)

inline uint64_t below(Random& random, uint64_t bound) { return random() % bound; }

// Some bytes changed, cut out, doubled or made up.
std::string mutated(std::string bytes, Random& random);
// A ModelInferRequest that fits `any_lane`, or nearly.
std::string some_request(Random& random);

void check_messages(uint64_t seed, int rounds);
void check_connections(uint64_t seed, int rounds);
void check_memory(uint64_t seed, int rounds);
void check_threads(uint64_t seed, int rounds);
void check_placement(uint64_t seed, int rounds);
void check_operators(uint64_t seed, int rounds);
void check_products(uint64_t seed, int rounds);

}  // namespace leptonic
