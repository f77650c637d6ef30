// Decoding on CPUs, in float32: the products of few rows with kernels, and attention of one token.
//
// XLA's CPU backend packs a kernel anew at each product, which for few rows is most of its time, and
// attends on one core. Here kernels come in panels, which are packed once for many tokens, and work
// is cut into tasks that XLA's own threads take one by one. What a row gives does not depend on the
// other rows, on threads or on where in the cache its columns lie: every sum has one order.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

// A vector register, and how many rows by two of them are summed in registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 6;
#else
constexpr int kLanes = 4, kRows = 12;
#endif
constexpr int kPanel = 2 * kLanes;
constexpr int kAhead = 16;       // columns that memory is asked for in advance
constexpr int kLinesAhead = 64;  // lines of a panel, likewise
constexpr int kTasks = 4;        // of a thread, so that one that is late leaves less to wait for

template <int N>
struct Vectors {
  typedef float Vector __attribute__((vector_size(N * sizeof(float))));
  typedef float Anywhere __attribute__((vector_size(N * sizeof(float)), aligned(sizeof(float))));
};
template <>
struct Vectors<1> {
  typedef float Vector;
  typedef float Anywhere;
};
template <int N>
using Vector = typename Vectors<N>::Vector;

template <int N>
inline Vector<N> load(const float* from) {
  return *reinterpret_cast<const typename Vectors<N>::Anywhere*>(from);
}

template <int N>
inline void store(float* to, Vector<N> values) {
  *reinterpret_cast<typename Vectors<N>::Anywhere*>(to) = values;
}

// Tasks of one call. A thread that comes when all are taken looks at no more than the counters.
template <class Run>
struct Tasks {
  Run run;
  int64_t count;
  std::atomic<int64_t> next{0}, done{0};

  Tasks(Run run, int64_t count) : run(run), count(count) {}

  void work() {
    for (int64_t task; (task = next.fetch_add(1)) < count;) {
      run(task);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

// Runs tasks of some items each, from a first one to before a last one, here and on the threads that
// are free; waits for those that another has begun.
template <class Run>
void run_tasks(ffi::ThreadPool& threads, int64_t items, Run run) {
  const int64_t workers = std::max<int64_t>(1, threads.num_threads());
  const int64_t share = std::max<int64_t>(1, items / (kTasks * workers));
  const int64_t count = (items + share - 1) / share, helpers = std::min(workers, count) - 1;
  const auto run_one = [=](int64_t task) {
    run(task * share, std::min(items, (task + 1) * share));
  };
  if (helpers < 1) {
    for (int64_t task = 0; task < count; ++task) run_one(task);
    return;
  }
  auto tasks = std::make_shared<Tasks<decltype(run_one)>>(run_one, count);
  for (int64_t i = 0; i < helpers; ++i) threads.Schedule([tasks] { tasks->work(); });
  tasks->work();
  for (int spins = 0; tasks->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

// Room that a thread keeps from task to task.
float* scratch(int64_t floats) {
  thread_local std::vector<float> room;
  if (static_cast<int64_t>(room.size()) < floats) room.resize(floats);
  return room.data();
}

// ---- Products ----

// R rows of `width` floats times a panel. At each of its lines memory is asked for `step` floats more of
// what is `next`.
template <int R>
void multiply(const float* rows, int64_t width, const float* panel, float* out, int64_t out_width,
              int64_t columns, const float* next, int64_t step) {
  Vector<kLanes> left[R] = {}, right[R] = {};
  for (int64_t k = 0; k < width; ++k) {
    const float* line = panel + k * kPanel;
    __builtin_prefetch(line + kLinesAhead * kPanel);
    __builtin_prefetch(line + kLinesAhead * kPanel + kLanes);
    __builtin_prefetch(next + k * step);
    const auto first = load<kLanes>(line), second = load<kLanes>(line + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float factor = rows[r * width + k];
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
void multiply_some(int64_t count, const float* rows, int64_t width, const float* panel, float* out,
                   int64_t out_width, int64_t columns, const float* next, int64_t step) {
  if constexpr (R > 0) {
    if (count == R) {
      return multiply<R>(rows, width, panel, out, out_width, columns, next, step);
    }
    multiply_some<R - 1>(count, rows, width, panel, out, out_width, columns, next, step);
  }
}

struct Kernel {
  const float* panels;  // [P, D, kPanel]
  float* out;           // [R, F]
  int64_t width;        // F
  int64_t first;        // panel, counted over all kernels

  const float* panel(int64_t number, int64_t depth) const {
    return panels + (number - first) * kPanel * depth;
  }
};

// Rows [R, D] times each of some kernels, which come in panels [P, D, kPanel]: [R, F] each.
ffi::Error products(ffi::ThreadPool threads, Floats rows, ffi::RemainingArgs kernels,
                    ffi::RemainingRets outs) {
  const int64_t count = rows.dimensions()[0], width = rows.dimensions()[1];
  const float* from = rows.typed_data();
  std::vector<Kernel> all;
  int64_t panels = 0;
  for (size_t i = 0; i < kernels.size(); ++i) {
    auto kernel = kernels.get<Floats>(i);
    auto out = outs.get<Floats>(i);
    if (!kernel || !out) return ffi::Error::InvalidArgument("products: arrays of float32, please");
    all.push_back({kernel->typed_data(), (*out)->typed_data(), (*out)->dimensions()[1], panels});
    panels += kernel->dimensions()[0];
  }
  // Blocks of rows as equal as can be: a last one of few would cost as much as a full one.
  const int64_t blocks = (count + kRows - 1) / kRows;
  // Memory gives a panel while all blocks are multiplied with the one before it, not with the first.
  const int64_t step = blocks > 1 ? (kPanel + blocks - 1) / blocks : 0;
  const auto kernel_of = [&](int64_t panel) {
    auto kernel = all.rbegin();
    while (kernel->first > panel) ++kernel;
    return kernel;
  };
  run_tasks(threads, panels, [=](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const auto kernel = kernel_of(panel);
      const int64_t column = (panel - kernel->first) * kPanel;
      const int64_t columns = std::min<int64_t>(kPanel, kernel->width - column);
      const int64_t after = std::min(panel + 1, panels - 1);
      const float* numbers = kernel->panel(panel, width);
      const float* next = kernel_of(after)->panel(after, width);
      for (int64_t block = 0, row = 0; block < blocks; ++block) {
        const int64_t some = (count - row + blocks - block - 1) / (blocks - block);
        multiply_some(some, from + row * width, width, numbers,
                      kernel->out + row * kernel->width + column, kernel->width, columns,
                      next + block * step * width, step);
        row += some;
      }
    }
  });
  return ffi::Error::Success();
}

// ---- Attention ----

// Of two vectors: sums of neighbours, those of the first before those of the second.
template <int N, int... I>
inline Vector<N> fold(Vector<N> a, Vector<N> b, std::integer_sequence<int, I...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
#else  // GCC before 12.
  typedef int32_t Places __attribute__((vector_size(N * sizeof(int32_t))));
  return __builtin_shuffle(a, b, Places{(2 * I)...}) + __builtin_shuffle(a, b, Places{(2 * I + 1)...});
#endif
}

// Of N vectors: the sum of each.
template <int N>
inline Vector<N> sums(Vector<N>* of) {
  if constexpr (N > 1) {
    for (int left = N; left > 1; left /= 2) {
      for (int i = 0; i < left / 2; ++i) {
        of[i] = fold<N>(of[2 * i], of[2 * i + 1], std::make_integer_sequence<int, N>());
      }
    }
  }
  return of[0];
}

// Vectors of one head, column after column. The first `same` of them are in another slot's copy too, and
// read from there: slots that begin with one prompt take turns, so that it is near by for all but one.
struct Columns {
  const float *own, *twin;
  int64_t same, count, head_dim;

  const float* at(int64_t column) const { return (column < same ? twin : own) + column * head_dim; }

  const float* unshared() const { return own + same * head_dim; }

  // What memory is asked for while a column is read: own columns ahead, then those that are `next`. They
  // are spread over all columns, or memory would rest while shared ones are read.
  const float* ahead(int64_t column, const float* next) const {
    const int64_t coming = kAhead + (column * pace() >> 16), unread = count - same;
    return coming < unread ? unshared() + coming * head_dim : next + (coming - unread) * head_dim;
  }

  int64_t pace() const { return ((count - same) << 16) / count; }
};

// Products of Q queries [Q, head_dim] with keys; N divides head_dim, Q divides N. What follows a query's
// last score up to a multiple of N is overwritten. `next` is what will be read after the keys, null if
// these have been read before.
template <int N, int Q>
void score(const float* queries, Columns keys, float* scores, int64_t stride, const float* next) {
  constexpr int kSome = N / Q;
  const int64_t head_dim = keys.head_dim;
  for (int64_t column = 0; column < keys.count; column += kSome) {
    const float* key[kSome];
    for (int i = 0; i < kSome; ++i) key[i] = keys.at(std::min(column + i, keys.count - 1));
    const float* ahead = next ? keys.ahead(column, next) : nullptr;
    Vector<N> partial[N] = {};
    for (int64_t h = 0; h < head_dim; h += N) {
      if (ahead) {
        for (int i = 0; i < kSome; ++i) __builtin_prefetch(ahead + h * kSome + i * N);
      }
      Vector<N> query[Q];
      for (int q = 0; q < Q; ++q) query[q] = load<N>(queries + q * head_dim + h);
#pragma GCC unroll 16
      for (int i = 0; i < kSome; ++i) {
        const auto part = load<N>(key[i] + h);
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) partial[q * kSome + i] += query[q] * part;
      }
    }
    const auto found = sums<N>(partial);
    for (int q = 0; q < Q; ++q) {
      std::memcpy(scores + q * stride + column, reinterpret_cast<const float*>(&found) + q * kSome,
                  kSome * sizeof(float));
    }
  }
}

// e to the power of numbers up to 0, to about the last bit; 1.6e-38 below -87.
inline Vector<kLanes> exponential(Vector<kLanes> x) {
  typedef int32_t Bits __attribute__((vector_size(kLanes * sizeof(int32_t))));
  const Vector<kLanes> least = Vector<kLanes>{} - 87.0f;
  x = x < least ? least : x;
  const float rounding = 12582912.0f;  // 1.5 * 2^23: a sum with it is a whole number
  const auto power = (x * 1.44269504f + rounding) - rounding;
  // The logarithm of 2 in two parts, of which the first has so few bits that its multiples are exact.
  const auto rest = (x - power * 0.693359375f) + power * 2.12194440e-4f;
  // Cephes' polynomial of what is left, at most half of that logarithm.
  auto sum = Vector<kLanes>{} + 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * (rest * rest) + rest + 1.0f;
  return sum * reinterpret_cast<Vector<kLanes>>((__builtin_convertvector(power, Bits) + 127) << 23);
}

// Turns scores into weights, the largest of them 1, and returns their sum. There is room up to a
// multiple of kLanes.
float weigh(float* scores, int64_t columns) {
  const int64_t room = (columns + kLanes - 1) / kLanes * kLanes;
  std::fill(scores + columns, scores + room, -std::numeric_limits<float>::infinity());
  auto most = load<kLanes>(scores);
  for (int64_t i = kLanes; i < room; i += kLanes) {
    const auto next = load<kLanes>(scores + i);
    most = next > most ? next : most;
  }
  float largest = most[0];
  for (int i = 1; i < kLanes; ++i) largest = std::max(largest, most[i]);
  Vector<kLanes> total = {};
  for (int64_t i = 0; i < room; i += kLanes) {
    const auto weight = exponential(load<kLanes>(scores + i) - largest);
    store<kLanes>(scores + i, weight);
    total += weight;  // A column that is none adds 1e-38 to a sum of 1 or more: nothing.
  }
  Vector<kLanes> lanes[kLanes] = {total};
  return sums<kLanes>(lanes)[0];
}

// Weighted means of values, V vectors of N floats of each from float h on, for G queries. `next` is what
// will be read after them.
template <int N, int G, int V>
void mix(const float* weights, int64_t stride, const float* totals, Columns values, int64_t h,
         float* out, const float* next) {
  Vector<N> sum[G][V] = {};
  for (int64_t column = 0; column < values.count; ++column) {
    Vector<N> value[V];
    const float *here = values.at(column) + h, *ahead = values.ahead(column, next) + h;
    for (int i = 0; i < V; ++i) __builtin_prefetch(ahead + i * N);
    for (int i = 0; i < V; ++i) value[i] = load<N>(here + i * N);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      const float weight = weights[g * stride + column];
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) sum[g][i] += value[i] * weight;
    }
  }
  for (int g = 0; g < G; ++g) {
    for (int i = 0; i < V; ++i) store<N>(out + g * values.head_dim + h + i * N, sum[g][i] / totals[g]);
  }
}

template <int N, int G>
void mix_head(const float* weights, int64_t stride, const float* totals, Columns values, float* out,
              const float* next) {
  constexpr int kWide = G > 4 ? 2 : 4;  // as many sums as there are registers for
  int64_t h = 0;
  for (; h + kWide * N <= values.head_dim; h += kWide * N) {
    mix<N, G, kWide>(weights, stride, totals, values, h, out, next);
  }
  for (; h < values.head_dim; h += N) mix<N, G, 1>(weights, stride, totals, values, h, out, next);
}

struct Scores {
  float scale, softcap;
};

// Attention of some queries [heads, head_dim] over the keys and values of the one head that they share.
// `next` are the keys that will be read after these.
template <int N>
void attend_head(const float* queries, int64_t heads, Columns keys, Columns values, Scores how,
                 float* out, const float* next) {
  const int64_t columns = keys.count, head_dim = keys.head_dim;
  const int64_t stride = (columns + kLanes - 1) / kLanes * kLanes;
  float* weights = scratch(heads * (stride + 1));
  float* totals = weights + heads * stride;
  for (int64_t head = 0; head < heads;) {
    constexpr int kFour = std::min(N, 4), kTwo = std::min(N, 2);
    const int64_t left = heads - head, some = left >= kFour ? kFour : left >= kTwo ? kTwo : 1;
    const auto scored = some == 4 ? score<N, kFour> : some == 2 ? score<N, kTwo> : score<N, 1>;
    scored(queries + head * head_dim, keys, weights + head * stride, stride,
           head == 0 ? values.unshared() : nullptr);
    head += some;
  }
  for (int64_t head = 0; head < heads; ++head) {
    float* scores = weights + head * stride;
    for (int64_t i = 0; i < columns; ++i) scores[i] *= how.scale;
    if (how.softcap > 0) {
      for (int64_t i = 0; i < columns; ++i) {
        scores[i] = how.softcap * std::tanh(scores[i] / how.softcap);
      }
    }
    totals[head] = weigh(scores, columns);
  }
  for (int64_t head = 0; head < heads;) {
    const int64_t left = heads - head, some = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const auto mixed = some == 8   ? mix_head<N, 8>
                       : some == 4 ? mix_head<N, 4>
                       : some == 2 ? mix_head<N, 2>
                                   : mix_head<N, 1>;
    mixed(weights + head * stride, stride, totals + head, values, out + head * head_dim, next);
    head += some;
  }
}

// A slot that attends to its last `reach` columns, of which the first `same` are read from the slot
// `twin`, where they begin at column `twin_first`.
struct Reader {
  int64_t slot, twin, reach, same, twin_first;
};

// One key head of it.
struct Pair {
  Reader reader;
  int64_t kv_head;
};

// The slots that attend to anything, those with one prompt after each other: the first of them is the
// twin of the others.
std::vector<Reader> find_readers(const int32_t* lengths, const int32_t* prompts,
                                 const int32_t* prompt_lengths, int64_t slots, int64_t end,
                                 int64_t window) {
  std::vector<Reader> all;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t length = std::min<int64_t>(lengths[slot], end);
    const int64_t reach = window > 0 ? std::min(length, window) : length;
    if (reach > 0) all.push_back({slot, slot, reach, 0, end - reach});
  }
  std::stable_sort(all.begin(), all.end(), [=](const Reader& a, const Reader& b) {
    return prompts[a.slot] < prompts[b.slot];
  });
  for (size_t i = 1; i < all.size(); ++i) {
    Reader& one = all[i];
    const int64_t twin = all[i - 1].twin;
    if (prompts[one.slot] != prompts[twin]) continue;
    // Columns of the prompt that the window has left behind.
    const int64_t lost = lengths[one.slot] - one.reach, twin_first = end - lengths[twin] + lost;
    // The newest column of either, which is written meanwhile, is not of the prompt.
    const int64_t shorter = std::min(lengths[one.slot], lengths[twin]);
    const int64_t same = std::min<int64_t>(prompt_lengths[one.slot], shorter - 1) - lost;
    one.twin = twin;
    if (same > 0 && twin_first >= 0) {
      one.same = same;
      one.twin_first = twin_first;
    }
  }
  return all;
}

// All key heads of readers: of those with one prompt one key head after the other.
std::vector<Pair> in_turns(const std::vector<Reader>& readers, int64_t kv_heads) {
  std::vector<Pair> pairs;
  for (size_t first = 0, last = 0; first < readers.size(); first = last) {
    while (last < readers.size() && readers[last].twin == readers[first].twin) ++last;
    for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
      for (size_t i = first; i < last; ++i) pairs.push_back({readers[i], kv_head});
    }
  }
  return pairs;
}

// Attention of one token of each slot, over a cache of which all slots write the same column. Slots of
// one prompt hold the same numbers in as many columns as it has, their first ones.
ffi::Error attention(ffi::ThreadPool threads, Floats query, Floats new_key, Floats new_value,
                     Floats old_keys, Floats old_values, Ints column, Ints length, Ints prompt,
                     Ints prompt_length, Ints first_head, ffi::Result<Floats> result,
                     ffi::Result<Floats> new_keys, ffi::Result<Floats> new_values, int64_t group,
                     int64_t window, float scale, float softcap) {
  const auto sizes = old_keys.dimensions();
  const int64_t kv_heads = sizes[1], columns = sizes[2], head_dim = sizes[3];
  const int64_t heads = query.dimensions()[1], end = column.typed_data()[0] + 1;
  const int64_t before = first_head.typed_data()[0];
  const float *queries = query.typed_data(), *newest_keys = new_key.typed_data(),
              *newest_values = new_value.typed_data();
  float *keys = new_keys->typed_data(), *values = new_values->typed_data();
  if (end < 1 || end > columns) {
    return ffi::Error::InvalidArgument("attention: a column that the cache does not have");
  }
  if (keys != old_keys.typed_data() || values != old_values.typed_data()) {
    return ffi::Error::InvalidArgument("attention: the cache is not where it was");
  }
  float* outs = result->typed_data();
  const auto attend = head_dim % kLanes == 0 ? attend_head<kLanes>
                      : head_dim % 4 == 0    ? attend_head<4>
                                             : attend_head<1>;
  const auto readers = find_readers(length.typed_data(), prompt.typed_data(),
                                    prompt_length.typed_data(), sizes[0], end, window);
  const auto pairs = in_turns(readers, kv_heads);
  const int64_t count = pairs.size();
  if (count < sizes[0] * kv_heads) std::fill_n(outs, result->element_count(), 0.0f);
  const auto columns_of = [=](const float* cache, const Pair& pair) {
    const auto& one = pair.reader;
    const auto at = [=](int64_t slot, int64_t column) {
      return cache + ((slot * kv_heads + pair.kv_head) * columns + column) * head_dim;
    };
    return Columns{at(one.slot, end - one.reach), at(one.twin, one.twin_first), one.same, one.reach,
                   head_dim};
  };
  run_tasks(threads, count, [=, &pairs](int64_t begin, int64_t last) {
    for (int64_t i = begin; i < last; ++i) {
      const auto& pair = pairs[i];
      const int64_t from = (pair.reader.slot * kv_heads + pair.kv_head) * head_dim;
      const int64_t to = from * columns + (end - 1) * head_dim;
      std::copy_n(newest_keys + from, head_dim, keys + to);
      std::copy_n(newest_values + from, head_dim, values + to);
      // The query heads of this key head, among those that are here.
      const int64_t first = std::max<int64_t>(0, pair.kv_head * group - before);
      const int64_t some = std::min(heads, (pair.kv_head + 1) * group - before) - first;
      if (some <= 0) continue;
      const int64_t place = (pair.reader.slot * heads + first) * head_dim;
      const auto next = columns_of(keys, pairs[std::min(i + 1, count - 1)]);
      attend(queries + place, some, columns_of(keys, pair), columns_of(values, pair), {scale, softcap},
             outs + place, next.unshared());
    }
  });
  return ffi::Error::Success();
}

}  // namespace

extern "C" {
// Columns of a panel.
int flowrl_panel() { return kPanel; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(flowrl_products, products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .RemainingArgs()
                                  .RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(flowrl_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap"));
}
