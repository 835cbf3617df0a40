// leptonic_ops: operators of domain ai.leptonic for onnxruntime, which loads this as a library of custom
// ops. services/inference/fusion.py puts them into graphs.
//
// onnxruntime's wheel brings no headers. Its C API is a table that only ever grows at its end and a
// struct that says by its version how much of it is there, so both are known by position
// (onnxruntime_c_api.h, API version 16).
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>

#include "conv_pool.h"

namespace leptonic::ops {

namespace {

struct Status;
struct Object;  // only ever held by pointer
using Members = void* const*;
constexpr uint32_t kApiVersion = 16;
constexpr int kFloat = 1, kFail = 1, kInvalidArgument = 2;
constexpr size_t kAligned = 64;

enum Member {
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kKernelInfoGetAttributeInt = 86,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseTensorTypeAndShape = 99,
};

struct Base {
  Members (*api)(uint32_t version);
  const char* (*version)();
};

Members api;

// onnxruntime's own, on its way back to it.
struct Failed {
  Status* status;
};

Status* status_of(int code, const char* text) {
  return reinterpret_cast<Status* (*)(int, const char*)>(api[kCreateStatus])(code, text);
}

template <class... Arguments>
void call(Member member, Arguments... arguments) {
  Status* status = reinterpret_cast<Status* (*)(Arguments...)>(api[member])(arguments...);
  if (status) throw Failed{status};
}

// No exception crosses into onnxruntime.
template <class Body>
Status* guarded(Body body) {
  try {
    body();
    return nullptr;
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const std::invalid_argument& error) {
    return status_of(kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return status_of(kFail, error.what());
  }
}

int64_t attribute(const Object* info, const std::string& name) {
  int64_t value = 0;
  call(kKernelInfoGetAttributeInt, info, name.c_str(), &value);
  return value;
}

Window window(const Object* info, const std::string& what, const std::string& axis) {
  auto part = [&](const char* name) { return attribute(info, what + "_" + name + "_" + axis); };
  return {part("size"), part("stride"), part("before"), part("after")};
}

Geometry geometry_of(const Object* info) {
  return {window(info, "conv", "y"),     window(info, "conv", "x"),
          window(info, "pool", "y"),     window(info, "pool", "x"),
          attribute(info, "channels"),   attribute(info, "relu") != 0};
}

float* data(const Object* tensor) {
  void* found = nullptr;
  call(kGetTensorMutableData, const_cast<Object*>(tensor), &found);
  return static_cast<float*>(found);
}

std::vector<int64_t> shape_of(const Object* tensor) {
  Object* info = nullptr;
  call(kGetTensorTypeAndShape, tensor, &info);
  std::unique_ptr<Object, void (*)(Object*)> held(
      info, reinterpret_cast<void (*)(Object*)>(api[kReleaseTensorTypeAndShape]));
  size_t rank = 0;
  call(kGetDimensionsCount, static_cast<const Object*>(info), &rank);
  std::vector<int64_t> dims(rank);
  call(kGetDimensions, static_cast<const Object*>(info), dims.data(), rank);
  return dims;
}

const Object* input(const Object* context, size_t index) {
  const Object* tensor = nullptr;
  call(kKernelContextGetInput, context, index, &tensor);
  return tensor;
}

// Of a runner: as large as the largest image it has seen.
float* scratch(size_t floats) {
  struct Free {
    void operator()(float* at) const { std::free(at); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local size_t size = 0;
  if (size < floats) {
    size_t bytes = (floats * sizeof(float) + kAligned - 1) / kAligned * kAligned;
    memory.reset(static_cast<float*>(std::aligned_alloc(kAligned, bytes)));
    size = memory ? floats : 0;
    if (!memory) throw std::bad_alloc();
  }
  return memory.get();
}

void compute(const Geometry& geometry, Object* context) {
  const Object *features = input(context, 0), *weights = input(context, 1), *bias = input(context, 2);
  const std::vector<int64_t> in = shape_of(features), packed = shape_of(weights), added = shape_of(bias);
  if (in.size() != 4) throw std::invalid_argument("images have four dimensions");
  const std::vector<int64_t> expected{in[1], geometry.conv_y.size, geometry.conv_x.size, geometry.pitch()};
  if (packed != expected || added != std::vector<int64_t>{geometry.pitch()})
    throw std::invalid_argument("the weights are of another convolution");
  const Plan plan(geometry, {data(features), in[0], in[1], in[2], in[3]});
  const int64_t out[] = {in[0], geometry.channels, plan.height, plan.width};
  Object* made = nullptr;
  call(kKernelContextGetOutput, context, size_t{0}, &out[0], size_t{4}, &made);
  if (in[0] * plan.height * plan.width == 0) return;
  conv_pools().back()(plan, data(weights), data(bias), data(made), scratch(plan.scratch()));
}

// OrtCustomOp.
struct Op {
  uint32_t version = kApiVersion;
  void* (*create_old)(const Op*, Members, const Object*) = nullptr;
  const char* (*name)(const Op*) = [](const Op*) { return "ConvPool"; };
  const char* (*provider)(const Op*) = [](const Op*) { return static_cast<const char*>(nullptr); };
  int (*input_type)(const Op*, size_t) = [](const Op*, size_t) { return kFloat; };
  size_t (*inputs)(const Op*) = [](const Op*) { return size_t{3}; };
  int (*output_type)(const Op*, size_t) = [](const Op*, size_t) { return kFloat; };
  size_t (*outputs)(const Op*) = [](const Op*) { return size_t{1}; };
  void (*compute_old)(void*, Object*) = nullptr;
  void (*destroy)(void*) = [](void* kernel) { delete static_cast<Geometry*>(kernel); };
  int (*input_is)(const Op*, size_t) = [](const Op*, size_t) { return 0; };    // required
  int (*output_is)(const Op*, size_t) = [](const Op*, size_t) { return 0; };
  int (*memory)(const Op*, size_t) = [](const Op*, size_t) { return 0; };  // the default
  int (*any_inputs_min)(const Op*) = [](const Op*) { return 0; };
  int (*any_inputs_alike)(const Op*) = [](const Op*) { return 0; };
  int (*any_outputs_min)(const Op*) = [](const Op*) { return 0; };
  int (*any_outputs_alike)(const Op*) = [](const Op*) { return 0; };
  Status* (*create)(const Op*, Members, const Object*, void**) = [](const Op*, Members, const Object* info,
                                                                    void** kernel) {
    return guarded([&] {
      auto made = std::make_unique<Geometry>(geometry_of(info));
      made->check();
      *kernel = made.release();
    });
  };
  Status* (*compute)(void*, Object*) = [](void* kernel, Object* context) {
    return guarded([&] { ops::compute(*static_cast<Geometry*>(kernel), context); });
  };
};

const Op op;

}  // namespace

}  // namespace leptonic::ops

// The name that onnxruntime looks for.
extern "C" __attribute__((visibility("default"))) leptonic::ops::Status* RegisterCustomOps(
    leptonic::ops::Object* options, const leptonic::ops::Base* base) {
  using namespace leptonic::ops;
  api = base->api(kApiVersion);
  return guarded([&] {
    static Object* domain = [] {
      Object* made = nullptr;
      call(kCreateCustomOpDomain, "ai.leptonic", &made);
      call(kCustomOpDomainAdd, made, &op);
      return made;
    }();
    call(kAddCustomOpDomain, options, domain);
  });
}
