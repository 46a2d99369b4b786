// Lane operations of the beam search, on top of those of lanes.h.
#pragma once

#include "lanes.h"

namespace {

#if defined(__AVX512F__)

inline Int load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
inline Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
inline Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
inline bool any(Mask m) { return m != 0; }
inline int ones(Mask m) { return static_cast<int>(_mm_popcnt_u32(m)); }
inline float least(Float a) { return _mm512_reduce_min_ps(a); }
// The lowest index among the lanes of a that equal value.
inline int32_t lowest(Float a, float value, Int index) {
    return _mm512_mask_reduce_min_epi32(_mm512_cmp_ps_mask(a, all(value), _CMP_EQ_OQ), index);
}
// Writes the chosen lanes one after the other, and up to kLanes elements in all; returns how many were chosen.
inline int append(Mask m, Float score, Int tag, float* scores, int32_t* tags) {
    store(scores, _mm512_maskz_compress_ps(m, score));
    store(tags, _mm512_maskz_compress_epi32(m, tag));
    return ones(m);
}

#else

#if defined(__AVX2__)
inline Int load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
inline Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
inline Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
inline unsigned bits(Mask m) { return static_cast<unsigned>(_mm256_movemask_ps(m)); }
inline bool any(Mask m) { return bits(m) != 0; }
inline int ones(Mask m) { return static_cast<int>(_mm_popcnt_u32(bits(m))); }
#else
inline Int load(const int32_t* p) { return Int{p[0], p[1], p[2], p[3]}; }
inline void store(float* p, Float x) {
    for (int i = 0; i < kLanes; ++i) p[i] = x[i];
}
#if defined(__GNUC__)
inline Float add(Float a, Float b) { return a + b; }
inline Int add(Int a, Int b) { return a + b; }
#else
inline Float add(Float a, Float b) {
    return each<Float>([&](int i) { return a[i] + b[i]; });
}
inline Int add(Int a, Int b) {
    return each<Int>([&](int i) { return a[i] + b[i]; });
}
#endif
inline unsigned bits(Mask m) {
    return static_cast<unsigned>((m[0] & 1) | (m[1] & 1) << 1 | (m[2] & 1) << 2 | (m[3] & 1) << 3);
}
inline bool any(Mask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
inline int ones(Mask m) { return (m[0] & 1) + (m[1] & 1) + (m[2] & 1) + (m[3] & 1); }
#endif

inline float least(Float a) {
    float at[kLanes];
    store(at, a);
    float found = at[0];
    for (int i = 1; i < kLanes; ++i) found = at[i] < found ? at[i] : found;
    return found;
}
inline int32_t lowest(Float a, float value, Int index) {
    float at[kLanes];
    int32_t indices[kLanes], found = INT32_MAX;
    store(at, a);
    store(indices, index);
    for (int i = 0; i < kLanes; ++i)
        if (at[i] == value && indices[i] < found) found = indices[i];
    return found;
}
inline int append(Mask m, Float score, Int tag, float* scores, int32_t* tags) {
    float from[kLanes];
    int32_t from_tags[kLanes];
    store(from, score);
    store(from_tags, tag);
    const unsigned chosen = bits(m);
    unsigned count = 0;
    for (int i = 0; i < kLanes; ++i) {
        scores[count] = from[i];
        tags[count] = from_tags[i];
        count += chosen >> i & 1;
    }
    return static_cast<int>(count);
}

#endif

}  // namespace
