// What onnxruntime sees of an operator. Its wheel brings no headers: its C API is a table that only ever
// grows at its end, and `OrtCustomOp` a struct that says by its version how much of it is there, so both are
// known by position (onnxruntime_c_api.h, API version 16). For one file only: `api` is its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace leptonic::ops {

namespace {

struct Status;
struct Object;  // only ever held by pointer
using Members = void* const*;
constexpr uint32_t kApiVersion = 16;
constexpr int kFloat = 1, kUint16 = 4;  // of a tensor
constexpr int kFail = 1, kInvalidArgument = 2;
constexpr int kRequired = 0, kDefaultMemory = 0;
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

template <class Number = float>
Number* data(const Object* tensor) {
  void* found = nullptr;
  call(kGetTensorMutableData, const_cast<Object*>(tensor), &found);
  return static_cast<Number*>(found);
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

Object* output(Object* context, const std::vector<int64_t>& shape) {
  Object* tensor = nullptr;
  call(kKernelContextGetOutput, context, size_t{0}, shape.data(), shape.size(), &tensor);
  return tensor;
}

// Of a runner: as large as it ever was asked for.
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

// OrtCustomOp. A Kernel has `kName` and `kInputs`, is made from the node's attributes, and computes.
template <class Kernel>
struct Operator {
  uint32_t version = kApiVersion;
  void* (*create_old)(const Operator*, Members, const Object*) = nullptr;
  const char* (*name)(const Operator*) = [](const Operator*) { return Kernel::kName; };
  const char* (*provider)(const Operator*) = [](const Operator*) { return static_cast<const char*>(nullptr); };
  int (*input_type)(const Operator*, size_t) = [](const Operator*, size_t index) { return Kernel::kInputs[index]; };
  size_t (*inputs)(const Operator*) = [](const Operator*) { return std::size(Kernel::kInputs); };
  int (*output_type)(const Operator*, size_t) = [](const Operator*, size_t) { return kFloat; };
  size_t (*outputs)(const Operator*) = [](const Operator*) { return size_t{1}; };
  void (*compute_old)(void*, Object*) = nullptr;
  void (*destroy)(void*) = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  int (*input_is)(const Operator*, size_t) = [](const Operator*, size_t) { return kRequired; };
  int (*output_is)(const Operator*, size_t) = [](const Operator*, size_t) { return kRequired; };
  int (*memory)(const Operator*, size_t) = [](const Operator*, size_t) { return kDefaultMemory; };
  int (*any_inputs_min)(const Operator*) = [](const Operator*) { return 0; };
  int (*any_inputs_alike)(const Operator*) = [](const Operator*) { return 0; };
  int (*any_outputs_min)(const Operator*) = [](const Operator*) { return 0; };
  int (*any_outputs_alike)(const Operator*) = [](const Operator*) { return 0; };
  Status* (*create)(const Operator*, Members, const Object*, void**) = [](const Operator*, Members,
                                                                          const Object* info, void** kernel) {
    return guarded([&] { *kernel = new Kernel(info); });
  };
  Status* (*compute)(void*, Object*) = [](void* kernel, Object* context) {
    return guarded([&] { static_cast<const Kernel*>(kernel)->compute(context); });
  };
};

}  // namespace

}  // namespace leptonic::ops
