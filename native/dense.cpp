#include "dense.h"

#include <algorithm>
#include <cmath>

#ifdef __x86_64__
#pragma GCC diagnostic ignored "-Wuninitialized"  // what GCC's own intrinsics leave open on purpose
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace leptonic::ops {

namespace {

constexpr int64_t kTileNumbers = kTile * kDepth;  // bfloat16 in a register
constexpr int64_t kStep = 4 * kTileNumbers;       // of weights: two halves, upper and rest
constexpr int64_t kSums = kTile * kTile;          // float32 in a register
constexpr int64_t kPartsBytes = 24 << 10;         // of rows at once, both parts: half of the L1 cache, for two
constexpr int64_t kRowsAhead = 4;                 // fetched before they are taken apart

// How rows are taken: in registers of so many rows, as alike as they come; so many of the inputs at once.
struct Cut {
  int64_t tiles, height, depths, apart;  // apart: bfloat16 of a register's rows, both parts

  Cut(const Dense& shape, int64_t count) : tiles((count + kTile - 1) / kTile), height((count + tiles - 1) / tiles) {
    const int64_t depth_bytes = tiles * height * 2 * kDepth * int64_t{sizeof(uint16_t)};
    depths = std::clamp<int64_t>(kPartsBytes / depth_bytes, std::min<int64_t>(4, shape.depths()), shape.depths());
    apart = depths * 2 * height * kDepth;
  }
};

float float_of(uint16_t upper) {
  uint32_t bits = uint32_t{upper} << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

uint16_t nearest(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void multiply_plainly(const Dense& shape, const float* row, const uint16_t* weights, const float* bias, float* out) {
  for (int64_t output = 0; output < shape.outputs; ++output) {
    const uint16_t* block = weights + output / kWide * shape.depths() * kStep + output % kWide / kTile * kTileNumbers;
    float sum = 0;
    for (int64_t input = 0; input < shape.inputs; ++input) {
      const uint16_t* at = block + input / kDepth * kStep + input % kDepth / 2 * kDepth + output % kTile * 2 + input % 2;
      sum += row[input] * (float_of(at[0]) + float_of(at[2 * kTileNumbers]));
    }
    sum += bias[output];
    out[output] = shape.relu && !(sum > 0) ? 0 : sum;
  }
}

// No infinity, no NaN, and none that is rounded to one.
bool are_numbers(const float* row, int64_t count) {
  return std::all_of(row, row + count, [](float value) { return std::isfinite(float_of(nearest(value))); });
}

}  // namespace

void pack(const Dense& shape, const float* weights, uint16_t* to) {
  for (int64_t block = 0; block < shape.blocks(); ++block)
    for (int64_t depth = 0; depth < shape.depths(); ++depth, to += kStep)
      for (int64_t half = 0; half < 2; ++half)
        for (int64_t input = 0; input < kDepth; ++input)
          for (int64_t output = 0; output < kTile; ++output) {
            const int64_t row = depth * kDepth + input, column = block * kWide + half * kTile + output;
            const bool is_there = row < shape.inputs && column < shape.outputs;
            const float weight = is_there ? weights[row * shape.outputs + column] : 0;
            uint16_t* at = to + half * kTileNumbers + input / 2 * kDepth + output * 2 + input % 2;
            at[0] = nearest(weight);
            at[2 * kTileNumbers] = nearest(weight - float_of(at[0]));
          }
}

size_t Dense::scratch(int64_t rows) const {
  const Cut cut(*this, rows);
  return static_cast<size_t>(cut.tiles * (blocks() * 2 * kSums + cut.apart));
}

#ifdef __x86_64__

#define TILES __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace {

struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};

  // 0 to 3 are of sums, 4 and 5 of rows, 6 and 7 of weights.
  explicit Configuration(int64_t height) {
    for (int i = 0; i < 6; ++i) rows[i] = static_cast<uint8_t>(height);
    rows[6] = rows[7] = kTile;
  }
};

bool ask_for_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2), Linux 5.16
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512dq")) return false;
  unsigned a, b, c, d;
  __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
  const bool has = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
  return has && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// The first so many of 16 lanes, which may be none, or more.
TILES __mmask16 first(int64_t count) {
  return count >= 16 ? 0xffff : count > 0 ? static_cast<__mmask16>((1u << count) - 1) : 0;
}

// `count` of a row's inputs, each 32 of them in both parts: [depths, upper and rest, height, 32]. False where
// not all are numbers: they would spoil other sums.
TILES bool split(const float* row, int64_t count, int64_t height, uint16_t* to) {
  constexpr int kNoNumber = 0x99;  // NaN, infinities
  unsigned bad = 0;
  for (int64_t input = 0; input < count; input += kDepth, to += 2 * height * kDepth)
    for (int64_t half = 0; half < kDepth; half += kTile) {
      const __m512 values = _mm512_maskz_loadu_ps(first(count - input - half), row + input + half);
      const __m256i upper = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
      const __m512 most = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(upper), 16));
      bad |= _mm512_fpclass_ps_mask(most, kNoNumber);
      const __m256i rest = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_sub_ps(values, most)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + half), upper);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + height * kDepth + half), rest);
    }
  return !bad;
}

// As if all its inputs were 0.
void clear(int64_t count, int64_t height, uint16_t* to) {
  for (int64_t part = 0; part < 2 * count; part += kDepth, to += height * kDepth)
    __builtin_memset(to, 0, kDepth * sizeof *to);
}

// Some of each row's inputs in both parts: [tiles, depths, upper and rest, height, 32]. They are made row by
// row between the multiplications of those before: tiles leave the vector units idle.
struct Parts {
  Dense shape;
  Cut cut;
  const float* rows;
  int64_t count, depth;
  uint16_t* to;
  int64_t steps;  // that the rows are spread over
  int64_t row = 0, due = 0;
  bool all_numbers = true;

  int64_t depths() const { return std::min(cut.depths, shape.depths() - depth); }
  int64_t height() const { return depths() > 0 ? cut.tiles * cut.height : 0; }

  const float* inputs(int64_t of) const { return rows + of * shape.inputs + depth * kDepth; }

  TILES void take_row() {
    const int64_t left = shape.inputs - depth * kDepth, size = depths() * kDepth;
    uint16_t* at = to + row / cut.height * cut.apart + row % cut.height * kDepth;
    const int64_t ahead = row + kRowsAhead;
    const float* soon = inputs(ahead % count) + (ahead < count ? 0 : size);
    for (int64_t input = 0; input < size; input += kTile)
      _mm_prefetch(reinterpret_cast<const char*>(soon + input), _MM_HINT_T0);
    if (row >= count || !split(inputs(row), std::min(left, size), cut.height, at)) {
      clear(size, cut.height, at);
      all_numbers &= row >= count;
    }
    ++row;
  }

  TILES void step() {
    for (due += height(); due >= steps; due -= steps) take_row();
  }
};

// One or two tiles of rows by two of outputs, onto the sums there are, unless it begins.
template <int tiles>
TILES void multiply(const Cut& cut, int64_t depths, const uint16_t* rows, const uint16_t* weights, float* sums,
                    bool begins, Parts& next) {
  const int64_t part = cut.height * kDepth;
  const uint16_t* others = rows + cut.apart;
  if (begins) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + kSums, 64);
    if constexpr (tiles == 2) {
      _tile_loadd(2, sums + 2 * kSums, 64);
      _tile_loadd(3, sums + 3 * kSums, 64);
    }
  }
  for (int64_t depth = 0; depth < depths; ++depth) {
    next.step();
    _tile_loadd(4, rows, 64);
    _tile_loadd(6, weights, 64);
    _tile_loadd(7, weights + kTileNumbers, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (tiles == 2) {
      _tile_loadd(5, others, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_loadd(6, weights + 2 * kTileNumbers, 64);
    _tile_loadd(7, weights + 3 * kTileNumbers, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (tiles == 2) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_loadd(4, rows + part, 64);
    _tile_loadd(6, weights, 64);
    _tile_loadd(7, weights + kTileNumbers, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (tiles == 2) {
      _tile_loadd(5, others + part, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    rows += 2 * part;
    others += 2 * part;
    weights += kStep;
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kSums, 64);
  if constexpr (tiles == 2) {
    _tile_stored(2, sums + 2 * kSums, 64);
    _tile_stored(3, sums + 3 * kSums, 64);
  }
}

// A tile of sums: what of it there are rows and outputs for.
TILES void finish(const Dense& shape, const float* sums, int64_t rows, int64_t output, const float* bias, float* out) {
  const __mmask16 there = first(shape.outputs - output);
  const __m512 added = _mm512_maskz_loadu_ps(there, bias + output);
  for (int64_t row = 0; row < rows; ++row) {
    __m512 values = _mm512_add_ps(_mm512_load_ps(sums + row * kTile), added);
    if (shape.relu) values = _mm512_max_ps(values, _mm512_setzero_ps());
    _mm512_mask_storeu_ps(out + row * shape.outputs + output, there, values);
  }
}

}  // namespace

bool has_tiles() {
  static const bool found = ask_for_tiles();
  return found;
}

TILES void dense(const Dense& shape, const float* rows, int64_t count, const uint16_t* weights, const float* bias,
                 float* out, float* scratch) {
  const Cut cut(shape, count);
  const Configuration configuration(cut.height);
  const int64_t depths = shape.depths();
  float* sums = scratch;  // [blocks, tiles of rows, halves of the block]
  uint16_t* parts = reinterpret_cast<uint16_t*>(scratch + shape.blocks() * cut.tiles * 2 * kSums);
  const int64_t turn = cut.tiles * cut.apart, pairs = (cut.tiles + 1) / 2;
  Parts now{shape, cut, rows, count, 0, parts, 1};
  now.step();
  bool all_numbers = now.all_numbers;
  _tile_loadconfig(&configuration);
  while (now.depth < depths) {
    const int64_t steps = shape.blocks() * pairs * now.depths();
    Parts next{shape, cut, rows, count, now.depth + now.depths(), now.to == parts ? parts + turn : parts, steps};
    for (int64_t block = 0; block < shape.blocks(); ++block)
      for (int64_t tile = 0; tile < cut.tiles; tile += 2)
        (tile + 1 < cut.tiles ? multiply<2> : multiply<1>)(cut, now.depths(), now.to + tile * cut.apart,
                                                          weights + (block * depths + now.depth) * kStep,
                                                          sums + (block * cut.tiles + tile) * 2 * kSums,
                                                          now.depth == 0, next);
    all_numbers &= next.all_numbers;
    now = next;
  }
  _tile_release();
  for (int64_t output = 0; output < shape.outputs; output += kTile)
    for (int64_t tile = 0; tile < cut.tiles; ++tile) {
      const float* from = sums + ((output / kWide * cut.tiles + tile) * 2 + output / kTile % 2) * kSums;
      const int64_t row = tile * cut.height, taken = std::min(cut.height, count - row);
      finish(shape, from, taken, output, bias, out + row * shape.outputs);
    }
  if (all_numbers) return;
  for (int64_t row = 0; row < count; ++row, rows += shape.inputs, out += shape.outputs)
    if (!are_numbers(rows, shape.inputs)) multiply_plainly(shape, rows, weights, bias, out);
}

#else

bool has_tiles() { return false; }

void dense(const Dense& shape, const float* rows, int64_t count, const uint16_t* weights, const float* bias,
           float* out, float*) {
  for (int64_t row = 0; row < count; ++row)
    multiply_plainly(shape, rows + row * shape.inputs, weights, bias, out + row * shape.outputs);
}

#endif

}  // namespace leptonic::ops
