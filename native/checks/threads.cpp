// Threads: whoever joins while others take, leave, configure and close is answered or refused, once,
// and somebody always looks after what the answers go to.
#include <poll.h>

#include <atomic>
#include <thread>

#include "../batcher.h"
#include "../clock.h"
#include "checks.h"

namespace leptonic {

namespace {

constexpr int64_t kRowsMax = 8;
constexpr size_t kBatchers = 2;  // whose runners take the helm from each other

struct Scene {
  std::shared_ptr<Mailbox> mailbox = std::make_shared<Mailbox>();
  std::shared_ptr<Helm> helm = std::make_shared<Helm>([this](const Batcher* mine, bool may_sleep) { return round(mine, may_sleep); });
  std::vector<std::shared_ptr<Batcher>> batchers;
  std::atomic<int> refused{0}, left{0};
  std::atomic<bool> over{false};
  std::vector<Mail> mails;  // and what follows: of who is at the helm
  int told = 0, rounds = 0, of_runners = 0;

  Scene();
  bool round(const Batcher* mine, bool may_sleep);
};

Scene::Scene() {
  Lane lane{"m", "1", {{"x", "INT64", {-1}, 8}}, {{"y", "INT64", {-1}, 8}}, true, false};
  for (size_t i = 0; i < kBatchers; ++i) batchers.push_back(std::make_shared<Batcher>(lane, mailbox, helm));
}

// As the front's: asleep until the bell rings, so that one that is forgotten stops everything.
bool Scene::round(const Batcher* mine, bool may_sleep) {
  mailbox->collect(mails);
  for (Mail& mail : mails) {
    told += mail.kind != Mail::kWake;
    may_sleep &= mail.kind != Mail::kWake;
  }
  mails.clear();
  pollfd bell{mailbox->descriptor(), POLLIN, 0};
  mailbox->awake(poll(&bell, 1, may_sleep && mailbox->may_sleep() ? -1 : 0) > 0);
  helm->saw(mine);
  of_runners += mine != nullptr;
  return ++rounds % 64 != 0 && (mine == nullptr || !over);
}

std::unique_ptr<Request> some_of(int32_t number, Random& random) {
  auto request = std::make_unique<Request>();
  request->call = {1, number};
  request->rows = static_cast<int64_t>(1 + below(random, 3));
  request->body.assign(static_cast<size_t>(request->rows) * 8, static_cast<char>(number));
  request->raws[0] = request->body;
  request->arrived_ns = now_ns();
  if (below(random, 8) == 0) request->deadline_ns = now_ns() + static_cast<int64_t>(below(random, 200'000));
  request->priority = below(random, 4);
  return request;
}

void join(Scene& scene, int32_t first, int count, uint64_t seed) {
  Random random(seed);
  for (int32_t number = first; number < first + count; ++number) {
    auto request = some_of(number, random);
    Batcher& batcher = *scene.batchers[below(random, kBatchers)];
    int64_t ticket = batcher.join(request);
    if (ticket <= 0) {
      CHECK(ticket == kFull);
      ++scene.refused;
    } else if (below(random, 10) == 0 && batcher.leave(ticket)) {
      ++scene.left;
    }
    batcher.wake();
  }
}

void answer(Batch& batch) {
  auto bytes = static_cast<size_t>(batch.rows()) * 8;
  std::vector<char> rows(bytes);
  batch.begin_gathering();
  batch.gather(0, rows.data());
  batch.end_gathering();
  batch.end_inferring();
  batch.answer({{rows.data(), batch.input_shape(0)}});
}

void work(Batcher& batcher, uint64_t seed) {
  Random random(seed);
  for (;;) {
    std::unique_ptr<Batch> batch;
    std::vector<Refused> late;
    if (!batcher.take(batch, late)) return;
    if (!batch) continue;
    CHECK(batch->rows() <= kRowsMax);
    switch (below(random, 4)) {
      case 0: batch->fail(kInternal, "broken"); break;
      case 1:
        for (auto& part : batch->split()) answer(*part);
        break;
      default: answer(*batch);
    }
  }
}

void configure(Scene& scene, uint64_t seed, const std::atomic<bool>& over) {
  Random random(seed);
  while (!over) {
    Limits limits;
    limits.max_batch_size = kRowsMax - static_cast<int64_t>(below(random, 6));
    if (below(random, 2)) limits.max_queue_delay_ns = static_cast<int64_t>(below(random, 50'000));
    limits.priority_levels = below(random, 4);
    limits.delay_late = below(random, 2);
    limits.default_timeout_us = static_cast<int64_t>(below(random, 3) * 100);
    Batcher& batcher = *scene.batchers[below(random, kBatchers)];
    batcher.configure(limits, {double(below(random, 3)), 50, 10});
    int64_t waiting = 0;
    batcher.tally(waiting);
    std::this_thread::yield();
  }
}

// As the front's thread does.
void stand_by(Scene& scene) {
  for (scene.helm->wait(); !scene.over; scene.helm->wait()) {
    while (!scene.over && scene.helm->round(nullptr, true) && !scene.helm->is_wanted()) {}
    scene.helm->leave();
  }
  scene.helm->round(nullptr, false);
}

}  // namespace

void check_threads(uint64_t seed, int rounds) {
  constexpr int kJoiners = 3, kRunners = 2;
  Scene scene;
  Limits limits;
  limits.max_batch_size = kRowsMax;
  for (auto& batcher : scene.batchers) batcher->configure(limits, {});
  std::atomic<bool> joined{false};
  scene.helm->lend(true);
  std::vector<std::thread> runners, joiners;
  for (uint64_t i = 0; i < kRunners * kBatchers; ++i)
    runners.emplace_back([&, i] { work(*scene.batchers[i % kBatchers], seed + i); });
  for (int i = 0; i < kJoiners; ++i)
    joiners.emplace_back([&, i] { join(scene, 1 + i * rounds, rounds, seed + 100 + static_cast<uint64_t>(i)); });
  std::thread configurer([&] { configure(scene, seed, joined); });
  std::thread front([&] { stand_by(scene); });
  for (auto& thread : joiners) thread.join();
  joined = true;
  configurer.join();
  for (auto& batcher : scene.batchers) batcher->close();
  for (auto& thread : runners) thread.join();
  scene.over = true;
  scene.helm->lend(false);
  scene.mailbox->post(Mail{Mail::kWake, {}, 0, {}, {}});
  front.join();
  CHECK(scene.told + scene.refused + scene.left == kJoiners * rounds);
  std::printf("threads: %d told, %d refused, %d left; %d of %d rounds by runners\n", scene.told,
              scene.refused.load(), scene.left.load(), scene.of_runners, scene.rounds);
}

}  // namespace leptonic
