// leptonic_native: what Python sees. services/inference/native.py is its other half.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <system_error>

#include "clock.h"
#include "front.h"

namespace nb = nanobind;

namespace leptonic {

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

// A request from Python. Its last owner may be a thread that knows nothing of Python.
struct Caller : Guest {
  nb::object inputs, waiter;
  std::vector<nb::object> arrays;  // contiguous, in the signature's order
  std::vector<std::unique_ptr<Memory>> memory;

  ~Caller() override {
    nb::gil_scoped_acquire gil;
    memory.clear();
    arrays.clear();
    inputs.reset();
    waiter.reset();
  }
};

Caller* caller_of(const Request& request) { return static_cast<Caller*>(request.guest.get()); }

// name, datatype, shape, numpy's dtype
using TensorArgument = std::tuple<std::string, std::string, std::vector<int64_t>, nb::object>;

struct Types {
  std::vector<nb::object> names;
  std::vector<nb::object> dtypes;
};

std::vector<Tensor> tensors_of(const std::vector<TensorArgument>& arguments, Types& types) {
  std::vector<Tensor> tensors;
  for (auto& [name, datatype, shape, dtype] : arguments) {
    tensors.push_back({name, datatype, shape, nb::cast<size_t>(dtype.attr("itemsize"))});
    types.names.push_back(nb::cast(name));
    types.dtypes.push_back(dtype);
  }
  return tensors;
}

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
    if (core_->is_over()) return;
    try {
      fail(kInternal, "the batch ended without an answer");
    } catch (nb::python_error& error) {
      error.discard_as_unraisable("a waiter of a batch that was forgotten");
    }
  }

  int64_t rows() const { return core_->rows(); }
  nb::list notes();
  nb::dict inputs();
  void answer(nb::dict outputs);
  void fail(int code, const std::string& text);
  std::vector<std::shared_ptr<PyBatch>> split();

 private:
  bool is_noted(size_t index) const;
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
    for (Refused& one : late)
      caller_of(*one.request)->waiter.attr("failed")(static_cast<int>(one.code), one.text);
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

bool PyBatch::is_noted(size_t index) const {
  const Request& request = *core_->requests()[index];
  return request.marks.traced || request.marks.logged;
}

nb::object PyBatch::note(size_t index) const {
  const Request& request = *core_->requests()[index];
  int64_t start = core_->start(index);
  return home_->kinds->note(request.id, request.parent, request.place, request.marks.logged, start,
                            start + request.rows, request.arrived_ns, core_->taken_ns());
}

nb::list PyBatch::notes() {
  nb::list found;
  for (size_t i = 0; i < core_->requests().size(); ++i)
    if (core_->requests()[i] && is_noted(i)) found.append(note(i));
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
    const Request& request = *core_->requests()[i];
    if (!request.guest) continue;
    int64_t start = core_->start(i);
    caller_of(request)->waiter.attr("answered")(outputs, start, start + request.rows, rows(),
                                                core_->taken_ns() - request.arrived_ns,
                                                is_noted(i) ? note(i) : nb::none());
  }
}

void PyBatch::fail(int code, const std::string& text) {
  must_be_open();
  core_->fail(code, text);
  for (auto& request : core_->requests())
    if (request->guest) caller_of(*request)->waiter.attr("failed")(code, text);
}

std::vector<std::shared_ptr<PyBatch>> PyBatch::split() {
  must_be_open();
  std::vector<std::shared_ptr<PyBatch>> parts;
  for (auto& part : core_->split()) parts.push_back(std::make_shared<PyBatch>(std::move(part), home_));
  return parts;
}

// header names and values, NUL behind each
nb::list metadata_of(const std::string& headers) {
  nb::list pairs;
  auto text = [](const char* at) { return nb::steal(PyUnicode_DecodeLatin1(at, static_cast<Py_ssize_t>(strlen(at)), nullptr)); };
  for (const char *at = headers.data(), *end = at + headers.size(); at < end;) {
    const char* value = at + strlen(at) + 1;
    pairs.append(nb::make_tuple(text(at), text(value)));
    at = value + strlen(value) + 1;
  }
  return pairs;
}

class PyFront {
 public:
  PyFront(std::vector<std::string> tokens, nb::object note, nb::object counts)
      : core_(std::make_unique<Front>(std::move(tokens))),
        kinds_(std::make_shared<Kinds>(Kinds{std::move(note), std::move(counts)})) {}
  ~PyFront() {
    nb::gil_scoped_release released;
    core_.reset();
  }

  int listen(const std::string& host, int port, bool shared) {
    try {
      nb::gil_scoped_release released;
      return core_->listen(host, port, shared);
    } catch (const std::system_error& error) {
      PyErr_SetObject(PyExc_OSError, nb::make_tuple(error.code().value(), error.what()).ptr());
      throw nb::python_error();
    }
  }

  std::shared_ptr<PyBatcher> batcher(std::string model, std::string version,
                                     std::vector<TensorArgument> inputs, std::vector<TensorArgument> outputs,
                                     bool batched, bool opaque) {
    Types in, out;
    Lane lane{std::move(model), std::move(version), tensors_of(inputs, in), tensors_of(outputs, out), batched, opaque};
    lane.opaque |= inputs.size() > kTensorsMax || outputs.size() > kTensorsMax;
    return std::make_shared<PyBatcher>(core_->batcher(std::move(lane)), std::move(in), std::move(out), kinds_);
  }

  void route(const std::string& model, std::vector<std::pair<std::string, int64_t>> shares,
             const std::map<std::string, std::shared_ptr<PyBatcher>>& batchers) {
    std::map<std::string, std::shared_ptr<Batcher>, std::less<>> cores;
    for (auto& [version, one] : batchers) cores[version] = one->core;
    for (auto& [version, _] : shares)
      if (!cores.contains(version)) throw nb::key_error(version.c_str());
    core_->route(model, std::move(shares), std::move(cores));
  }

  nb::list events() {
    nb::list found;
    for (Event& event : core_->events()) {
      nb::object bytes = event.kind == Event::kOpened
                             ? nb::object(nb::str(event.bytes.data(), event.bytes.size()))
                             : nb::object(nb::bytes(event.bytes.data(), event.bytes.size()));
      found.append(nb::make_tuple(static_cast<int>(event.kind), event.call.connection, event.call.stream,
                                  bytes, metadata_of(event.headers), event.peer, event.number));
    }
    return found;
  }

  void write(uint64_t connection, int32_t stream, nb::bytes message) {
    std::string framed(kPrefixBytes, '\0');
    write_prefix(framed.data(), message.size());
    framed.append(message.c_str(), message.size());
    core_->post({Mail::kWrite, {connection, stream}, 0, std::move(framed), {}});
  }

  void finish(uint64_t connection, int32_t stream, int code, std::string text, Pairs trailing) {
    core_->post({Mail::kStatus, {connection, stream}, code, std::move(text), std::move(trailing)});
  }

  void taken(uint64_t connection, int32_t stream, int bytes) {
    core_->post({Mail::kTaken, {connection, stream}, bytes + static_cast<int>(kPrefixBytes), {}, {}});
  }

  int fileno() const { return core_->events_descriptor(); }
  void say_goodbye() { core_->say_goodbye(); }
  void close(double patience_s) { core_->close(patience_s); }
  std::map<std::string, double> stages() { return core_->stages(); }

 private:
  std::unique_ptr<Front> core_;
  std::shared_ptr<Kinds> kinds_;
};

// By their names in `Limits`.
Limits limits_of(const nb::kwargs& named) {
  auto number = [&](const char* name) { return nb::cast<int64_t>(named[name]); };
  Limits limits;
  limits.max_batch_size = number("max_batch_size");
  limits.preferred_batch_size = nb::cast<std::vector<int64_t>>(named["preferred_batch_size"]);
  limits.max_queue_delay_ns = number("max_queue_delay_ns");
  limits.max_queue_size = number("max_queue_size");
  limits.priority_levels = static_cast<uint64_t>(number("priority_levels"));
  limits.default_priority_level = static_cast<uint64_t>(number("default_priority_level"));
  limits.default_timeout_us = number("default_timeout_us");
  limits.allow_timeout_override = nb::cast<bool>(named["allow_timeout_override"]);
  limits.delay_late = nb::cast<bool>(named["delay_late"]);
  return limits;
}

nb::tuple take_turn(Line& line, int64_t now_ns) {
  Turn turn;
  line.take(now_ns, turn);
  nb::list batch, late;
  for (auto& place : turn.batch) batch.append(place.key);
  for (auto& one : turn.late) late.append(nb::make_tuple(one.place.key, one.by_client));
  return nb::make_tuple(batch, late, turn.wait_ns);
}

void configure(PyBatcher& batcher, double traces_per_s, int64_t log_percent, double log_per_s,
               const nb::kwargs& limits) {
  batcher.core->configure(limits_of(limits), {traces_per_s, log_percent, log_per_s});
}

}  // namespace

NB_MODULE(leptonic_native, module) {
  using namespace nb::literals;
  nb::set_leak_warnings(false);  // the interpreter may end while a runner holds a batch

  nb::class_<Line>(module, "Line")
      .def("__init__", [](Line* self, const nb::kwargs& limits) { new (self) Line(limits_of(limits)); })
      .def("configure", [](Line& line, const nb::kwargs& limits) { line.configure(limits_of(limits)); })
      .def("join", [](Line& line, uint64_t key, int64_t rows, uint64_t kind, int64_t now_ns, int64_t deadline_ns,
                      int64_t timeout_us, uint64_t priority) {
        return line.join(key, rows, kind, now_ns, deadline_ns, timeout_us, priority);
      }, "key"_a, "rows"_a, "kind"_a, "now_ns"_a, "deadline_ns"_a = 0, "timeout_us"_a = 0, "priority"_a = 0)
      .def("leave", [](Line& line, uint64_t key) { line.leave(key); })
      .def("take", &take_turn)
      .def_prop_ro("waiting", &Line::waiting);

  nb::class_<PyBatch>(module, "Batch")
      .def_prop_ro("rows", &PyBatch::rows)
      .def_prop_ro("notes", &PyBatch::notes)
      .def("inputs", &PyBatch::inputs)
      .def("answer", &PyBatch::answer)
      .def("fail", &PyBatch::fail)
      .def("split", &PyBatch::split);

  nb::class_<PyBatcher>(module, "Batcher")
      .def("configure", &configure)
      .def("join", &PyBatcher::join, "inputs"_a, "rows"_a, "waiter"_a, "id"_a = "", "traceparent"_a = "",
           "deadline_ns"_a = 0, "timeout_us"_a = 0, "priority"_a = 0)
      .def("leave", &PyBatcher::leave)
      .def("take", &PyBatcher::take)
      .def("close", [](PyBatcher& batcher) { batcher.core->close(); })
      .def("counts", &PyBatcher::counts);

  nb::class_<PyFront> front(module, "Front");
  front.attr("OPENED") = static_cast<int>(Event::kOpened);
  front.attr("MESSAGE") = static_cast<int>(Event::kMessage);
  front.attr("ENDED") = static_cast<int>(Event::kEnded);
  front.attr("GONE") = static_cast<int>(Event::kGone);
  front.attr("SENT") = static_cast<int>(Event::kSent);
  front.attr("CLOSED") = static_cast<int>(Event::kClosed);
  front.def(nb::init<std::vector<std::string>, nb::object, nb::object>())
      .def("listen", &PyFront::listen)
      .def("batcher", &PyFront::batcher)
      .def("route", &PyFront::route)
      .def("events", &PyFront::events)
      .def("write", &PyFront::write)
      .def("finish", &PyFront::finish)
      .def("taken", &PyFront::taken)
      .def("fileno", &PyFront::fileno)
      .def("say_goodbye", &PyFront::say_goodbye)
      .def("close", &PyFront::close)
      .def("stages", &PyFront::stages);
}

}  // namespace leptonic
