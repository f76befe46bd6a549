// Run-time library of the generated CPU kernels: 16 lanes of float32 or int32, the packed
// layout, the random counter. Portable through GCC and Clang vector extensions; AVX-512 and AVX2
// get their own instruction where the compiler would not find it. Every operation is one IEEE
// operation (built with -ffp-contract=off), so results don't depend on the instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define STQ_INLINE static inline __attribute__((always_inline))

namespace stq {

constexpr int kLanes = 16;
constexpr int kPlanes = 8;
constexpr int kBlock = kLanes * kPlanes;
// Blocks that go through a phase together. What crosses fits the L1 cache, and 4 blocks of float32 are
// half a page: with 8 every tile begins a new one, which the hardware has not prefetched.
constexpr int kTile = 4;
// A value that every block has one of is one lane of these.
typedef float f32b __attribute__((vector_size(4 * kTile)));
typedef int32_t i32b __attribute__((vector_size(4 * kTile)));

typedef float f32v __attribute__((vector_size(64)));
typedef int32_t i32v __attribute__((vector_size(64)));
typedef uint32_t u32v __attribute__((vector_size(64)));
typedef uint8_t u8v __attribute__((vector_size(16)));
typedef uint16_t u16v __attribute__((vector_size(32)));

// Broadcasts.
STQ_INLINE f32v all(float x) { return x - f32v{}; }  // keeps the sign of zero: no operation
STQ_INLINE i32v all(int x) { return i32v{} + x; }
STQ_INLINE i32v all(bool x) { return i32v{} - static_cast<int>(x); }
STQ_INLINE f32v all(f32v x) { return x; }
STQ_INLINE i32v all(i32v x) { return x; }
STQ_INLINE f32b each(float x) { return x - f32b{}; }
STQ_INLINE i32b each(int x) { return i32b{} + x; }
STQ_INLINE i32b each(bool x) { return i32b{} - static_cast<int>(x); }

// Bits.
STQ_INLINE i32v bits_of(f32v x) { return reinterpret_cast<i32v>(x); }
STQ_INLINE f32v from_bits(i32v x) { return reinterpret_cast<f32v>(x); }
STQ_INLINE i32b bits_of(f32b x) { return reinterpret_cast<i32b>(x); }
STQ_INLINE f32b from_bits(i32b x) { return reinterpret_cast<f32b>(x); }
STQ_INLINE int bits_of(float x) { int r; std::memcpy(&r, &x, 4); return r; }
STQ_INLINE float from_bits(int x) { float r; std::memcpy(&r, &x, 4); return r; }
STQ_INLINE float to_float(int x) { return static_cast<float>(x); }
STQ_INLINE f32v to_float(i32v x) { return __builtin_convertvector(x, f32v); }
STQ_INLINE f32b to_float(i32b x) { return __builtin_convertvector(x, f32b); }

// Lane by lane, for what has no vector form in the language.
template <typename V = f32v, typename F> STQ_INLINE V lanes(F f) {
  V r;
  for (unsigned i = 0; i < sizeof(V) / sizeof(float); ++i) r[i] = f(i);
  return r;
}

// Selection and logic; vector masks are 0 or -1 in each lane.
STQ_INLINE f32v select(i32v c, f32v a, f32v b) { return c ? a : b; }
STQ_INLINE i32v select(i32v c, i32v a, i32v b) { return c ? a : b; }
STQ_INLINE f32b select(i32b c, f32b a, f32b b) { return c ? a : b; }
STQ_INLINE i32b select(i32b c, i32b a, i32b b) { return c ? a : b; }
STQ_INLINE double select(bool c, double a, double b) { return c ? a : b; }
STQ_INLINE int select(bool c, int a, int b) { return c ? a : b; }
STQ_INLINE i32v logical_not(i32v c) { return ~c; }
STQ_INLINE i32b logical_not(i32b c) { return ~c; }
STQ_INLINE bool logical_not(bool c) { return !c; }

// Arithmetic with the same name for double, float and vectors.
STQ_INLINE double fma(double a, double b, double c) { return std::fma(a, b, c); }
STQ_INLINE double sqrt(double x) { return std::sqrt(x); }
STQ_INLINE double abs(double x) { return std::fabs(x); }
STQ_INLINE f32b abs(f32b x) { return from_bits(bits_of(x) & 0x7fffffff); }
STQ_INLINE f32v abs(f32v x) { return from_bits(bits_of(x) & 0x7fffffff); }
STQ_INLINE double copysign(double a, double b) { return std::copysign(a, b); }
STQ_INLINE f32v copysign(f32v a, f32v b) { return from_bits((bits_of(a) & 0x7fffffff) | (bits_of(b) & INT32_MIN)); }
STQ_INLINE double floor(double x) { return std::floor(x); }
STQ_INLINE double ceil(double x) { return std::ceil(x); }
STQ_INLINE int to_int(float x) { return x == x ? static_cast<int>(x) : 0; }
STQ_INLINE i32b to_int(f32b x) { return __builtin_convertvector(x == x ? x : f32b{}, i32b); }
template <typename T> STQ_INLINE T min(T a, T b) { return a < b ? a : b; }
template <typename T> STQ_INLINE T max(T a, T b) { return a > b ? a : b; }
STQ_INLINE double exp(double x) { return std::exp(x); }
STQ_INLINE f32v exp(f32v x) { return lanes([&](int i) { return std::exp(x[i]); }); }
STQ_INLINE double log(double x) { return std::log(x); }
STQ_INLINE f32v log(f32v x) { return lanes([&](int i) { return std::log(x[i]); }); }
STQ_INLINE double pow(double x, double y) { return std::pow(x, y); }
STQ_INLINE f32v pow(f32v x, f32v y) { return lanes([&](int i) { return std::pow(x[i], y[i]); }); }

#if defined(__AVX2__) && defined(__FMA__)
STQ_INLINE f32b fma(f32b a, f32b b, f32b c) { return (f32b)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c); }
STQ_INLINE f32b sqrt(f32b x) { return (f32b)_mm_sqrt_ps((__m128)x); }
STQ_INLINE f32b floor(f32b x) { return (f32b)_mm_floor_ps((__m128)x); }
STQ_INLINE f32b ceil(f32b x) { return (f32b)_mm_ceil_ps((__m128)x); }
#else
STQ_INLINE f32b fma(f32b a, f32b b, f32b c) { return lanes<f32b>([&](int i) { return std::fmaf(a[i], b[i], c[i]); }); }
STQ_INLINE f32b sqrt(f32b x) { return lanes<f32b>([&](int i) { return std::sqrt(x[i]); }); }
STQ_INLINE f32b floor(f32b x) { return lanes<f32b>([&](int i) { return std::floor(x[i]); }); }
STQ_INLINE f32b ceil(f32b x) { return lanes<f32b>([&](int i) { return std::ceil(x[i]); }); }
#endif

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

#if defined(__AVX512DQ__)
STQ_INLINE f32v fraction(f32v x) { return (f32v)_mm512_reduce_ps((__m512)x, 0x09); }
#else
STQ_INLINE f32v fraction(f32v x) { return x - floor(x); }
#endif
STQ_INLINE f32b fraction(f32b x) { return x - floor(x); }
STQ_INLINE double fraction(double x) { return x - floor(x); }

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
// The low bytes of int32. GCC writes what it stores of them straight to memory, which is slower.
#if defined(__AVX512F__)
STQ_INLINE u8v narrow(i32v x) { return (u8v)_mm512_cvtepi32_epi8((__m512i)x); }
#else
STQ_INLINE u8v narrow(i32v x) { return __builtin_convertvector(x, u8v); }
#endif

// Memory: one plane of 16 elements, any alignment.
STQ_INLINE f32v load(const float* p) { f32v r; std::memcpy(&r, p, 64); return r; }
STQ_INLINE void store(float* p, f32v x) { std::memcpy(p, &x, 64); }
// Ask for a block of elements.
template <typename T> STQ_INLINE void prefetch(const T* p) {
  constexpr int line = 64 / sizeof(T);
  for (int i = 0; i < kBlock; i += line) __builtin_prefetch(p + i);
}
STQ_INLINE i32v load_half(const uint16_t* p) { u16v r; std::memcpy(&r, p, 32); return widen(r); }
STQ_INLINE void store_half(uint16_t* p, i32v x) { u16v r = __builtin_convertvector(x, u16v); std::memcpy(p, &r, 32); }
STQ_INLINE i32v load_byte(const int8_t* p) { typedef int8_t i8v __attribute__((vector_size(16))); i8v r; std::memcpy(&r, p, 16); return __builtin_convertvector(r, i32v); }
STQ_INLINE void store_byte(int8_t* p, i32v x) { typedef int8_t i8v __attribute__((vector_size(16))); i8v r = __builtin_convertvector(x, i8v); std::memcpy(p, &r, 16); }

// Elements of 16 bits, converted to float32 and, to nearest, back. NaN stays one, quiet.
struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };
STQ_INLINE f32v load(const bfloat16* p) { return from_bits(load_half(&p->bits) << 16); }
STQ_INLINE void store(bfloat16* p, f32v x) {
  const i32v bits = bits_of(x);
  const i32v nearest = bits + (0x7fff + ((bits >> 16) & 1));
  store_half(&p->bits, select(x == x, nearest, bits | 0x400000) >> 16 & 0xffff);
}
STQ_INLINE f32v load(const float16* p) {
  const i32v half = load_half(&p->bits), a = (half & 0x7fff) << 13;
  const i32v special = all(224 << 23), usual = all(112 << 23);  // what is added to the exponent
  const f32v normal = from_bits(a + select(a < 31 << 23, usual, special));
  const f32v denormal = from_bits(a + (113 << 23)) - from_bits(113 << 23);
  return from_bits(bits_of(select(a < 1 << 23, denormal, normal)) | (half & 0x8000) << 16);
}
STQ_INLINE void store(float16* p, f32v x) {
  const i32v a = bits_of(x) & 0x7fffffff, sign = bits_of(x) >> 16 & 0x8000;
  const i32v normal = min((a + (0xfff - (112 << 23)) + (a >> 13 & 1)) >> 13, all(0x7c00));
  const i32v denormal = bits_of(from_bits(a) + 0.5f) - bits_of(0.5f);
  const i32v number = select(a < 113 << 23, denormal, normal);
  store_half(&p->bits, select(x == x, number, all(0x7e00)) | sign);
}
STQ_INLINE i32b load_words(const uint16_t* p, int blocks, int64_t stride) {
  i32b r{};
  for (int j = 0; j < blocks; ++j) r[j] = p[j * stride];
  return r;
}
STQ_INLINE i32v iota() { return i32v{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
STQ_INLINE i32v valid(int plane, int count) { return iota() < count - plane * kLanes; }

// Packed layout: a field of b bits is 16 b bytes; its byte 16 c + lane holds planes c, c + b, ...
// In registers a field of up to 4 bits is 4 vectors of bytes: plane i in the low nibbles of the i-th,
// plane i + 4 in the high ones. That is the layout of 4 bits; narrower fields get there by shifts of
// whole bytes, four times cheaper than the same on the 32-bit lanes of a plane.
struct Nibbles {
  u8v pair[4];
};
STQ_INLINE u8v load_bytes(const uint8_t* p) { u8v r; std::memcpy(&r, p, kLanes); return r; }
STQ_INLINE void store_bytes(uint8_t* p, u8v x) { std::memcpy(p, &x, kLanes); }
// Shifts of bytes by pairs: what crosses from one byte to the next is masked, or may be anything.
typedef uint16_t u16w __attribute__((vector_size(16)));
STQ_INLINE u8v up(u8v x, int n) { return reinterpret_cast<u8v>(reinterpret_cast<u16w>(x) << n); }
STQ_INLINE u8v down(u8v x, int n) { return reinterpret_cast<u8v>(reinterpret_cast<u16w>(x) >> n); }

// The nibbles of a field; bits above the code may be anything.
template <int bits> STQ_INLINE Nibbles field(const uint8_t* p) {
  Nibbles r;
  if constexpr (bits == 4) {
    for (int i = 0; i < 4; ++i) r.pair[i] = load_bytes(p + kLanes * i);
  } else if constexpr (bits == 2) {
    for (int i = 0; i < 2; ++i) {
      r.pair[i] = load_bytes(p + kLanes * i);
      r.pair[i + 2] = down(r.pair[i], 2);
    }
  } else {
    const u8v bytes = load_bytes(p);
    for (int i = 0; i < 4; ++i) r.pair[i] = down(bytes, i);
  }
  return r;
}
// The codes of a block, up to 4 bits each; bits above the code may be anything.
template <int width> STQ_INLINE Nibbles nibbles(const uint8_t* p) {
  if constexpr (width != 3) {
    return field<width>(p);
  } else {
    Nibbles r = field<2>(p);
    const u8v upper = load_bytes(p + 2 * kLanes);
    for (int i = 0; i < 4; ++i) {
      const u8v moved = i < 2 ? up(upper, 2 - i) : down(upper, i - 2);
      r.pair[i] = (r.pair[i] & 0x33) | (moved & 0xCC);
    }
    return r;
  }
}
// A plane's codes for `lookup`, which takes the low 4 bits.
STQ_INLINE i32v index(const Nibbles& codes, int plane) {
  return plane < 4 ? widen(codes.pair[plane]) : widen(codes.pair[plane - 4]) >> 4;
}
// Widths above 4 are a field of 4 bits, and a field of the rest after its bytes; 8 bits are one field,
// and widths above that are one and the rest.
template <int width> STQ_INLINE i32v unpack(const uint8_t* p, int plane) {
  if constexpr (width > 8) {
    return unpack<8>(p, plane) | (unpack<width - 8>(p + 8 * kLanes, plane) << 8);
  } else if constexpr (width == 8) {
    return widen(load_bytes(p + kLanes * plane));
  } else if constexpr (width <= 4) {
    return index(nibbles<width>(p), plane) & ((1 << width) - 1);
  } else {
    const i32v upper = index(field<width - 4>(p + 4 * kLanes), plane) & ((1 << (width - 4)) - 1);
    return (index(field<4>(p), plane) & 15) | (upper << 4);
  }
}
// Codes are below 2^width, or INT_MIN where there was no number.
STQ_INLINE Nibbles join(const i32v* code, int shift, int mask) {
  Nibbles r;
  for (int i = 0; i < 4; ++i) {
    const i32v low = (code[i] >> shift) & mask, high = (code[i + 4] >> shift) & mask;
    r.pair[i] = narrow(low | (high << 4));
  }
  return r;
}
template <int bits> STQ_INLINE void store_field(uint8_t* p, const Nibbles& x) {
  if constexpr (bits == 4) {
    for (int i = 0; i < 4; ++i) store_bytes(p + kLanes * i, x.pair[i]);
  } else if constexpr (bits == 2) {
    for (int i = 0; i < 2; ++i)
      store_bytes(p + kLanes * i, (x.pair[i] & 0x33) | (up(x.pair[i + 2], 2) & 0xCC));
  } else {
    u8v byte = x.pair[0] & 0x11;
    for (int i = 1; i < 4; ++i) byte |= up(x.pair[i], i) & static_cast<uint8_t>(0x11 << i);
    store_bytes(p, byte);
  }
}
template <int width> STQ_INLINE void pack(uint8_t* p, const i32v* code) {
  if constexpr (width > 8) {
    i32v upper[kPlanes];
    for (int i = 0; i < kPlanes; ++i) upper[i] = code[i] >> 8;
    pack<8>(p, code);
    pack<width - 8>(p + 8 * kLanes, upper);
  } else if constexpr (width == 8) {
    for (int i = 0; i < kPlanes; ++i) store_bytes(p + kLanes * i, narrow(code[i]));
  } else if constexpr (width <= 4) {
    Nibbles x = join(code, 0, -1);
    store_field<width == 3 ? 2 : width>(p, x);
    if constexpr (width == 3) {
      for (int i = 0; i < 4; ++i) x.pair[i] = down(x.pair[i], 2);
      store_field<1>(p + 2 * kLanes, x);
    }
  } else {
    store_field<4>(p, join(code, 0, 15));
    store_field<width - 4>(p + 4 * kLanes, join(code, 4, -1));
  }
}

// Reductions over the lanes of every block of a tile: by halves, in the order of the reference.
template <typename V, typename F> STQ_INLINE auto fold_lanes(const V (&x)[kTile], F f) {
  static_assert(kTile == 4);
  typedef decltype(x[0][0] + x[0][0]) T;
  typedef T v8 __attribute__((vector_size(32)));
  typedef T v4 __attribute__((vector_size(16)));
  v4 four[kTile];
  for (int j = 0; j < kTile; ++j) {
    v8 eight[2];
    std::memcpy(eight, &x[j], 64);
    const v8 a = f(eight[0], eight[1]);
    v4 halves[2];
    std::memcpy(halves, &a, 32);
    four[j] = f(halves[0], halves[1]);
  }
  v4 two[2];  // of two blocks each
  for (int j = 0; j < 2; ++j) {
    const v4 a = four[2 * j], b = four[2 * j + 1];
    two[j] = f(__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7));
  }
  return f(__builtin_shufflevector(two[0], two[1], 0, 2, 4, 6),
           __builtin_shufflevector(two[0], two[1], 1, 3, 5, 7));
}
STQ_INLINE f32b sum_lanes(const f32v (&x)[kTile]) { return fold_lanes(x, [](auto a, auto b) { return a + b; }); }
STQ_INLINE i32b max_lanes(const i32v (&x)[kTile]) { return fold_lanes(x, [](auto a, auto b) { return a > b ? a : b; }); }

// Random bits from the counter (seed, step, stream, block, element); see rounding.py.
STQ_INLINE uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
// The numbers of a block, plane after plane: element e has first + step_per_element * e.
struct BlockKey {
  u32v next, per_plane;
};
// What the keys of all blocks of a tensor begin with.
STQ_INLINE uint64_t stream_key(uint64_t stream, uint64_t step) {
  constexpr uint64_t upper = 0xFFFFFFFF00000000ull;  // below: the step, by which numbers rotate
  return mix64((step & upper) ^ stream) & upper;
}
STQ_INLINE BlockKey block_key(uint64_t stream, uint64_t step, int64_t block) {
  const uint64_t key = mix64(stream + 0x9E3779B97F4A7C15ull * static_cast<uint64_t>(block + 1));
  const uint32_t first = static_cast<uint32_t>(key) + static_cast<uint32_t>(step) * 0x9E3779B9u;
  const uint32_t each = static_cast<uint32_t>(key >> 32) | 1u;
  return {reinterpret_cast<u32v>(iota()) * each + first, u32v{} + each * kLanes};
}
STQ_INLINE u32v random_bits(BlockKey& key) {
  const u32v x = key.next;
  key.next += key.per_plane;
  return x;
}
STQ_INLINE i32v random(BlockKey& key) { return reinterpret_cast<i32v>(random_bits(key)); }
STQ_INLINE f32v random24(BlockKey& key) { return to_float(reinterpret_cast<i32v>(random_bits(key) >> 8)); }

}  // namespace stq
