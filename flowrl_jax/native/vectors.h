// Vector registers, whatever their length: what GCC and clang make of this processor's.

#pragma once

#include <cstdint>
#include <utility>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

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

}  // namespace
