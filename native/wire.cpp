#include "wire.h"

#include <algorithm>
#include <cassert>

namespace leptonic {

namespace {

enum WireType { kVarint = 0, kBytes = 2 };

// Walks over the fields of one message. Everything else than varints and bytes is unusual here.
class Reader {
 public:
  explicit Reader(std::string_view message)
      : at_(reinterpret_cast<const uint8_t*>(message.data())), end_(at_ + message.size()) {}

  bool done() const { return at_ == end_; }

  bool varint(uint64_t& value) {
    value = 0;
    for (int shift = 0; shift < 70 && at_ < end_; shift += 7) {
      uint8_t byte = *at_++;
      if (shift == 63 && byte > 1) return false;
      value |= uint64_t{byte & 0x7fu} << shift;
      if (byte < 0x80) return true;
    }
    return false;
  }

  bool bytes(std::string_view& value) {
    uint64_t size = 0;
    if (!varint(size) || size > static_cast<size_t>(end_ - at_)) return false;
    value = {reinterpret_cast<const char*>(at_), static_cast<size_t>(size)};
    at_ += size;
    return true;
  }

  // The number of the next field, whose wire type has to be `type`; 0 when it is not.
  uint32_t field(WireType type) {
    uint64_t tag = 0;
    if (!varint(tag) || tag > UINT32_MAX || (tag & 7) != type) return 0;
    return static_cast<uint32_t>(tag >> 3);
  }

  // As `field`, of either type.
  uint32_t field(uint32_t& type) {
    uint64_t tag = 0;
    if (!varint(tag) || tag > UINT32_MAX) return 0;
    type = tag & 7;
    return static_cast<uint32_t>(tag >> 3);
  }

 private:
  const uint8_t* at_;
  const uint8_t* end_;
};

bool is_plain(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
}

bool push(Shape& shape, uint64_t value) {
  int64_t size = static_cast<int64_t>(value);
  if (shape.rank == kDimsMax || size < 1) return false;
  shape.dims[shape.rank++] = size;
  return true;
}

bool read_packed(std::string_view packed, Shape& shape) {
  Reader reader(packed);
  uint64_t value = 0;
  while (!reader.done())
    if (!reader.varint(value) || !push(shape, value)) return false;
  return true;
}

// InferInputTensor without parameters and contents.
bool read_input(std::string_view message, Input& input) {
  input.name = input.datatype = {};
  input.shape.rank = 0;
  Reader reader(message);
  while (!reader.done()) {
    uint32_t type = 0;
    uint32_t number = reader.field(type);
    uint64_t value = 0;
    if (number == 3 && type == kVarint) {
      if (!reader.varint(value) || !push(input.shape, value)) return false;
      continue;
    }
    std::string_view bytes;
    if (type != kBytes || !reader.bytes(bytes)) return false;
    if (number == 1) input.name = bytes;
    else if (number == 2) input.datatype = bytes;
    else if (number != 3 || !read_packed(bytes, input.shape)) return false;
  }
  return true;
}

// InferRequestedOutputTensor without parameters.
bool read_output(std::string_view message, std::string_view& name) {
  Reader reader(message);
  name = {};
  while (!reader.done())
    if (reader.field(kBytes) != 1 || !reader.bytes(name)) return false;
  return true;
}

// An InferParameter of exactly one field that is a number: bool, int64 or uint64.
bool read_number(std::string_view message, uint32_t& number, uint64_t& value) {
  Reader reader(message);
  number = reader.field(kVarint);
  return (number == 1 || number == 2 || number == 5) && reader.varint(value) && reader.done();
}

bool read_parameter(std::string_view entry, Asked& asked) {
  std::string_view key, parameter;
  Reader reader(entry);
  if (reader.field(kBytes) != 1 || !reader.bytes(key)) return false;
  if (reader.field(kBytes) != 2 || !reader.bytes(parameter) || !reader.done()) return false;
  uint32_t number = 0;
  uint64_t value = 0;
  if (!read_number(parameter, number, value)) return false;
  if (key == "triton_enable_empty_final_response") return number == 1;
  if (number == 1 || value > INT64_MAX) return false;
  if (key == "timeout") asked.timeout_us = static_cast<int64_t>(value);
  else if (key == "priority") asked.priority = value;
  else return false;
  return key == "priority" || number == 2;
}

bool read_field(uint32_t number, std::string_view bytes, Asked& asked) {
  switch (number) {
    case 1: asked.model = bytes; return true;
    case 2: asked.version = bytes; return true;
    case 3: asked.id = bytes; return bytes.size() <= kIdBytesMax && is_plain(bytes);
    case 4: return read_parameter(bytes, asked);
    case 5:
      return asked.input_count < kTensorsMax && read_input(bytes, asked.inputs[asked.input_count++]);
    case 6:
      return asked.output_count < kTensorsMax &&
             read_output(bytes, asked.outputs[asked.output_count++]);
    case 7:
      if (asked.raw_count == kTensorsMax) return false;
      asked.raws[asked.raw_count++] = bytes;
      return true;
    default: return false;
  }
}

bool fits_shape(const Shape& shape, const Tensor& tensor, size_t raw_bytes) {
  if (shape.rank != tensor.shape.size()) return false;
  uint64_t bytes = tensor.item_bytes;
  for (size_t i = 0; i < shape.rank; ++i) {
    if (tensor.shape[i] != -1 && tensor.shape[i] != shape.dims[i]) return false;
    if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(shape.dims[i]), &bytes)) return false;
  }
  return bytes == raw_bytes;
}

size_t index_of(std::string_view name, const std::vector<Tensor>& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].name == name) return i;
  return tensors.size();
}

bool fit_outputs(const Asked& asked, const std::vector<Tensor>& outputs, Fit& fit) {
  fit.outputs = asked.output_count ? 0 : ~uint32_t{0};
  for (size_t i = 0; i < asked.output_count; ++i) {
    size_t at = index_of(asked.outputs[i], outputs);
    if (at == outputs.size() || fit.outputs >> at & 1) return false;
    fit.outputs |= uint32_t{1} << at;
  }
  return true;
}

size_t varint_bytes(uint64_t value) { return (64 - __builtin_clzll(value | 1) + 6) / 7; }

size_t field_bytes(size_t size) { return 1 + varint_bytes(size) + size; }

class Writer {
 public:
  explicit Writer(char* at) : at_(at) {}

  void varint(uint64_t value) {
    for (; value >= 0x80; value >>= 7) *at_++ = static_cast<char>(value | 0x80);
    *at_++ = static_cast<char>(value);
  }

  void head(uint32_t number, size_t size) {
    varint(number << 3 | kBytes);
    varint(size);
  }

  void bytes(uint32_t number, std::string_view value) {
    head(number, value.size());
    at_ = std::copy(value.begin(), value.end(), at_);
  }

  const char* at() const { return at_; }

 private:
  char* at_;
};

size_t dims_bytes(const Output& output) {
  size_t bytes = 0;
  for (size_t i = 0; i < output.rank; ++i) bytes += varint_bytes(static_cast<uint64_t>(output.dims[i]));
  return bytes;
}

// The size of InferOutputTensor.
size_t head_bytes(const Output& output) {
  size_t shape = dims_bytes(output);
  return field_bytes(output.tensor->name.size()) + field_bytes(output.tensor->datatype.size()) +
         (output.rank ? field_bytes(shape) : 0);
}

constexpr std::string_view kTraceparent = "traceparent";

// Of the map entry {"traceparent": {string_param: ...}}.
size_t trace_bytes(std::string_view traceparent) {
  return field_bytes(kTraceparent.size()) + field_bytes(field_bytes(traceparent.size()));
}

}  // namespace

bool read_request(std::string_view message, Asked& asked) {
  asked.model = asked.version = asked.id = {};
  asked.timeout_us = 0;
  asked.priority = 0;
  asked.input_count = asked.output_count = asked.raw_count = 0;
  Reader reader(message);
  while (!reader.done()) {
    uint32_t number = reader.field(kBytes);
    std::string_view bytes;
    if (number == 0 || !reader.bytes(bytes) || !read_field(number, bytes, asked)) return false;
  }
  return asked.raw_count == asked.input_count;
}

bool fits(const Asked& asked, const std::vector<Tensor>& inputs,
          const std::vector<Tensor>& outputs, bool batched, Fit& fit) {
  if (asked.input_count != inputs.size() || inputs.empty()) return false;
  uint32_t seen = 0;
  for (size_t i = 0; i < asked.input_count; ++i) {
    const Input& input = asked.inputs[i];
    size_t at = index_of(input.name, inputs);
    if (at == inputs.size() || seen >> at & 1) return false;
    seen |= uint32_t{1} << at;
    const Tensor& tensor = inputs[at];
    if (input.datatype != tensor.datatype) return false;
    if (!fits_shape(input.shape, tensor, asked.raws[i].size())) return false;
    fit.raws[at] = asked.raws[i];
    fit.shapes[at] = input.shape;
  }
  fit.rows = batched ? fit.shapes[0].dims[0] : 1;
  for (size_t i = 0; batched && i < inputs.size(); ++i)
    if (fit.shapes[i].dims[0] != fit.rows) return false;
  return fit_outputs(asked, outputs, fit);
}

void write_prefix(char* at, size_t message_bytes) {
  at[0] = 0;  // not compressed
  for (int i = 0; i < 4; ++i) at[1 + i] = static_cast<char>(message_bytes >> (24 - 8 * i));
}

void write_response(std::string_view model, std::string_view version, std::string_view id,
                    std::string_view traceparent, const Output* outputs, size_t count,
                    std::string& message) {
  size_t size = field_bytes(model.size()) + field_bytes(version.size()) + field_bytes(id.size());
  if (!traceparent.empty()) size += field_bytes(trace_bytes(traceparent));
  for (size_t i = 0; i < count; ++i)
    size += field_bytes(head_bytes(outputs[i])) + field_bytes(outputs[i].raw.size());
  message.resize(kPrefixBytes + size);
  write_prefix(message.data(), size);
  Writer writer(message.data() + kPrefixBytes);
  writer.bytes(1, model);
  writer.bytes(2, version);
  writer.bytes(3, id);
  if (!traceparent.empty()) {
    writer.head(4, trace_bytes(traceparent));
    writer.bytes(1, kTraceparent);
    writer.head(2, field_bytes(traceparent.size()));
    writer.bytes(3, traceparent);
  }
  for (size_t i = 0; i < count; ++i) {
    const Output& output = outputs[i];
    writer.head(5, head_bytes(output));
    writer.bytes(1, output.tensor->name);
    writer.bytes(2, output.tensor->datatype);
    if (output.rank) writer.head(3, dims_bytes(output));
    for (size_t d = 0; d < output.rank; ++d) writer.varint(static_cast<uint64_t>(output.dims[d]));
  }
  for (size_t i = 0; i < count; ++i) writer.bytes(6, outputs[i].raw);
  assert(writer.at() == message.data() + message.size());
}

}  // namespace leptonic
