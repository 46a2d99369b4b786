// One vector of floats and one of 32-bit integers of the widest kind that this file's compile flags allow.
//
// Every translation unit that includes this has flags of its own, so everything lives in an unnamed namespace: with
// external linkage the linker could keep the AVX-512 copy of a function and call it on a processor without AVX-512.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
constexpr int kRegisters = 32;
using Float = __m512;
using Int = __m512i;
using Mask = __mmask16;

inline Float load(const float* p) { return _mm512_loadu_ps(p); }
inline Float all(float x) { return _mm512_set1_ps(x); }
inline Int all(int32_t x) { return _mm512_set1_epi32(x); }
inline void store(int32_t* p, Int x) { _mm512_storeu_si512(p, x); }
inline Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
inline Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
inline Float square_root(Float a) { return _mm512_sqrt_ps(a); }
inline Float mul_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
inline Float neg_mul_add(Float a, Float b, Float c) { return _mm512_fnmadd_ps(a, b, c); }
inline Mask less(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Float lower(Float a, Float b) { return _mm512_min_ps(a, b); }
inline Int select(Mask m, Int yes, Int no) { return _mm512_mask_mov_epi32(no, m, yes); }

#elif defined(__AVX2__)

constexpr int kLanes = 8;
constexpr int kRegisters = 16;
using Float = __m256;
using Int = __m256i;
using Mask = __m256;

inline Float load(const float* p) { return _mm256_loadu_ps(p); }
inline Float all(float x) { return _mm256_set1_ps(x); }
inline Int all(int32_t x) { return _mm256_set1_epi32(x); }
inline void store(int32_t* p, Int x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
inline Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
inline Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
inline Float square_root(Float a) { return _mm256_sqrt_ps(a); }
inline Float mul_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
inline Float neg_mul_add(Float a, Float b, Float c) { return _mm256_fnmadd_ps(a, b, c); }
inline Mask less(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline Float lower(Float a, Float b) { return _mm256_min_ps(a, b); }
inline Int select(Mask m, Int yes, Int no) {
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(no), _mm256_castsi256_ps(yes), m));
}

#else

// Four lanes that compilers turn into SSE2 or NEON: the vector extension where there is one, else plain arrays.
constexpr int kLanes = 4;
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

#if defined(__GNUC__)
typedef float Float __attribute__((vector_size(16)));
typedef int32_t Int __attribute__((vector_size(16)));
using Mask = Int;

inline Float all(float x) { return Float{x, x, x, x}; }
inline Int all(int32_t x) { return Int{x, x, x, x}; }
inline Float sub(Float a, Float b) { return a - b; }
inline Float mul(Float a, Float b) { return a * b; }
inline Float mul_add(Float a, Float b, Float c) { return a * b + c; }
inline Float neg_mul_add(Float a, Float b, Float c) { return c - a * b; }
inline Mask less(Float a, Float b) { return a < b; }
inline Float lower(Float a, Float b) {
    const Mask m = a < b;
    return (Float)(((Int)a & m) | ((Int)b & ~m));
}
inline Int select(Mask m, Int yes, Int no) { return (yes & m) | (no & ~m); }
#else
template <class T>
struct Four {
    T at[4];
    T& operator[](int i) { return at[i]; }
    T operator[](int i) const { return at[i]; }
};
using Float = Four<float>;
using Int = Four<int32_t>;
using Mask = Four<int32_t>;

template <class Out, class F>
inline Out each(F f) {
    return Out{{f(0), f(1), f(2), f(3)}};
}
inline Float all(float x) { return {{x, x, x, x}}; }
inline Int all(int32_t x) { return {{x, x, x, x}}; }
inline Float sub(Float a, Float b) {
    return each<Float>([&](int i) { return a[i] - b[i]; });
}
inline Float mul(Float a, Float b) {
    return each<Float>([&](int i) { return a[i] * b[i]; });
}
inline Float mul_add(Float a, Float b, Float c) {
    return each<Float>([&](int i) { return a[i] * b[i] + c[i]; });
}
inline Float neg_mul_add(Float a, Float b, Float c) {
    return each<Float>([&](int i) { return c[i] - a[i] * b[i]; });
}
inline Mask less(Float a, Float b) {
    return each<Mask>([&](int i) { return a[i] < b[i] ? 1 : 0; });
}
inline Float lower(Float a, Float b) {
    return each<Float>([&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
}
inline Int select(Mask m, Int yes, Int no) {
    return each<Int>([&](int i) { return m[i] ? yes[i] : no[i]; });
}
#endif

inline Float load(const float* p) { return Float{p[0], p[1], p[2], p[3]}; }
inline void store(int32_t* p, Int x) {
    for (int i = 0; i < kLanes; ++i) p[i] = x[i];
}
inline Float square_root(Float a) {
    for (int i = 0; i < kLanes; ++i) a[i] = std::sqrt(a[i]);
    return a;
}

#endif

}  // namespace
