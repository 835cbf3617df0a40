// The two messages of the fast path, read and written without objects between.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace leptonic {

constexpr size_t kTensorsMax = 16;
constexpr size_t kDimsMax = 64;  // numpy's
constexpr size_t kIdBytesMax = 256;

struct Shape {
  std::array<int64_t, kDimsMax> dims;
  size_t rank = 0;
};

// A tensor of a model's signature; -1 fits any size.
struct Tensor {
  std::string name;
  std::string datatype;
  std::vector<int64_t> shape;
  size_t item_bytes;
};

struct Input {
  std::string_view name;
  std::string_view datatype;
  Shape shape;
};

// A ModelInferRequest whose tensors are all raw. Views into the message.
struct Asked {
  std::string_view model;
  std::string_view version;
  std::string_view id;
  int64_t timeout_us = 0;
  uint64_t priority = 0;
  std::array<Input, kTensorsMax> inputs;
  size_t input_count = 0;
  std::array<std::string_view, kTensorsMax> outputs;
  size_t output_count = 0;
  std::array<std::string_view, kTensorsMax> raws;
  size_t raw_count = 0;
};

// False for whatever is malformed or unusual: Python looks at it and says what it is.
bool read_request(std::string_view message, Asked& asked);

// What a request's inputs are once they fit the signature.
struct Fit {
  std::array<std::string_view, kTensorsMax> raws;  // in the signature's order
  std::array<Shape, kTensorsMax> shapes;
  int64_t rows = 1;
  uint32_t outputs = 0;  // a bit for each wanted one
};

// False unless each declared input is there once and is exactly right. `batched`: the first
// dimension of all is the rows.
bool fits(const Asked& asked, const std::vector<Tensor>& inputs,
          const std::vector<Tensor>& outputs, bool batched, Fit& fit);

struct Output {
  const Tensor* tensor;
  const int64_t* dims;
  size_t rank;
  std::string_view raw;
};

// A ModelInferResponse behind the five bytes that gRPC puts before a message; replaces `message`.
void write_response(std::string_view model, std::string_view version, std::string_view id,
                    std::string_view traceparent, const Output* outputs, size_t count,
                    std::string& message);

constexpr size_t kPrefixBytes = 5;
void write_prefix(char* at, size_t message_bytes);

}  // namespace leptonic
