// A batcher and its batches, as Python sees them: `front.Batcher` and `front.Batch`.
#pragma once

#include <nanobind/nanobind.h>

#include "batcher.h"

namespace leptonic {

namespace nb = nanobind;

struct Types {
  std::vector<nb::object> names;
  std::vector<nb::object> dtypes;
};

class Memory;
class PyBatcher;

// Python's names and types of a front, shared by what it makes.
struct Kinds {
  nb::object note, counts;
};

class PyBatch {
 public:
  PyBatch(std::unique_ptr<Batch> core, std::shared_ptr<PyBatcher> home)
      : core_(std::move(core)), home_(std::move(home)) {}
  ~PyBatch() {
    if (!core_->is_over()) fail(kInternal, "the batch ended without an answer");
  }

  int64_t rows() const { return core_->rows(); }
  size_t size() const { return core_->size(); }
  nb::list notes();
  nb::dict inputs();
  void answer(nb::dict outputs);
  void fail(int code, const std::string& text);
  std::vector<std::shared_ptr<PyBatch>> split();

 private:
  nb::object note(size_t index) const;
  nb::dict gathered() const;
  nb::dict concatenated() const;
  OutputView view(size_t index, nb::handle array, std::vector<std::unique_ptr<Memory>>& memory) const;
  void check(size_t index, nb::handle array, const Shape& shape) const;
  void tell(nb::dict outputs) const;
  void must_be_open() const;

  std::unique_ptr<Batch> core_;
  std::shared_ptr<PyBatcher> home_;
};

class PyBatcher : public std::enable_shared_from_this<PyBatcher> {
 public:
  PyBatcher(std::shared_ptr<Batcher> core, Types inputs, Types outputs, std::shared_ptr<Kinds> kinds)
      : core(std::move(core)), inputs(std::move(inputs)), outputs(std::move(outputs)), kinds(std::move(kinds)) {}

  const std::shared_ptr<Batcher> core;
  const Types inputs, outputs;
  const std::shared_ptr<Kinds> kinds;

  int64_t join(nb::dict arrays, int64_t rows, nb::object waiter, std::string id,
               std::string traceparent, int64_t deadline_ns, int64_t timeout_us, uint64_t priority);
  std::shared_ptr<PyBatch> take();
  void leave(int64_t ticket) { core->leave(ticket); }
  nb::object counts();

 private:
  void hold(Request& request, nb::dict arrays) const;
};

}  // namespace leptonic
