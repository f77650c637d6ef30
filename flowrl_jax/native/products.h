// Products of few rows with kernels in panels: columns of them that fit in two registers, packed once for
// many tokens, one line after the other.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tasks.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// How many rows by two registers are summed in registers.
#if defined(__AVX__) && !defined(__AVX512F__)
constexpr int kRows = 6;
#else
constexpr int kRows = 12;
#endif
constexpr int kPanel = 2 * kLanes;
constexpr int kLinesAhead = 64;  // that memory is asked for in advance

// What a row has in a panel's columns. A kernel's last panel may have fewer than there is room for.
struct Line {
  Vector<kLanes> left, right;
};

Line load_line(const float* from, int64_t columns) {
  if (columns == kPanel) return {load<kLanes>(from), load<kLanes>(from + kLanes)};
  float whole[kPanel] = {};
  std::memcpy(whole, from, columns * sizeof(float));
  return {load<kLanes>(whole), load<kLanes>(whole + kLanes)};
}

void store_line(float* to, Line row, int64_t columns) {
  if (columns == kPanel) {
    store<kLanes>(to, row.left);
    return store<kLanes>(to + kLanes, row.right);
  }
  float whole[kPanel];
  store<kLanes>(whole, row.left);
  store<kLanes>(whole + kLanes, row.right);
  std::memcpy(to, whole, columns * sizeof(float));
}

// A panel of a kernel, and where its columns of the product go.
struct Panel {
  const float* lines;  // [depth, kPanel]
  float* out;          // [count, out_width], from the first of the columns on
  int64_t out_width, columns;
  const float* onto;  // what is added to them, row by row `onto_width` floats on; null for nothing
  int64_t onto_width;

  void finish(int64_t row, Line sums) const {
    if (onto) {
      const Line more = load_line(onto + row * onto_width, columns);
      sums = {sums.left + more.left, sums.right + more.right};
    }
    store_line(out + row * out_width, sums, columns);
  }
};

struct Rows {
  const float* numbers;  // [count, depth]
  int64_t count, depth;
};

// R rows, from `first` on, times a panel. At each of its lines memory is asked for `step` floats more of
// what is `next`.
template <int R>
void multiply(const Rows& rows, int64_t first, const Panel& panel, const float* next, int64_t step) {
  const float* factors = rows.numbers + first * rows.depth;
  Vector<kLanes> left[R] = {}, right[R] = {};
  for (int64_t k = 0; k < rows.depth; ++k) {
    const float* line = panel.lines + k * kPanel;
    __builtin_prefetch(line + kLinesAhead * kPanel);
    __builtin_prefetch(line + kLinesAhead * kPanel + kLanes);
    __builtin_prefetch(next + k * step);
    const auto here = load<kLanes>(line), beside = load<kLanes>(line + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float factor = factors[r * rows.depth + k];
      left[r] += here * factor;
      right[r] += beside * factor;
    }
  }
  for (int r = 0; r < R; ++r) panel.finish(first + r, {left[r], right[r]});
}

template <int R = kRows>
void multiply_some(int64_t count, const Rows& rows, int64_t first, const Panel& panel,
                   const float* next, int64_t step) {
  if constexpr (R > 0) {
    if (count == R) return multiply<R>(rows, first, panel, next, step);
    multiply_some<R - 1>(count, rows, first, panel, next, step);
  }
}

// All rows times a panel. `next` are the lines that will be read after it.
void multiply_rows(const Rows& rows, const Panel& panel, const float* next) {
  // Blocks of rows as equal as can be: a last one of few would cost as much as a full one.
  const int64_t blocks = (rows.count + kRows - 1) / kRows;
  // Memory gives a panel while all blocks are multiplied with the one before it, not with the first.
  const int64_t step = blocks > 1 ? (kPanel + blocks - 1) / blocks : 0;
  for (int64_t block = 0, row = 0; block < blocks; ++block) {
    const int64_t some = (rows.count - row + blocks - block - 1) / (blocks - block);
    multiply_some(some, rows, row, panel, next + block * step * rows.depth, step);
    row += some;
  }
}

using Floats = ffi::Buffer<ffi::F32>;

// Divides a row by its root mean square, and scales it.
struct Norm {
  const float* scale;  // [depth]
  float epsilon, offset;

  void operator()(const float* row, int64_t depth, float* out) const {
    Vector<kLanes> some = {};
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
      const auto numbers = load<kLanes>(row + k);
      some += numbers * numbers;
    }
    Vector<kLanes> lanes[kLanes] = {some};
    float squares = sums<kLanes>(lanes)[0];
    for (; k < depth; ++k) squares += row[k] * row[k];
    const float factor = 1.0f / std::sqrt(squares / depth + epsilon);
    for (k = 0; k < depth; ++k) out[k] = row[k] * factor * (offset + scale[k]);
  }
};

// Rows [R, D], normalised if there is a scale [D] and not [0] for it.
Rows rows_of(ffi::ThreadPool& threads, const Floats& numbers, const Floats& scale, float epsilon,
             float offset) {
  const Rows rows{numbers.typed_data(), numbers.dimensions()[0], numbers.dimensions()[1]};
  if (scale.element_count() == 0) return rows;
  const Norm norm{scale.typed_data(), epsilon, offset};
  float* out = scratch<Room::kNormalised>(rows.count * rows.depth);
  constexpr int64_t kSome = 16;  // rows of an item
  for_each_item(threads, (rows.count + kSome - 1) / kSome, [=](int64_t item, int64_t) {
    for (int64_t row = item * kSome; row < std::min(rows.count, (item + 1) * kSome); ++row) {
      norm(rows.numbers + row * rows.depth, rows.depth, out + row * rows.depth);
    }
  });
  return {out, rows.count, rows.depth};
}

// Adds those of a kernel [P, D, kPanel], whose product is [R, F] and is added to so many rows [F]: one for
// each of its own, one for all of them, or none.
void add_panels(const Floats& kernel, const float* onto, int64_t rows, Floats& out,
                std::vector<Panel>& panels) {
  const int64_t depth = kernel.dimensions()[1], width = out.dimensions()[1];
  for (int64_t panel = 0; panel < kernel.dimensions()[0]; ++panel) {
    const int64_t column = panel * kPanel;
    panels.push_back({kernel.typed_data() + column * depth, out.typed_data() + column, width,
                      std::min<int64_t>(kPanel, width - column),
                      rows > 0 ? onto + column : nullptr, rows > 1 ? width : 0});
  }
}

// Rows [R, D], normalised if there is a scale, times each of some kernels, which come in panels
// [P, D, kPanel] and with what their product is added to: [R, F] each.
ffi::Error products(ffi::ThreadPool threads, Floats numbers, Floats scale, ffi::RemainingArgs rest,
                    ffi::RemainingRets outs, float epsilon, float offset) {
  std::vector<Panel> panels;
  for (size_t i = 0; i < outs.size(); ++i) {
    auto kernel = rest.get<Floats>(2 * i), onto = rest.get<Floats>(2 * i + 1);
    auto out = outs.get<Floats>(i);
    if (!kernel || !onto || !out) {
      return ffi::Error::InvalidArgument("products: arrays of float32, please");
    }
    add_panels(*kernel, onto->typed_data(), onto->dimensions()[0], **out, panels);
  }
  const Rows rows = rows_of(threads, numbers, scale, epsilon, offset);
  for_each_item(threads, panels.size(), [&](int64_t item, int64_t next) {
    multiply_rows(rows, panels[item], panels[next].lines);
  });
  return ffi::Error::Success();
}

// x * sigmoid(slope * x + cubic * x^3) of finite numbers: SiLU, or GELU by its tangent.
struct Gate {
  float slope, cubic;

  Vector<kLanes> operator()(Vector<kLanes> x) const {
    const auto of = slope * x + cubic * x * x * x;
    const Vector<kLanes> none = {}, one = none + 1.0f, below = of < 0.0f ? of : -of;
    const auto power = below < -87.0f ? none : exponential(below);  // x may be as large as can be
    return x * (of < 0.0f ? power : one) / (one + power);
  }
};

// Multiplies what is in a panel's place by the gates [count, kPanel] of these rows.
void apply_gates(const float* gates, int64_t count, Gate gate, const Panel& panel) {
  for (int64_t row = 0; row < count; ++row, gates += kPanel) {
    float* out = panel.out + row * panel.out_width;
    const Line here = load_line(out, panel.columns);
    store_line(out,
              {here.left * gate(load<kLanes>(gates)), here.right * gate(load<kLanes>(gates + kLanes))},
              panel.columns);
  }
}

// gate(rows x gate kernel) * (rows x up kernel): [R, F], of rows [R, D] that are normalised first if there
// is a scale. Kernels come in panels.
ffi::Error gated_products(ffi::ThreadPool threads, Floats numbers, Floats scale, Floats gate_kernel,
                          Floats up_kernel, ffi::Result<Floats> out, float epsilon, float offset,
                          float slope, float cubic) {
  std::vector<Panel> ups;
  add_panels(up_kernel, nullptr, 0, *out, ups);
  const Rows rows = rows_of(threads, numbers, scale, epsilon, offset);
  const auto gate_lines = [&](int64_t item) {
    return gate_kernel.typed_data() + item * rows.depth * kPanel;
  };
  for_each_item(threads, ups.size(), [&](int64_t item, int64_t next) {
    float* gates = scratch<Room::kItem>(rows.count * kPanel);
    const Panel& up = ups[item];
    multiply_rows(rows, {gate_lines(item), gates, kPanel, kPanel, nullptr, 0}, up.lines);
    multiply_rows(rows, up, gate_lines(next));
    apply_gates(gates, rows.count, {slope, cubic}, up);
  });
  return ffi::Error::Success();
}

}  // namespace
