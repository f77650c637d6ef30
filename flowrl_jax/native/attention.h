// Attention of one token of each slot over a cache of keys and values.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "tasks.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

constexpr int kAhead = 16;  // columns that memory is asked for in advance

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

// By which the heads of a token are turned: the sines and cosines of its position, [half] each. Elements
// from 2 * half on stay as they are.
struct Rotation {
  const float *sines, *cosines;
  int64_t half;

  void turn(const float* head, int64_t head_dim, float* out) const {
    for (int64_t i = 0; i < half; ++i) {
      const float first = head[i], second = head[half + i];
      out[i] = first * cosines[i] - second * sines[i];
      out[half + i] = second * cosines[i] + first * sines[i];
    }
    std::copy(head + 2 * half, head + head_dim, out + 2 * half);
  }
};

// Attention of some queries [heads, head_dim], to be turned, over the keys and values of the one head that
// they share. `next` are the keys that will be read after these.
template <int N>
void attend_head(const float* unturned, int64_t heads, Rotation rotation, Columns keys, Columns values,
                 Scores how, float* out, const float* next) {
  const int64_t columns = keys.count, head_dim = keys.head_dim;
  const int64_t stride = (columns + kLanes - 1) / kLanes * kLanes;
  float* weights = scratch<Room::kItem>(heads * (stride + head_dim + 1));
  float *queries = weights + heads * stride, *totals = queries + heads * head_dim;
  for (int64_t head = 0; head < heads; ++head) {
    rotation.turn(unturned + head * head_dim, head_dim, queries + head * head_dim);
  }
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
                     Ints prompt_length, Floats sines, Floats cosines, Ints first_head,
                     ffi::Result<Floats> result, ffi::Result<Floats> new_keys,
                     ffi::Result<Floats> new_values, int64_t group, int64_t window, float scale,
                     float softcap) {
  const auto sizes = old_keys.dimensions();
  const int64_t kv_heads = sizes[1], columns = sizes[2], head_dim = sizes[3];
  const int64_t heads = query.dimensions()[1], end = column.typed_data()[0] + 1;
  const int64_t before = first_head.typed_data()[0];
  const int64_t half = sines.dimensions()[1];
  const float *all_sines = sines.typed_data(), *all_cosines = cosines.typed_data();
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
  for_each_item(threads, count, [=, &pairs](int64_t item, int64_t after) {
    const auto& pair = pairs[item];
    const int64_t from = (pair.reader.slot * kv_heads + pair.kv_head) * head_dim;
    const int64_t to = from * columns + (end - 1) * head_dim;
    const Rotation rotation{all_sines + pair.reader.slot * half, all_cosines + pair.reader.slot * half,
                            half};
    rotation.turn(newest_keys + from, head_dim, keys + to);
    std::copy_n(newest_values + from, head_dim, values + to);
    // The query heads of this key head, among those that are here.
    const int64_t first = std::max<int64_t>(0, pair.kv_head * group - before);
    const int64_t some = std::min(heads, (pair.kv_head + 1) * group - before) - first;
    if (some <= 0) return;
    const int64_t place = (pair.reader.slot * heads + first) * head_dim;
    const auto next = columns_of(keys, pairs[after]);
    attend(queries + place, some, rotation, columns_of(keys, pair), columns_of(values, pair), {scale, softcap},
           outs + place, next.unshared());
  });
  return ffi::Error::Success();
}

}  // namespace
