// Keys and values of what a conversation has seen, as half floats or as bytes.
//
// All heads of a token stand side by side: whoever takes a stretch of positions reads memory from one end to the other.
#pragma once

#include <cmath>
#include <vector>

#include "matrix.h"
#include "ops.h"

namespace octavo {

class Cache {
  public:
    // Throws std::bad_alloc.
    Cache(int64_t blocks, int64_t heads, int64_t width, int64_t capacity, bool bytes)
        : heads_(heads), width_(width), capacity_(capacity), bytes_(bytes) {
        block_ = width & -width;
        factors_.assign(static_cast<size_t>(width), 1.0f / std::sqrt(static_cast<float>(block_)));
        for (Half* half : {&keys_, &values_}) {
            half->numbers = aligned_bytes(blocks * capacity * heads * width * size());
            if (bytes) half->factors = aligned_bytes(blocks * heads * capacity * int64_t{sizeof(float)});
        }
    }

    // A query or a key [width] as keys are kept. Some models' keys are large in a few places, which would leave the
    // others few of the digits of a byte: a Hadamard transform spreads them, and changes no product of a query and a
    // key.
    void spread(const Ops& ops, float* x) const {
        if (bytes_) ops.transform(x, factors_.data(), width_, block_, x);
    }

    // Key [width], spread, and value [width] of a head at a position.
    void write(const Ops& ops, int64_t block, int64_t head, int64_t position, const float* key, const float* value) {
        write(ops, keys_, block, head, position, key);
        write(ops, values_, block, head, position, value);
    }

    // What `a` wants to know of the positions from `first` on.
    void read(int64_t block, int64_t first, Attention& a) const {
        a.keys = numbers(keys_, block, 0, first);
        a.values = numbers(values_, block, 0, first);
        a.key_factors = bytes_ ? factor(keys_, block, 0, first) : nullptr;
        a.value_factors = bytes_ ? factor(values_, block, 0, first) : nullptr;
        a.factor_stride = capacity_;
    }

  private:
    struct Half {
        Bytes numbers;  // [blocks][capacity][heads][width]
        Bytes factors;  // [blocks][heads][capacity] float, of bytes
    };

    int64_t size() const { return bytes_ ? 1 : 2; }
    uint8_t* numbers(const Half& half, int64_t block, int64_t head, int64_t position) const {
        return half.numbers.get() + ((block * capacity_ + position) * heads_ + head) * width_ * size();
    }
    float* factor(const Half& half, int64_t block, int64_t head, int64_t position) const {
        return reinterpret_cast<float*>(half.factors.get()) + (block * heads_ + head) * capacity_ + position;
    }
    void write(const Ops& ops, const Half& half, int64_t block, int64_t head, int64_t position, const float* x) {
        uint8_t* const to = numbers(half, block, head, position);
        if (bytes_) {
            *factor(half, block, head, position) = ops.to_bytes(x, width_, reinterpret_cast<int8_t*>(to));
        } else {
            ops.to_half(x, width_, reinterpret_cast<uint16_t*>(to));
        }
    }

    int64_t heads_, width_, capacity_;
    bool bytes_;
    int64_t block_;               // of the transform
    std::vector<float> factors_;  // [width], 1 / sqrt(block)
    Half keys_, values_;
};

}  // namespace octavo
