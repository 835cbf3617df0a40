// leptonic_placement: what Python sees. services/scheduler/native_pool.py is its other half.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "placement.h"

namespace nb = nanobind;

namespace leptonic::placement {

namespace {

using Tables = std::vector<std::vector<int64_t>>;

nb::tuple tuple_of(const auto& numbers) {
  nb::object tuple = nb::steal(PyTuple_New(static_cast<Py_ssize_t>(numbers.size())));
  Py_ssize_t at = 0;
  for (auto number : numbers) PyTuple_SET_ITEM(tuple.ptr(), at++, PyLong_FromLong(number));
  return nb::cast<nb::tuple>(tuple);
}

nb::object spots_of(const std::optional<std::vector<Spot>>& spots) {
  if (!spots) return nb::none();
  nb::list found;
  for (auto& spot : *spots) found.append(nb::make_tuple(spot.node, tuple_of(spot.gpus)));
  return found;
}

uint32_t join(Pool& pool, const std::string& name, int64_t cpu_milli, int64_t memory_mib, int gpus,
              std::string model, std::vector<std::string> kinds, std::vector<Label> labels) {
  return pool.join(name, {cpu_milli, memory_mib, gpus, std::move(model), std::move(kinds), std::move(labels)});
}

void change(Pool& pool, uint32_t node, int64_t cpu_milli, int64_t memory_mib, int gpus, std::string model,
            std::vector<std::string> kinds, std::vector<Label> labels) {
  pool.change(node, {cpu_milli, memory_mib, gpus, std::move(model), std::move(kinds), std::move(labels)});
}

uint32_t shape(Pool& pool, int64_t cpu_milli, int64_t memory_mib, int gpus, int gpu_milli,
               std::vector<std::string> models, std::string kind, std::vector<Label> labels, bool spread) {
  return pool.shape({cpu_milli, memory_mib, gpus, gpu_milli, std::move(models), std::move(kind), std::move(labels), spread});
}

nb::object find(Pool& pool, uint32_t shape) {
  auto spot = pool.find(shape);
  if (!spot) return nb::none();
  return nb::make_tuple(spot->node, tuple_of(spot->gpus));
}

}  // namespace

NB_MODULE(leptonic_placement, module) {
  nb::exception<Broken>(module, "Broken", PyExc_AssertionError);
  nb::class_<Pool>(module, "Pool")
      .def("__init__", [](Pool* self, int policy, uint64_t seed) { new (self) Pool(Policy(policy), seed); })
      .def("join", &join)
      .def("leave", &Pool::leave)
      .def("change", &change)
      .def("open", &Pool::open)
      .def("shape", &shape)
      .def("shapes", &Pool::shapes)
      .def("forget_shapes", &Pool::forget_shapes)
      .def("learn", [](Pool& pool, const std::vector<std::pair<uint32_t, int64_t>>& typical,
                       std::vector<int64_t> steps) { pool.learn(typical, std::move(steps)); })
      .def("price", [](Pool& pool, std::vector<std::string> models, Tables gpu, Tables cpu, Tables memory,
                       int64_t cpu_step, int64_t memory_step) {
        pool.price({std::move(models), std::move(gpu), std::move(cpu), std::move(memory), cpu_step, memory_step});
      })
      .def("find", &find)
      .def("find_gang", [](Pool& pool, uint32_t shape, int64_t workers, bool one_node) {
        return spots_of(pool.find_gang(shape, workers, one_node));
      })
      .def("fits_empty", &Pool::fits_empty)
      .def("take", &Pool::take)
      .def("release", &Pool::release)
      .def("free", [](const Pool& pool, uint32_t number) {
        const Node& node = pool.node(number);
        return nb::make_tuple(node.cpu_milli, node.memory_mib, tuple_of(node.gpus));
      });
}

}  // namespace leptonic::placement
