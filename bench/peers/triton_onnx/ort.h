// onnxruntime's C API by position: OrtApi only ever grows at its end, so an index into it is stable
// (onnxruntime_c_api.h), and the wheel that brings the library brings no headers.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace ort {

struct Status;
struct Object;  // an env, session, value, ...: only ever held by pointer
using Members = void* const*;
struct Base {
  Members (*api)(uint32_t version);
  const char* (*version)();
};

constexpr uint32_t API_VERSION = 16;
constexpr int FLOAT = 1;
constexpr int WARNING = 2;
constexpr int ARENA = 1;
enum Member {
  GetErrorMessage = 2,
  CreateEnv = 3,
  CreateSession = 7,
  RunSession = 9,
  CreateSessionOptions = 10,
  SetIntraOpNumThreads = 24,
  CreateTensorWithData = 49,
  GetTensorMutableData = 51,
  GetDimensionsCount = 61,
  GetDimensions = 62,
  GetTensorTypeAndShape = 65,
  CreateCpuMemoryInfo = 69,
  ReleaseStatus = 93,
  ReleaseSession = 95,
  ReleaseValue = 96,
  ReleaseTensorTypeAndShape = 99,
};

inline Members members() {
  static Members const found = [] {
    void* library = dlopen(ONNXRUNTIME_LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw std::runtime_error(dlerror());
    auto base = reinterpret_cast<const Base* (*)()>(dlsym(library, "OrtGetApiBase"));
    return base()->api(API_VERSION);
  }();
  return found;
}

template <typename... Arguments>
void call(Member member, Arguments... arguments) {
  auto* status = reinterpret_cast<Status* (*)(Arguments...)>(members()[member])(arguments...);
  if (status == nullptr) return;
  const std::string text =
      reinterpret_cast<const char* (*)(const Status*)>(members()[GetErrorMessage])(status);
  reinterpret_cast<void (*)(Status*)>(members()[ReleaseStatus])(status);
  throw std::runtime_error(text);
}

inline void release(Member member, Object* object) {
  reinterpret_cast<void (*)(Object*)>(members()[member])(object);
}

/// What a run gave, until it goes out of scope.
class Value {
 public:
  Object* object = nullptr;
  Value() = default;
  Value(const Value&) = delete;
  Value& operator=(const Value&) = delete;
  ~Value() {
    if (object != nullptr) release(ReleaseValue, object);
  }

  const char* data() const {
    void* found = nullptr;
    call(GetTensorMutableData, object, &found);
    return static_cast<const char*>(found);
  }

  std::vector<int64_t> shape() const {
    Object* info = nullptr;
    size_t count = 0;
    call(GetTensorTypeAndShape, static_cast<const Object*>(object), &info);
    call(GetDimensionsCount, static_cast<const Object*>(info), &count);
    std::vector<int64_t> found(count);
    call(GetDimensions, static_cast<const Object*>(info), found.data(), count);
    release(ReleaseTensorTypeAndShape, info);
    return found;
  }
};

/// One model, one thread, float32 `features` -> float32 `scores`.
class Session {
 public:
  explicit Session(const std::string& path) {
    Object* options = nullptr;
    call(CreateEnv, WARNING, "onnxbench", &environment_);
    call(CreateSessionOptions, &options);
    call(SetIntraOpNumThreads, options, 1);
    call(CreateSession, static_cast<const Object*>(environment_), path.c_str(),
         static_cast<const Object*>(options), &session_);
    call(CreateCpuMemoryInfo, ARENA, 0, &memory_);
  }
  ~Session() { release(ReleaseSession, session_); }

  void run(const void* rows, size_t bytes, const std::vector<int64_t>& shape, Value& scores) {
    static const char* const inputs[] = {"features"};
    static const char* const outputs[] = {"scores"};
    Value given;
    call(CreateTensorWithData, static_cast<const Object*>(memory_), const_cast<void*>(rows), bytes,
         shape.data(), shape.size(), FLOAT, &given.object);
    const Object* const list[] = {given.object};
    call(RunSession, session_, static_cast<const Object*>(nullptr), &inputs[0], &list[0],
         size_t{1}, &outputs[0], size_t{1}, &scores.object);
  }

 private:
  Object* environment_ = nullptr;
  Object* memory_ = nullptr;
  Object* session_ = nullptr;
};

}  // namespace ort
