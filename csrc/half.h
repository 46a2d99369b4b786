// Half floats and bfloat16 without instructions for them.
//
// Included by translation units with flags of their own, so everything lives in an unnamed namespace (see lanes.h).
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

inline float from_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7FFF;
    // Exponents are moved by a multiplication, which gets subnormal numbers right as well; infinity and NaN stay apart.
    uint32_t bits = rest << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;
    memcpy(&bits, &value, sizeof bits);
    if (rest >= 0x7C00) bits = 0x7F800000 | rest << 13;
    bits |= sign;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint16_t to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7FFFFFFF;
    if (bits >= 0x7F800000) return static_cast<uint16_t>(sign | 0x7C00 | (bits > 0x7F800000 ? 0x200 : 0));
    // The largest half float: what is beyond is cut, not infinite.
    if (bits > 0x477FE000) bits = 0x477FE000;
    memcpy(&value, &bits, sizeof value);
    if (bits < 0x38800000) {
        // Subnormal: the addition rounds to a multiple of 2^-24.
        value += 0.5f;
        memcpy(&bits, &value, sizeof bits);
        return static_cast<uint16_t>(sign | (bits - 0x3F000000));
    }
    bits += 0xFFF + (bits >> 13 & 1);
    return static_cast<uint16_t>(sign | (bits - 0x38000000) >> 13);
}

inline float from_bfloat16(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

inline uint16_t to_bfloat16(float value) {  // to nearest even
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

}  // namespace
