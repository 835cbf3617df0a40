// The kernel for vectors of LANES floats, TILE pixels of two vectors at a time. conv_pool.cpp includes it
// once for each instruction set, in a namespace of its own; nothing here may instantiate what another
// file might share.

typedef float Lanes __attribute__((vector_size(LANES * 4)));
typedef float Anywhere __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Order __attribute__((vector_size(LANES * 4)));

inline Lanes load(const float* at) { return *reinterpret_cast<const Anywhere*>(at); }
inline void store(float* at, Lanes lanes) { *reinterpret_cast<Anywhere*>(at) = lanes; }
inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

// `width` pixels of `vectors` * LANES channels, written `pitch` apart.
template <int width, int vectors>
void tile(const Plan& plan, const float* at, const float* weights, float* out) {
  const int64_t pitch = plan.geometry.pitch();
  Lanes sums[width][vectors] = {};
  for (int32_t tap : plan.taps) {
    Lanes factors[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) factors[v] = load(weights + v * LANES);
#pragma GCC unroll 16
    for (int x = 0; x < width; ++x)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[x][v] += factors[v] * at[tap + x];
    weights += pitch;
  }
#pragma GCC unroll 16
  for (int x = 0; x < width; ++x)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(out + x * pitch + v * LANES, sums[x][v]);
}

using Tile = void (*)(const Plan&, const float*, const float*, float*);

template <int vectors, int... widths>
Tile tile_of(int64_t width, std::integer_sequence<int, widths...>) {
  static constexpr Tile known[] = {tile<widths + 1, vectors>...};
  return known[width - 1];
}

// One row of the convolution: [conv_width, pitch]. Tiles are of one width; the last overlaps.
inline void convolve(const Plan& plan, const float* row, const float* weights, float* out) {
  const int64_t pitch = plan.geometry.pitch();
  const int64_t tiles = (plan.conv_width + TILE - 1) / TILE;
  const int64_t width = (plan.conv_width + tiles - 1) / tiles;
  int64_t channel = 0;
  while (channel < pitch) {
    const bool pair = channel + 2 * LANES <= pitch;
    const auto widths = std::make_integer_sequence<int, TILE>{};
    const Tile run = pair ? tile_of<2>(width, widths) : tile_of<1>(width, widths);
    for (int64_t x = 0; x < plan.conv_width; x += width) {
      const int64_t from = x + width > plan.conv_width ? plan.conv_width - width : x;
      run(plan, row + from, weights + channel, out + from * pitch + channel);
    }
    channel += pair ? 2 * LANES : LANES;
  }
}

// One row of the output: [width, pitch], from rows of the convolution. Sizes of 0 are not known before.
template <int rows, int columns>
void pool(const Plan& plan, const float* const* from, const float* bias, float* out) {
  const Geometry& geometry = plan.geometry;
  const int64_t pitch = geometry.pitch(), stride = geometry.pool_x.stride * pitch;
  const int64_t down = rows ? rows : geometry.pool_y.size, across = columns ? columns : geometry.pool_x.size;
  for (int64_t channel = 0; channel < pitch; channel += LANES) {
    const Lanes added = load(bias + channel);
    for (int64_t x = 0; x < plan.width; ++x) {
      Lanes most = load(from[0] + x * stride + channel);
#pragma GCC unroll 4
      for (int64_t y = 0; y < down; ++y)
#pragma GCC unroll 4
        for (int64_t i = 0; i < across; ++i)
          if (y || i) most = larger(most, load(from[y] + x * stride + i * pitch + channel));
      most += added;
      store(out + x * pitch + channel, geometry.relu ? larger(most, Lanes{}) : most);
    }
  }
}

using Pool = void (*)(const Plan&, const float* const*, const float*, float*);

inline Pool pool_of(const Geometry& geometry) {
  const int64_t down = geometry.pool_y.size, across = geometry.pool_x.size;
  if (down == 2 && across == 2) return pool<2, 2>;
  if (down == 3 && across == 3) return pool<3, 3>;
  return pool<0, 0>;
}

// Rows become columns: in each step blocks of `step` lanes change places across the diagonal.
template <int step>
inline void turn(Lanes (&lines)[LANES]) {
  Order kept = {}, moved = {};
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    kept[i] = i & step ? LANES + i - step : i;
    moved[i] = i & step ? LANES + i : i + step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    if (i & step) continue;
    const Lanes a = lines[i], b = lines[i + step];
    lines[i] = __builtin_shuffle(a, b, kept);
    lines[i + step] = __builtin_shuffle(a, b, moved);
  }
  if constexpr (step > 1) turn<step / 2>(lines);
}

// [pixels, pitch] -> [channels, pixels], the channels `apart`. The last block of pixels overlaps; of fewer
// than LANES as many are read all the same. The empty asm keeps one address that moves on: GCC would work
// out LANES of them first, and spill them (1.3 instead of 1.1 us an image of 32 channels of 13x13).
inline void transpose(const Plan& plan, const float* from, int64_t pixels, float* out, int64_t apart) {
  const int64_t pitch = plan.geometry.pitch(), channels = plan.geometry.channels;
  for (int64_t next = 0; next < pixels; next += LANES) {
    const int64_t last = pixels - LANES, pixel = next > last && last > 0 ? last : next;
    for (int64_t channel = 0; channel < channels; channel += LANES) {
      Lanes lines[LANES];
      const float* at = from + pixel * pitch + channel;
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i, at += pitch) {
        __asm__("" : "+r"(at));
        lines[i] = load(at);
      }
      turn<LANES / 2>(lines);
      float* to = out + channel * apart + pixel;
      if (last >= 0 && channel + LANES <= channels) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i, to += apart) {
          __asm__("" : "+r"(to));
          store(to, lines[i]);
        }
        continue;
      }
      const int64_t taken = last < 0 ? pixels : LANES;
      for (int i = 0; i < LANES && channel + i < channels; ++i)
        for (int64_t x = 0; x < taken; ++x) to[i * apart + x] = lines[i][x];
    }
  }
}

// Into padded rows, columns by their place in the stride.
inline void spread(const Plan& plan, const float* image, float* to) {
  const Window& across = plan.geometry.conv_x;
  for (int64_t channel = 0; channel < plan.images.channels; ++channel)
    for (int64_t y = 0; y < plan.images.height; ++y, image += plan.images.width) {
      float* line = to + channel * plan.plane + (y + plan.geometry.conv_y.before) * plan.line;
      if (across.stride == 1) {
        __builtin_memcpy(line + across.before, image, static_cast<size_t>(plan.images.width) * sizeof(float));
        continue;
      }
      for (int64_t phase = 0; phase < across.stride; ++phase) {
        int64_t x = (phase - across.before) % across.stride;
        if (x < 0) x += across.stride;
        float* place = line + phase * plan.columns + (x + across.before) / across.stride;
        for (; x < plan.images.width; x += across.stride) *place++ = image[x];
      }
    }
}

void conv_pool(const Plan& plan, const float* weights, const float* bias, float* out, float* scratch) {
  const Geometry& geometry = plan.geometry;
  const Window& down = geometry.pool_y;
  const int64_t pitch = geometry.pitch(), wide = plan.width * pitch, size = plan.height * plan.width;
  const int64_t ringed = plan.pool_width() * pitch, before = geometry.pool_x.before * pitch;
  const Pool pooled = pool_of(geometry);
  const float* from[kPoolMax];
  float* nothing = scratch;  // a row outside of the image
  float* ring = nothing + ringed;
  float* rows = ring + down.size * ringed;
  float* padded = rows + plan.kept * wide + LANES * pitch;
  for (float* at = nothing; at < rows; ++at) *at = -__builtin_inff();
  __builtin_memset(padded, 0, static_cast<size_t>(plan.images.channels * plan.plane) * sizeof(float));
  const float* image = plan.images.data;
  for (int64_t one = 0; one < plan.images.count; ++one, out += geometry.channels * size) {
    spread(plan, image, padded);
    image += plan.images.channels * plan.images.height * plan.images.width;
    int64_t made = 0, gathered = 0;
    for (int64_t y = 0; y < plan.height; ++y) {
      const int64_t top = y * down.stride - down.before;
      for (int64_t i = 0; i < down.size; ++i) {
        float* row = top + i < 0 || top + i >= plan.conv_height ? nothing : ring + (top + i) % down.size * ringed;
        from[i] = row;
        if (row == nothing || top + i < made) continue;
        made = top + i + 1;
        convolve(plan, padded + (top + i) * geometry.conv_y.stride * plan.line, weights, row + before);
      }
      if (geometry.channels_last) {
        pooled(plan, from, bias, out + y * wide);
        continue;
      }
      pooled(plan, from, bias, rows + gathered++ * wide);
      if (gathered < plan.kept && y + 1 < plan.height) continue;
      transpose(plan, rows, gathered * plan.width, out + (y + 1 - gathered) * plan.width, size);
      gathered = 0;
    }
  }
}
