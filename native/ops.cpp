// leptonic_ops: operators of domain ai.leptonic for onnxruntime, which loads this as a library of custom
// ops. services/inference/rewritings.py lists what puts them into graphs.
#include "conv_pool.h"
#include "dense.h"
#include "onnx_op.h"

namespace leptonic::ops {

namespace {

Window window(const Object* info, const std::string& what, const std::string& axis) {
  auto part = [&](const char* name) { return attribute(info, what + "_" + name + "_" + axis); };
  return {part("size"), part("stride"), part("before"), part("after")};
}

// images, packed weights, bias -> images, or flat rows of them, channels last
struct ConvPoolKernel {
  static constexpr const char* kName = "ConvPool";
  static constexpr int kInputs[] = {kFloat, kFloat, kFloat};

  explicit ConvPoolKernel(const Object* info)
      : geometry{window(info, "conv", "y"),   window(info, "conv", "x"),
                 window(info, "pool", "y"),   window(info, "pool", "x"),
                 attribute(info, "channels"), attribute(info, "relu") != 0,
                 attribute(info, "flat") != 0} {
    geometry.check();
  }

  void compute(Object* context) const {
    const Object *images = input(context, 0), *weights = input(context, 1), *bias = input(context, 2);
    const std::vector<int64_t> in = shape_of(images);
    if (in.size() != 4) throw std::invalid_argument("images have four dimensions");
    const std::vector<int64_t> packed{in[1], geometry.conv_y.size, geometry.conv_x.size, geometry.pitch()};
    if (shape_of(weights) != packed || shape_of(bias) != std::vector<int64_t>{geometry.pitch()})
      throw std::invalid_argument("the weights are of another convolution");
    const Plan plan(geometry, {data(images), in[0], in[1], in[2], in[3]});
    std::vector<int64_t> out{in[0], geometry.channels, plan.height, plan.width};
    if (geometry.channels_last) out = {in[0], plan.height * plan.width * geometry.channels};
    Object* made = output(context, out);
    if (in[0] * plan.height * plan.width == 0) return;
    conv_pools().back()(plan, data(weights), data(bias), data(made), scratch(plan.scratch()));
  }

  Geometry geometry;
};

// rows, their last dimension the inputs; packed weights; bias -> rows of outputs
struct DenseKernel {
  static constexpr const char* kName = "Dense";
  static constexpr int kInputs[] = {kFloat, kUint16, kFloat};

  explicit DenseKernel(const Object* info)
      : shape{attribute(info, "given"), attribute(info, "made"), attribute(info, "relu") != 0} {
    if (!has_tiles()) throw std::invalid_argument("this processor has no tile registers");
    if (std::min(shape.inputs, shape.outputs) < 1 || std::max(shape.inputs, shape.outputs) > kSidesMax)
      throw std::invalid_argument("a matrix has rows and columns, and not too many");
  }

  void compute(Object* context) const {
    const Object *rows = input(context, 0), *weights = input(context, 1), *bias = input(context, 2);
    std::vector<int64_t> sizes = shape_of(rows);
    if (sizes.empty() || sizes.back() != shape.inputs) throw std::invalid_argument("rows are of another length");
    const std::vector<int64_t> packed{shape.blocks(), shape.depths(), 2, 2, kTile, kDepth};
    if (shape_of(weights) != packed || shape_of(bias) != std::vector<int64_t>{shape.outputs})
      throw std::invalid_argument("the weights are of another matrix");
    int64_t count = 1;
    for (size_t i = 0; i + 1 < sizes.size(); ++i) count *= sizes[i];
    sizes.back() = shape.outputs;
    Object* made = output(context, sizes);
    float* out = data(made);
    const float* from = data(rows);
    for (int64_t row = 0; row < count; row += kRowsAtOnce) {
      const int64_t taken = std::min(kRowsAtOnce, count - row);
      dense(shape, from + row * shape.inputs, taken, data<uint16_t>(weights), data(bias), out + row * shape.outputs,
            scratch(shape.scratch(taken)));
    }
  }

  static constexpr int64_t kSidesMax = 1 << 24, kRowsAtOnce = 256;

  Dense shape;
};

const Operator<ConvPoolKernel> conv_pool_operator;
const Operator<DenseKernel> dense_operator;

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
      call(kCustomOpDomainAdd, made, &conv_pool_operator);
      call(kCustomOpDomainAdd, made, &dense_operator);
      return made;
    }();
    call(kAddCustomOpDomain, options, domain);
  });
}

// For operators.py.
extern "C" {

__attribute__((visibility("default"))) int leptonic_has_tiles() { return leptonic::ops::has_tiles(); }

// weights: [inputs, outputs]; to: as dense.h says.
__attribute__((visibility("default"))) void leptonic_pack(const float* weights, int64_t inputs, int64_t outputs,
                                                          uint16_t* to) {
  leptonic::ops::pack({inputs, outputs, false}, weights, to);
}
}
