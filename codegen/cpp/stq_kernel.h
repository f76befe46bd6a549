// Run-time library of the generated CPU kernels: 16 lanes of float32 or int32, the packed
// layout, the random counter. Portable through GCC and Clang vector extensions; AVX-512 and AVX2
// get their own instruction where the compiler would not find it. Every operation is one IEEE
// operation (built with -ffp-contract=off), so results don't depend on the instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define STQ_INLINE static inline __attribute__((always_inline))

namespace stq {

constexpr int kLanes = 16;
constexpr int kPlanes = 8;
constexpr int kBlock = kLanes * kPlanes;
constexpr int kTile = 8;  // blocks that go through a phase together; what crosses fits the L1 cache

typedef float f32v __attribute__((vector_size(64)));
typedef int32_t i32v __attribute__((vector_size(64)));
typedef uint32_t u32v __attribute__((vector_size(64)));
typedef uint8_t u8v __attribute__((vector_size(16)));
typedef uint16_t u16v __attribute__((vector_size(32)));

// Broadcasts.
STQ_INLINE f32v all(float x) { return f32v{} + x; }
STQ_INLINE i32v all(int x) { return i32v{} + x; }
STQ_INLINE i32v all(bool x) { return i32v{} - static_cast<int>(x); }
STQ_INLINE f32v all(f32v x) { return x; }
STQ_INLINE i32v all(i32v x) { return x; }

// Bits.
STQ_INLINE i32v bits_of(f32v x) { return reinterpret_cast<i32v>(x); }
STQ_INLINE f32v from_bits(i32v x) { return reinterpret_cast<f32v>(x); }
STQ_INLINE int bits_of(float x) { int r; std::memcpy(&r, &x, 4); return r; }
STQ_INLINE float from_bits(int x) { float r; std::memcpy(&r, &x, 4); return r; }
STQ_INLINE f32v to_float(i32v x) { return __builtin_convertvector(x, f32v); }
STQ_INLINE float to_float(int x) { return static_cast<float>(x); }

// Lane by lane, for what has no vector form in the language.
template <typename F> STQ_INLINE f32v lanes(F f) {
  f32v r;
  for (int i = 0; i < kLanes; ++i) r[i] = f(i);
  return r;
}

// Selection and logic; vector masks are 0 or -1 in each lane.
STQ_INLINE f32v select(i32v c, f32v a, f32v b) { return c ? a : b; }
STQ_INLINE i32v select(i32v c, i32v a, i32v b) { return c ? a : b; }
template <typename T> STQ_INLINE T select(bool c, T a, T b) { return c ? a : b; }
STQ_INLINE i32v logical_not(i32v c) { return ~c; }
STQ_INLINE bool logical_not(bool c) { return !c; }

// Arithmetic with the same name for double, float and vectors.
STQ_INLINE double fma(double a, double b, double c) { return std::fma(a, b, c); }
STQ_INLINE float fma(float a, float b, float c) { return std::fmaf(a, b, c); }
STQ_INLINE double sqrt(double x) { return std::sqrt(x); }
STQ_INLINE float sqrt(float x) { return std::sqrt(x); }
STQ_INLINE double abs(double x) { return std::fabs(x); }
STQ_INLINE float abs(float x) { return std::fabs(x); }
STQ_INLINE f32v abs(f32v x) { return from_bits(bits_of(x) & 0x7fffffff); }
STQ_INLINE double copysign(double a, double b) { return std::copysign(a, b); }
STQ_INLINE f32v copysign(f32v a, f32v b) { return from_bits((bits_of(a) & 0x7fffffff) | (bits_of(b) & INT32_MIN)); }
STQ_INLINE double floor(double x) { return std::floor(x); }
STQ_INLINE float floor(float x) { return std::floor(x); }
STQ_INLINE double ceil(double x) { return std::ceil(x); }
STQ_INLINE float ceil(float x) { return std::ceil(x); }
STQ_INLINE int to_int(float x) { return x == x ? static_cast<int>(x) : 0; }
template <typename T> STQ_INLINE T min(T a, T b) { return a < b ? a : b; }
template <typename T> STQ_INLINE T max(T a, T b) { return a > b ? a : b; }
STQ_INLINE double exp(double x) { return std::exp(x); }
STQ_INLINE f32v exp(f32v x) { return lanes([&](int i) { return std::exp(x[i]); }); }
STQ_INLINE double log(double x) { return std::log(x); }
STQ_INLINE f32v log(f32v x) { return lanes([&](int i) { return std::log(x[i]); }); }
STQ_INLINE double pow(double x, double y) { return std::pow(x, y); }
STQ_INLINE f32v pow(f32v x, f32v y) { return lanes([&](int i) { return std::pow(x[i], y[i]); }); }

#if defined(__AVX512F__)
STQ_INLINE f32v fma(f32v a, f32v b, f32v c) { return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
STQ_INLINE f32v sqrt(f32v x) { return (f32v)_mm512_sqrt_ps((__m512)x); }
STQ_INLINE f32v floor(f32v x) { return (f32v)_mm512_roundscale_ps((__m512)x, 0x09); }
STQ_INLINE f32v ceil(f32v x) { return (f32v)_mm512_roundscale_ps((__m512)x, 0x0A); }
STQ_INLINE f32v min(f32v a, f32v b) { return (f32v)_mm512_min_ps((__m512)a, (__m512)b); }
STQ_INLINE f32v max(f32v a, f32v b) { return (f32v)_mm512_max_ps((__m512)a, (__m512)b); }
STQ_INLINE i32v min(i32v a, i32v b) { return (i32v)_mm512_min_epi32((__m512i)a, (__m512i)b); }
STQ_INLINE i32v max(i32v a, i32v b) { return (i32v)_mm512_max_epi32((__m512i)a, (__m512i)b); }
STQ_INLINE i32v to_int(f32v x) { return (i32v)_mm512_cvttps_epi32((__m512)x); }
STQ_INLINE f32v lookup(f32v table, i32v code) { return (f32v)_mm512_permutexvar_ps((__m512i)code, (__m512)table); }
#elif defined(__AVX2__) && defined(__FMA__)
struct Halves { __m256 low, high; };
STQ_INLINE Halves halves(f32v x) { Halves h; std::memcpy(&h, &x, 64); return h; }
STQ_INLINE f32v whole(__m256 low, __m256 high) { Halves h{low, high}; f32v x; std::memcpy(&x, &h, 64); return x; }
STQ_INLINE f32v fma(f32v a, f32v b, f32v c) {
  Halves x = halves(a), y = halves(b), z = halves(c);
  return whole(_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high));
}
STQ_INLINE f32v sqrt(f32v a) { Halves x = halves(a); return whole(_mm256_sqrt_ps(x.low), _mm256_sqrt_ps(x.high)); }
STQ_INLINE f32v floor(f32v a) { Halves x = halves(a); return whole(_mm256_floor_ps(x.low), _mm256_floor_ps(x.high)); }
STQ_INLINE f32v ceil(f32v a) { Halves x = halves(a); return whole(_mm256_ceil_ps(x.low), _mm256_ceil_ps(x.high)); }
STQ_INLINE f32v min(f32v a, f32v b) { Halves x = halves(a), y = halves(b); return whole(_mm256_min_ps(x.low, y.low), _mm256_min_ps(x.high, y.high)); }
STQ_INLINE f32v max(f32v a, f32v b) { Halves x = halves(a), y = halves(b); return whole(_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high)); }
STQ_INLINE i32v min(i32v a, i32v b) { return a < b ? a : b; }
STQ_INLINE i32v max(i32v a, i32v b) { return a > b ? a : b; }
STQ_INLINE i32v to_int(f32v x) { return __builtin_convertvector(x, i32v); }
STQ_INLINE f32v lookup(f32v table, i32v code) {
  // Two tables of 8, chosen by bit 3 of the code.
  Halves t = halves(table);
  __m256i index[2];
  std::memcpy(index, &code, 64);
  __m256 r[2];
  for (int i = 0; i < 2; ++i) {
    __m256 low = _mm256_permutevar8x32_ps(t.low, index[i]);
    __m256 high = _mm256_permutevar8x32_ps(t.high, index[i]);
    r[i] = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index[i], 28)));
  }
  return whole(r[0], r[1]);
}
#else
STQ_INLINE f32v fma(f32v a, f32v b, f32v c) { return lanes([&](int i) { return std::fmaf(a[i], b[i], c[i]); }); }
STQ_INLINE f32v sqrt(f32v x) { return lanes([&](int i) { return std::sqrt(x[i]); }); }
STQ_INLINE f32v floor(f32v x) { return lanes([&](int i) { return std::floor(x[i]); }); }
STQ_INLINE f32v ceil(f32v x) { return lanes([&](int i) { return std::ceil(x[i]); }); }
STQ_INLINE f32v min(f32v a, f32v b) { return a < b ? a : b; }
STQ_INLINE f32v max(f32v a, f32v b) { return a > b ? a : b; }
STQ_INLINE i32v min(i32v a, i32v b) { return a < b ? a : b; }
STQ_INLINE i32v max(i32v a, i32v b) { return a > b ? a : b; }
STQ_INLINE i32v to_int(f32v x) { return __builtin_convertvector(x, i32v); }
STQ_INLINE f32v lookup(f32v table, i32v code) { return lanes([&](int i) { return table[code[i] & 15]; }); }
#endif

// NaN if either argument is, as torch.minimum and torch.maximum.
STQ_INLINE f32v minimum(f32v a, f32v b) { return (a < b) | (a != a) ? a : b; }
STQ_INLINE f32v maximum(f32v a, f32v b) { return (a > b) | (a != a) ? a : b; }
STQ_INLINE double minimum(double a, double b) { return a < b || a != a ? a : b; }
STQ_INLINE double maximum(double a, double b) { return a > b || a != a ? a : b; }
STQ_INLINE f32v sign(f32v x) { return select(x > 0, all(1.0f), select(x < 0, all(-1.0f), all(0.0f))); }
STQ_INLINE double sign(double x) { return x > 0 ? 1.0 : x < 0 ? -1.0 : 0.0; }

// Unsigned bytes and halves to int32; GCC 12 converts them one by one if left to itself.
#if defined(__AVX512F__)
STQ_INLINE i32v widen(u8v x) { return (i32v)_mm512_cvtepu8_epi32((__m128i)x); }
STQ_INLINE i32v widen(u16v x) { return (i32v)_mm512_cvtepu16_epi32((__m256i)x); }
#elif defined(__AVX2__)
STQ_INLINE i32v widen(u8v x) {
  __m256i h[2] = {_mm256_cvtepu8_epi32((__m128i)x), _mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)x, 8))};
  i32v r;
  std::memcpy(&r, h, 64);
  return r;
}
STQ_INLINE i32v widen(u16v x) { return __builtin_convertvector(x, i32v); }
#else
STQ_INLINE i32v widen(u8v x) { return __builtin_convertvector(x, i32v); }
STQ_INLINE i32v widen(u16v x) { return __builtin_convertvector(x, i32v); }
#endif

// Memory: one plane of 16 elements, any alignment.
STQ_INLINE f32v load(const float* p) { f32v r; std::memcpy(&r, p, 64); return r; }
STQ_INLINE void store(float* p, f32v x) { std::memcpy(p, &x, 64); }
STQ_INLINE i32v load_half(const uint16_t* p) { u16v r; std::memcpy(&r, p, 32); return widen(r); }
STQ_INLINE void store_half(uint16_t* p, i32v x) { u16v r = __builtin_convertvector(x, u16v); std::memcpy(p, &r, 32); }
STQ_INLINE i32v iota() { return i32v{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
STQ_INLINE i32v valid(int plane, int count) { return iota() < count - plane * kLanes; }

// Packed layout: a field of b bits is 16 b bytes; its byte 16 c + lane holds planes c, c + b, ...
STQ_INLINE i32v field(const uint8_t* p, int bits, int plane) {
  u8v bytes;
  std::memcpy(&bytes, p + kLanes * (plane % bits), kLanes);
  return (widen(bytes) >> (bits * (plane / bits))) & ((1 << bits) - 1);
}
STQ_INLINE void put_field(uint8_t* p, int bits, const i32v* code, int shift) {
  for (int c = 0; c < bits; ++c) {
    i32v byte = i32v{};
    for (int plane = c; plane < kPlanes; plane += bits)
      byte |= ((code[plane] >> shift) & ((1 << bits) - 1)) << (bits * (plane / bits));
    u8v bytes = __builtin_convertvector(byte, u8v);
    std::memcpy(p + kLanes * c, &bytes, kLanes);
  }
}
// Widths that are a sum of two fields: the low field first, the high field after its bytes.
constexpr int low_bits(int width) { return width == 3 ? 2 : width == 5 || width == 6 ? 4 : width; }
template <int width> STQ_INLINE i32v unpack(const uint8_t* p, int plane) {
  constexpr int low = low_bits(width), high = width - low;
  i32v code = field(p, low, plane);
  if constexpr (high > 0) code |= field(p + kLanes * low, high, plane) << low;
  return code;
}
template <int width> STQ_INLINE void pack(uint8_t* p, const i32v* code) {
  constexpr int low = low_bits(width), high = width - low;
  put_field(p, low, code, 0);
  if constexpr (high > 0) put_field(p + kLanes * low, high, code, low);
}

// Reductions over the lanes: by halves, in the order of the reference.
template <typename V, typename F> STQ_INLINE auto fold_lanes(V x, F f) {
  typedef decltype(x[0] + x[0]) T;
  typedef T v8 __attribute__((vector_size(32)));
  typedef T v4 __attribute__((vector_size(16)));
  v8 eight[2];
  std::memcpy(eight, &x, 64);
  const v8 a = f(eight[0], eight[1]);
  v4 four[2];
  std::memcpy(four, &a, 32);
  const v4 b = f(four[0], four[1]);
  const v4 c = f(b, __builtin_shufflevector(b, b, 2, 3, 2, 3));
  const v4 d = f(c, __builtin_shufflevector(c, c, 1, 1, 1, 1));
  return d[0];
}
STQ_INLINE float sum_lanes(f32v x) { return fold_lanes(x, [](auto a, auto b) { return a + b; }); }
STQ_INLINE int max_lanes(i32v x) { return fold_lanes(x, [](auto a, auto b) { return a > b ? a : b; }); }

// Random bits from the counter (seed, step, stream, block, element); see rounding.py.
STQ_INLINE uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
struct BlockKey {
  uint32_t low, high, rotation;
};
STQ_INLINE BlockKey block_key(uint64_t stream, uint64_t step, int64_t block) {
  constexpr uint64_t upper = 0xFFFFFFFF00000000ull;  // below: the step, by which numbers rotate
  const uint64_t base = mix64((step & upper) ^ stream) & upper;
  const uint64_t key = mix64(base + 0x9E3779B97F4A7C15ull * static_cast<uint64_t>(block + 1));
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(step) * 0x9E3779B9u};
}
STQ_INLINE u32v random_bits(BlockKey key, int plane) {
  u32v x = (reinterpret_cast<u32v>(iota()) + static_cast<uint32_t>(plane * kLanes)) * 0x9E3779B9u + key.low;
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= key.high;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return (x ^ (x >> 16)) + key.rotation;
}
STQ_INLINE i32v random(BlockKey key, int plane) { return reinterpret_cast<i32v>(random_bits(key, plane)); }
STQ_INLINE f32v random24(BlockKey key, int plane) {
  return to_float(reinterpret_cast<i32v>(random_bits(key, plane) >> 8));
}

}  // namespace stq
