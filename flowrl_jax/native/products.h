// Products of few rows with kernels in panels: columns of them that fit in two registers, packed once for
// many tokens, one line after the other.

#pragma once

#include <algorithm>
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

// R rows of `depth` floats times a panel. At each of its lines memory is asked for `step` floats more of
// what is `next`.
template <int R>
void multiply(const float* rows, int64_t depth, const float* panel, float* out, int64_t out_width,
              int64_t columns, const float* next, int64_t step) {
  Vector<kLanes> left[R] = {}, right[R] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const float* line = panel + k * kPanel;
    __builtin_prefetch(line + kLinesAhead * kPanel);
    __builtin_prefetch(line + kLinesAhead * kPanel + kLanes);
    __builtin_prefetch(next + k * step);
    const auto first = load<kLanes>(line), second = load<kLanes>(line + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float factor = rows[r * depth + k];
      left[r] += first * factor;
      right[r] += second * factor;
    }
  }
  for (int r = 0; r < R; ++r) {
    float whole[kPanel];
    store<kLanes>(whole, left[r]);
    store<kLanes>(whole + kLanes, right[r]);
    std::memcpy(out + r * out_width, whole, columns * sizeof(float));
  }
}

template <int R = kRows>
void multiply_some(int64_t count, const float* rows, int64_t depth, const float* panel, float* out,
                   int64_t out_width, int64_t columns, const float* next, int64_t step) {
  if constexpr (R > 0) {
    if (count == R) {
      return multiply<R>(rows, depth, panel, out, out_width, columns, next, step);
    }
    multiply_some<R - 1>(count, rows, depth, panel, out, out_width, columns, next, step);
  }
}

struct Rows {
  const float* numbers;  // [count, depth]
  int64_t count, depth;
};

// A panel of a kernel, and where its columns of the product go.
struct Panel {
  const float* lines;  // [depth, kPanel]
  float* out;          // [count, out_width], from the first of the columns on
  int64_t out_width, columns;
};

// All rows times a panel. `next` are the lines that will be read after it.
void multiply_rows(const Rows& rows, const Panel& panel, const float* next) {
  // Blocks of rows as equal as can be: a last one of few would cost as much as a full one.
  const int64_t blocks = (rows.count + kRows - 1) / kRows;
  // Memory gives a panel while all blocks are multiplied with the one before it, not with the first.
  const int64_t step = blocks > 1 ? (kPanel + blocks - 1) / blocks : 0;
  for (int64_t block = 0, row = 0; block < blocks; ++block) {
    const int64_t some = (rows.count - row + blocks - block - 1) / (blocks - block);
    multiply_some(some, rows.numbers + row * rows.depth, rows.depth, panel.lines,
                  panel.out + row * panel.out_width, panel.out_width, panel.columns,
                  next + block * step * rows.depth, step);
    row += some;
  }
}

using Floats = ffi::Buffer<ffi::F32>;

Rows rows_of(const Floats& rows) {
  return {rows.typed_data(), rows.dimensions()[0], rows.dimensions()[1]};
}

// Adds those of a kernel [P, D, kPanel], whose product is [R, F].
void add_panels(const Floats& kernel, Floats& out, std::vector<Panel>& panels) {
  const int64_t depth = kernel.dimensions()[1], width = out.dimensions()[1];
  for (int64_t panel = 0; panel < kernel.dimensions()[0]; ++panel) {
    const int64_t column = panel * kPanel;
    panels.push_back({kernel.typed_data() + column * depth, out.typed_data() + column, width,
                      std::min<int64_t>(kPanel, width - column)});
  }
}

// Rows [R, D] times each of some kernels, which come in panels [P, D, kPanel]: [R, F] each.
ffi::Error products(ffi::ThreadPool threads, Floats numbers, ffi::RemainingArgs kernels,
                    ffi::RemainingRets outs) {
  std::vector<Panel> panels;
  for (size_t i = 0; i < kernels.size(); ++i) {
    auto kernel = kernels.get<Floats>(i);
    auto out = outs.get<Floats>(i);
    if (!kernel || !out) return ffi::Error::InvalidArgument("products: arrays of float32, please");
    add_panels(*kernel, **out, panels);
  }
  const Rows rows = rows_of(numbers);
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
  for (int64_t row = 0; row < count; ++row) {
    float whole[kPanel] = {}, *out = panel.out + row * panel.out_width;
    std::memcpy(whole, out, panel.columns * sizeof(float));
    for (int i = 0; i < kPanel; i += kLanes) {
      const auto opened = gate(load<kLanes>(gates + row * kPanel + i));
      store<kLanes>(whole + i, opened * load<kLanes>(whole + i));
    }
    std::memcpy(out, whole, panel.columns * sizeof(float));
  }
}

// gate(rows x gate kernel) * (rows x up kernel): [R, F]. Kernels come in panels.
ffi::Error gated_products(ffi::ThreadPool threads, Floats numbers, Floats gate_kernel,
                          Floats up_kernel, ffi::Result<Floats> out, float slope, float cubic) {
  std::vector<Panel> ups;
  add_panels(up_kernel, *out, ups);
  const Rows rows = rows_of(numbers);
  const auto gate_lines = [&](int64_t item) {
    return gate_kernel.typed_data() + item * rows.depth * kPanel;
  };
  for_each_item(threads, ups.size(), [&](int64_t item, int64_t next) {
    float* gates = scratch(rows.count * kPanel);
    const Panel& up = ups[item];
    multiply_rows(rows, {gate_lines(item), gates, kPanel, kPanel}, up.lines);
    multiply_rows(rows, up, gate_lines(next));
    apply_gates(gates, rows.count, {slope, cubic}, up);
  });
  return ffi::Error::Success();
}

}  // namespace
