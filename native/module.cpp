// leptonic_native: what Python sees. services/inference/native.py is its other half.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <system_error>

#include "batches.h"
#include "front.h"

namespace leptonic {

namespace {

// name, datatype, shape, numpy's dtype
using TensorArgument = std::tuple<std::string, std::string, std::vector<int64_t>, nb::object>;

std::vector<Tensor> tensors_of(const std::vector<TensorArgument>& arguments, Types& types) {
  std::vector<Tensor> tensors;
  for (auto& [name, datatype, shape, dtype] : arguments) {
    tensors.push_back({name, datatype, shape, nb::cast<size_t>(dtype.attr("itemsize"))});
    types.names.push_back(nb::cast(name));
    types.dtypes.push_back(dtype);
  }
  return tensors;
}

// What a client's headers say may be any bytes.
nb::object text(std::string_view bytes) {
  return nb::steal(PyUnicode_DecodeLatin1(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), nullptr));
}

// header names and values, NUL behind each
nb::list metadata_of(const std::string& headers) {
  nb::list pairs;
  for (const char *at = headers.data(), *end = at + headers.size(); at < end;) {
    const char* value = at + strlen(at) + 1;
    pairs.append(nb::make_tuple(text(at), text(value)));
    at = value + strlen(value) + 1;
  }
  return pairs;
}

class PyFront {
 public:
  PyFront(std::vector<std::string> tokens, nb::object note, nb::object counts, size_t gathered_max)
      : core_(std::make_unique<Front>(std::move(tokens), gathered_max)),
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
                             ? text(event.bytes)
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
    core_->post({Mail::kTaken, {connection, stream}, bytes, {}, {}});
  }

  int fileno() const { return core_->events_descriptor(); }
  void say_goodbye() { core_->say_goodbye(); }
  void close(double patience_s) { core_->close(patience_s); }
  size_t gathered() const { return core_->gathered; }
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

nb::tuple take_turn(Line& line, int64_t now_ns, int runners) {
  Turn turn;
  line.take(now_ns, turn, runners);
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

  // For the tests: it is compared with line.py, step by step.
  nb::class_<Line>(module, "Line")
      .def("__init__", [](Line* self, const nb::kwargs& limits) { new (self) Line(limits_of(limits)); })
      .def("configure", [](Line& line, const nb::kwargs& limits) { line.configure(limits_of(limits)); })
      .def("join", [](Line& line, uint64_t key, int64_t rows, uint64_t kind, int64_t now_ns, int64_t deadline_ns,
                      int64_t timeout_us, uint64_t priority) {
        return line.join(key, rows, kind, now_ns, deadline_ns, timeout_us, priority);
      }, "key"_a, "rows"_a, "kind"_a, "now_ns"_a, "deadline_ns"_a = 0, "timeout_us"_a = 0, "priority"_a = 0)
      .def("answered", &Line::answered, "requests"_a, "took_ns"_a, "now_ns"_a)
      .def("over", &Line::over, "requests"_a)
      .def("parted", &Line::parted, "parts"_a)
      .def("leave", [](Line& line, uint64_t key) { line.leave(key); })
      .def("take", &take_turn, "now_ns"_a, "runners"_a = 1)
      .def_prop_ro("waiting", &Line::waiting);

  nb::class_<PyBatch>(module, "Batch")
      .def_prop_ro("rows", &PyBatch::rows)
      .def_prop_ro("size", &PyBatch::size)
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
  front.def(nb::init<std::vector<std::string>, nb::object, nb::object, size_t>())
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
      .def("gathered", &PyFront::gathered)
      .def("stages", &PyFront::stages);
}

}  // namespace leptonic
