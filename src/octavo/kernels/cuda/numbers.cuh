// What all kernels share: types, and numbers of half precision. Stands before every source when it is compiled.
#if defined(OCTAVO_EMULATOR)
#include "emulator.h"
#else
typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
#endif

#define DEVICE static __device__ __forceinline__

constexpr int kThreads = 256;

// Types of inputs and outputs.
constexpr int kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2;

DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }

DEVICE float half_to_float(uint16_t half) {
#if !defined(OCTAVO_EMULATOR)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
#else
    // Five bits of exponent moved up by multiplication, which is right for subnormal numbers; NaN and infinity apart.
    const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7FFFu;
    const float size = bits_to_float(rest << 13) * 5.192296858534828e33f;  // 2^112
    const uint32_t bits = rest >= 0x7C00u ? 0x7F800000u | (rest & 0x3FFu) << 13 : __float_as_uint(size);
    return bits_to_float(sign | bits);
#endif
}

DEVICE uint16_t float_to_bfloat16(float value) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

DEVICE uint16_t float_to_half(float value) {
    const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7FFFFFFFu;
    if (rest > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
    if (rest >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
    if (rest < 0x38800000u) {
        // Below 2^-14 a half counts in steps of 2^-24, as floats between 1/2 and 1 do.
        const float moved = bits_to_float(rest) + 0.5f;
        return static_cast<uint16_t>(sign | (__float_as_uint(moved) - 0x3F000000u));
    }
    return static_cast<uint16_t>(sign | (rest + 0xFFFu + (rest >> 13 & 1u) - 0x38000000u) >> 13);
}

DEVICE float load_as_float(const void* from, int64_t at, int type) {
    if (type == kFloat32) return static_cast<const float*>(from)[at];
    const uint16_t bits = static_cast<const uint16_t*>(from)[at];
    return type == kFloat16 ? half_to_float(bits) : bits_to_float(static_cast<uint32_t>(bits) << 16);
}

DEVICE void store_as(void* to, int64_t at, float value, int type) {
    if (type == kFloat32) {
        static_cast<float*>(to)[at] = value;
    } else {
        static_cast<uint16_t*>(to)[at] = type == kFloat16 ? float_to_half(value) : float_to_bfloat16(value);
    }
}
