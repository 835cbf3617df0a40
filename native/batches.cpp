#include "batches.h"

#include <nanobind/stl/string.h>

#include "clock.h"

namespace leptonic {

// The memory of a C-contiguous array, for as long as this lives.
class Memory {
 public:
  explicit Memory(nb::handle array) {
    if (PyObject_GetBuffer(array.ptr(), &view_, PyBUF_ND | PyBUF_C_CONTIGUOUS)) nb::raise_python_error();
  }
  ~Memory() { PyBuffer_Release(&view_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* data() const { return static_cast<char*>(view_.buf); }
  size_t size() const { return static_cast<size_t>(view_.len); }

 private:
  Py_buffer view_;
};

namespace {

constexpr size_t kLargeBytes = 64 << 10;  // worth giving the GIL away for

struct Numpy {
  nb::object empty, concatenate, ascontiguous;
};

Numpy& numpy() {
  static Numpy* found = [] {
    nb::module_ np = nb::module_::import_("numpy");
    return new Numpy{np.attr("empty"), np.attr("concatenate"), np.attr("ascontiguousarray")};
  }();
  return *found;
}

Shape shape_of(nb::handle array) {
  nb::tuple dims = nb::borrow<nb::tuple>(array.attr("shape"));
  Shape shape;
  for (nb::handle dim : dims) shape.dims[shape.rank++] = nb::cast<int64_t>(dim);
  return shape;
}

nb::tuple tuple_of(const Shape& shape) {
  nb::tuple dims = nb::steal<nb::tuple>(PyTuple_New(static_cast<Py_ssize_t>(shape.rank)));
  for (size_t i = 0; i < shape.rank; ++i)
    PyTuple_SET_ITEM(dims.ptr(), i, PyLong_FromLongLong(shape.dims[i]));
  return dims;
}

std::string bracketed(const Shape& shape) {
  std::string text;
  for (size_t i = 0; i < shape.rank; ++i) text += (i ? ", " : "") + std::to_string(shape.dims[i]);
  return "[" + text + "]";
}

// Where the signature leaves open nothing but the rows.
size_t bytes_of(const Lane& lane, const Tensor& tensor, int64_t rows) {
  size_t bytes = tensor.item_bytes * static_cast<size_t>(lane.batched ? rows : 1);
  for (size_t dim = lane.batched; dim < tensor.shape.size(); ++dim)
    bytes *= static_cast<size_t>(tensor.shape[dim]);
  return bytes;
}

// One waiter that raises keeps nobody else from hearing, and ends no runner.
template <class... Arguments>
void tell_waiter(nb::handle waiter, const char* what, Arguments&&... arguments) {
  try {
    waiter.attr(what)(std::forward<Arguments>(arguments)...);
  } catch (nb::python_error& error) {
    error.discard_as_unraisable(waiter);
  }
}

// A request from Python. Its last owner may be a thread that knows nothing of Python.
struct Caller : Guest {
  nb::object inputs, waiter;
  std::vector<nb::object> arrays;  // contiguous, in the signature's order
  std::vector<std::unique_ptr<Memory>> memory;

  void failed(int code, const std::string& text) override {
    nb::gil_scoped_acquire gil;
    tell_waiter(waiter, "failed", code, text);
  }

  ~Caller() override {
    nb::gil_scoped_acquire gil;
    memory.clear();
    arrays.clear();
    inputs.reset();
    waiter.reset();
  }
};

Caller* caller_of(const Request& request) { return static_cast<Caller*>(request.guest.get()); }

}  // namespace

int64_t PyBatcher::join(nb::dict arrays, int64_t rows, nb::object waiter, std::string id,
                        std::string traceparent, int64_t deadline_ns, int64_t timeout_us,
                        uint64_t priority) {
  auto request = std::make_unique<Request>();
  auto caller = std::make_unique<Caller>();
  caller->inputs = arrays;
  caller->waiter = std::move(waiter);
  request->guest = std::move(caller);
  request->id = std::move(id);
  request->parent = std::move(traceparent);
  request->rows = rows;
  request->deadline_ns = deadline_ns;
  request->timeout_us = timeout_us;
  request->priority = priority;
  hold(*request, arrays);
  request->arrived_ns = now_ns();
  int64_t ticket = core->join(request);
  if (ticket == kTooManyRows) throw nb::value_error("more rows than max_batch_size");
  if (ticket > 0) core->wake();
  return ticket;
}

void PyBatcher::hold(Request& request, nb::dict arrays) const {
  const Lane& lane = core->lane;
  if (lane.opaque && core->is_alike) return;
  std::vector<Shape> shapes;
  for (size_t i = 0; i < lane.inputs.size(); ++i) {
    nb::object array = arrays[inputs.names[i]];
    shapes.push_back(shape_of(array));
    if (lane.opaque) continue;
    Caller* caller = caller_of(request);
    caller->arrays.push_back(numpy().ascontiguous(array, inputs.dtypes[i]));
    caller->memory.push_back(std::make_unique<Memory>(caller->arrays.back()));
    request.raws[i] = {caller->memory.back()->data(), caller->memory.back()->size()};
    if (core->is_fixed && request.raws[i].size() != bytes_of(lane, lane.inputs[i], request.rows))
      throw nb::value_error(("input '" + lane.inputs[i].name + "' has shape " + bracketed(shapes.back())).c_str());
  }
  if (!core->is_alike) request.kind = kind_of(lane, shapes.data());
  if (!core->is_fixed) request.shapes = std::move(shapes);
}

std::shared_ptr<PyBatch> PyBatcher::take() {
  for (;;) {
    std::unique_ptr<Batch> batch;
    std::vector<Refused> late;
    bool open;
    {
      nb::gil_scoped_release released;
      open = core->take(batch, late);
      std::erase_if(late, [](Refused& one) { return !one.request->guest; });
    }
    for (Refused& one : late) one.request->guest->failed(one.code, one.text);
    if (batch) return std::make_shared<PyBatch>(std::move(batch), shared_from_this());
    if (!open) return nullptr;
  }
}

nb::object PyBatcher::counts() {
  int64_t waiting = 0;
  Tally tally = core->tally(waiting);
  nb::dict failures, batches;
  for (auto& [code, one] : tally.failures) failures[nb::cast(code)] = nb::make_tuple(one.requests, one.ns);
  for (auto& [rows, runs] : tally.batches)
    batches[nb::cast(rows)] =
        nb::make_tuple(runs.count, runs.spent.input_ns, runs.spent.infer_ns, runs.spent.output_ns);
  auto list_of = [](const Histogram& histogram) {
    nb::list list;
    for (int64_t one : histogram) list.append(one);
    return list;
  };
  return kinds->counts(tally.requests, tally.success_ns, failures, tally.queue_ns,
                       tally.spent.input_ns, tally.spent.infer_ns, tally.spent.output_ns, tally.rows,
                       batches, list_of(tally.latency), list_of(tally.queue), waiting, tally.last_ms);
}

nb::object PyBatch::note(size_t index) const {
  const Request& request = *core_->requests()[index];
  int64_t start = core_->start(index);
  // A header is whatever bytes its client sent.
  nb::object parent = nb::steal(PyUnicode_DecodeUTF8(
      request.parent.data(), static_cast<Py_ssize_t>(request.parent.size()), "replace"));
  return home_->kinds->note(request.id, parent, request.place, request.marks.logged, start,
                            start + request.rows, request.arrived_ns, core_->taken_ns());
}

nb::list PyBatch::notes() {
  nb::list found;
  for (size_t i = 0; i < core_->requests().size(); ++i)
    if (core_->requests()[i] && core_->requests()[i]->is_noted()) found.append(note(i));
  return found;
}

void PyBatch::must_be_open() const {
  if (core_->is_over()) throw nb::value_error("the batch has been answered, failed or split");
}

nb::dict PyBatch::inputs() {
  must_be_open();
  core_->begin_gathering();
  const Requests& requests = core_->requests();
  nb::dict found;
  if (requests.size() == 1 && requests.front()->guest) found = nb::borrow<nb::dict>(caller_of(*requests.front())->inputs);
  else found = home_->core->lane.opaque ? concatenated() : gathered();
  core_->end_gathering();
  return found;
}

nb::dict PyBatch::gathered() const {
  if (!core_->is_one_kind()) throw nb::value_error("requests of different shapes met in a batch");
  nb::dict found;
  for (size_t i = 0; i < home_->inputs.names.size(); ++i) {
    nb::object array = numpy().empty(tuple_of(core_->input_shape(i)), home_->inputs.dtypes[i]);
    Memory memory(array);
    if (memory.size() >= kLargeBytes) {
      nb::gil_scoped_release released;
      core_->gather(i, memory.data());
    } else {
      core_->gather(i, memory.data());
    }
    found[home_->inputs.names[i]] = array;
  }
  return found;
}

nb::dict PyBatch::concatenated() const {
  nb::dict found;
  for (auto [name, _] : nb::borrow<nb::dict>(caller_of(*core_->requests().front())->inputs)) {
    nb::list parts;
    for (auto& request : core_->requests()) parts.append(caller_of(*request)->inputs[name]);
    found[name] = numpy().concatenate(parts);
  }
  return found;
}

void PyBatch::check(size_t index, nb::handle array, const Shape& shape) const {
  const Lane& lane = home_->core->lane;
  const Tensor& tensor = lane.outputs[index];
  if (lane.batched && (shape.rank == 0 || shape.dims[0] != rows())) {
    throw nb::value_error(("output '" + tensor.name + "' has shape " + bracketed(shape) + " for " +
                           std::to_string(rows()) + " rows").c_str());
  }
  nb::object dtype = array.attr("dtype");
  const nb::object& wanted = home_->outputs.dtypes[index];
  if (dtype.is(wanted) || dtype.equal(wanted)) return;
  std::string kind = nb::cast<std::string>(dtype.attr("kind"));
  if (tensor.datatype == "BYTES" && (kind == "S" || kind == "U")) return;
  throw nb::value_error(("output '" + tensor.name + "' has " + nb::cast<std::string>(nb::str(dtype)) +
                         ", its signature " + nb::cast<std::string>(nb::str(wanted))).c_str());
}

OutputView PyBatch::view(size_t index, nb::handle array, std::vector<std::unique_ptr<Memory>>& memory) const {
  Shape shape = shape_of(array);
  check(index, array, shape);
  if (!core_->has_wire()) return {nullptr, shape};
  memory.push_back(std::make_unique<Memory>(numpy().ascontiguous(array)));
  return {memory.back()->data(), shape};
}

void PyBatch::answer(nb::dict outputs) {
  must_be_open();
  core_->end_inferring();
  std::vector<OutputView> views;
  std::vector<std::unique_ptr<Memory>> memory;
  size_t bytes = 0;
  for (size_t i = 0; i < home_->outputs.names.size(); ++i) {
    PyObject* array = PyDict_GetItemWithError(outputs.ptr(), home_->outputs.names[i].ptr());
    if (!array) throw nb::value_error(("output '" + home_->core->lane.outputs[i].name + "' is missing").c_str());
    views.push_back(view(i, array, memory));
    bytes += memory.empty() ? 0 : memory.back()->size();
  }
  if (bytes >= kLargeBytes) {
    nb::gil_scoped_release released;
    core_->answer(views);
  } else {
    core_->answer(views);
  }
  tell(outputs);
}

void PyBatch::tell(nb::dict outputs) const {
  for (size_t i = 0; i < core_->requests().size(); ++i) {
    if (!core_->requests()[i] || !core_->requests()[i]->guest) continue;
    const Request& request = *core_->requests()[i];
    int64_t start = core_->start(i);
    tell_waiter(caller_of(request)->waiter, "answered", outputs, start, start + request.rows, rows(),
                request.is_noted() ? note(i) : nb::none());
  }
}

void PyBatch::fail(int code, const std::string& text) {
  must_be_open();
  core_->fail(code, text);
  for (auto& request : core_->requests())
    if (request->guest) request->guest->failed(code, text);
}

std::vector<std::shared_ptr<PyBatch>> PyBatch::split() {
  must_be_open();
  std::vector<std::shared_ptr<PyBatch>> parts;
  for (auto& part : core_->split()) parts.push_back(std::make_shared<PyBatch>(std::move(part), home_));
  return parts;
}

}  // namespace leptonic
