// onnxruntime as a backend of Triton, in C++: what the fastest Triton without a GPU does with a
// batch. Rows are gathered once, the model runs once, each request gets its rows.
#include <chrono>
#include <cstring>
#include <memory>

#include "ort.h"
#include "triton.h"

namespace {

uint64_t now_ns() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

void check(TRITONSERVER_Error* error) {
  if (error == nullptr) return;
  TRITONSERVER_ErrorDelete(error);
  throw std::runtime_error("Triton refused a call");
}

/// For what concerns one request of a batch: the others are answered all the same, and an error
/// returned after the first answer would make Triton answer twice.
bool went_well(TRITONSERVER_Error* error) {
  if (error != nullptr) TRITONSERVER_ErrorDelete(error);
  return error == nullptr;
}

struct Rows {
  const char* data;
  uint64_t bytes;
  const int64_t* shape;
  uint32_t dims;
};

Rows rows_of(TRITONBACKEND_Request* request) {
  TRITONBACKEND_Input* input = nullptr;
  const char* name = nullptr;
  int32_t datatype = 0;
  int32_t memory_type = MEMORY_CPU;
  int64_t memory_type_id = 0;
  uint32_t buffers = 0;
  const void* data = nullptr;
  Rows rows{};
  check(TRITONBACKEND_RequestInputByIndex(request, 0, &input));
  check(TRITONBACKEND_InputProperties(
      input, &name, &datatype, &rows.shape, &rows.dims, &rows.bytes, &buffers));
  if (buffers != 1 || datatype != TYPE_FP32) throw std::runtime_error("one FP32 buffer is taken");
  check(TRITONBACKEND_InputBuffer(
      input, 0, &data, &rows.bytes, &memory_type, &memory_type_id));
  rows.data = static_cast<const char*>(data);
  return rows;
}

/// The batch in one piece; a single request's rows are used where they lie.
const char* gathered(const std::vector<Rows>& all, std::vector<char>& room) {
  if (all.size() == 1) return all[0].data;
  for (const Rows& rows : all) room.insert(room.end(), rows.data, rows.data + rows.bytes);
  return room.data();
}

void answer(TRITONBACKEND_Request* request, const char* scores, uint64_t bytes,
            const std::vector<int64_t>& shape) {
  TRITONBACKEND_Response* response = nullptr;
  TRITONBACKEND_Output* output = nullptr;
  void* room = nullptr;
  int32_t memory_type = MEMORY_CPU;
  int64_t memory_type_id = 0;
  if (!went_well(TRITONBACKEND_ResponseNew(&response, request))) return;
  if (went_well(TRITONBACKEND_ResponseOutput(
          response, &output, "scores", TYPE_FP32, shape.data(), shape.size())) &&
      went_well(TRITONBACKEND_OutputBuffer(output, &room, bytes, &memory_type, &memory_type_id))) {
    std::memcpy(room, scores, bytes);
  }
  went_well(TRITONBACKEND_ResponseSend(response, RESPONSE_FINAL, nullptr));
}

void execute(TRITONBACKEND_ModelInstance* instance, ort::Session& session,
             TRITONBACKEND_Request** requests, uint32_t count) {
  const uint64_t started = now_ns();
  std::vector<Rows> all;
  std::vector<char> room;
  uint64_t bytes = 0;
  int64_t total = 0;
  for (uint32_t i = 0; i < count; ++i) {
    all.push_back(rows_of(requests[i]));
    bytes += all.back().bytes;
    total += all.back().shape[0];
  }
  std::vector<int64_t> shape(all[0].shape, all[0].shape + all[0].dims);
  shape[0] = total;
  const char* batch = gathered(all, room);
  const uint64_t computing = now_ns();
  ort::Value scores;
  session.run(batch, bytes, shape, scores);
  const uint64_t computed = now_ns();
  shape = scores.shape();
  uint64_t row = sizeof(float);
  for (size_t i = 1; i < shape.size(); ++i) row *= shape[i];
  const char* next = scores.data();
  for (uint32_t i = 0; i < count; ++i) {
    shape[0] = all[i].shape[0];
    answer(requests[i], next, row * shape[0], shape);
    next += row * shape[0];
  }
  const uint64_t ended = now_ns();
  for (uint32_t i = 0; i < count; ++i) {
    went_well(TRITONBACKEND_ModelInstanceReportStatistics(
        instance, requests[i], true, started, computing, computed, ended));
    went_well(TRITONBACKEND_RequestRelease(requests[i], RELEASE_ALL));
  }
  went_well(TRITONBACKEND_ModelInstanceReportBatchStatistics(
      instance, total, started, computing, computed, ended));
}

}  // namespace

extern "C" {

TRITONSERVER_Error* TRITONBACKEND_ModelInstanceInitialize(TRITONBACKEND_ModelInstance* instance) {
  TRITONBACKEND_Model* model = nullptr;
  const char* folder = nullptr;
  int32_t artifact_type = 0;
  uint64_t version = 0;
  try {
    check(TRITONBACKEND_ModelInstanceModel(instance, &model));
    check(TRITONBACKEND_ModelRepository(model, &artifact_type, &folder));
    check(TRITONBACKEND_ModelVersion(model, &version));
    auto session = std::make_unique<ort::Session>(
        std::string(folder) + "/" + std::to_string(version) + "/model.onnx");
    return TRITONBACKEND_ModelInstanceSetState(instance, session.release());
  } catch (const std::runtime_error& error) {
    return TRITONSERVER_ErrorNew(ERROR_INTERNAL, error.what());
  }
}

TRITONSERVER_Error* TRITONBACKEND_ModelInstanceFinalize(TRITONBACKEND_ModelInstance* instance) {
  void* state = nullptr;
  TRITONSERVER_Error* error = TRITONBACKEND_ModelInstanceState(instance, &state);
  if (error == nullptr) delete static_cast<ort::Session*>(state);
  return error;
}

TRITONSERVER_Error* TRITONBACKEND_ModelInstanceExecute(
    TRITONBACKEND_ModelInstance* instance, TRITONBACKEND_Request** requests, const uint32_t count) {
  try {
    void* state = nullptr;
    check(TRITONBACKEND_ModelInstanceState(instance, &state));
    execute(instance, *static_cast<ort::Session*>(state), requests, count);
    return nullptr;
  } catch (const std::runtime_error& error) {
    return TRITONSERVER_ErrorNew(ERROR_INTERNAL, error.what());
  }
}
}
