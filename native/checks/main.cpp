// checks SEED ROUNDS: everything, the threads with a tenth of the rounds.
#include "checks.h"

int main(int count, char** words) {
  CHECK(count == 3);
  uint64_t seed = std::strtoull(words[1], nullptr, 10);
  int rounds = std::atoi(words[2]);
  leptonic::check_messages(seed, rounds);
  leptonic::check_connections(seed, rounds / 10);
  leptonic::check_memory(seed, rounds / 10);
  leptonic::check_threads(seed, rounds / 10);
  leptonic::check_placement(seed, rounds / 20);
  leptonic::check_operators(seed, rounds / 400);
  leptonic::check_products(seed, rounds / 400);
}
