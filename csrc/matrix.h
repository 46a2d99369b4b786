// Quantized matrices regrouped for this processor, and products with them inside a team of threads.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "columns.h"
#include "team.h"

namespace octavo {

struct Free {
    void operator()(void* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<uint8_t[], Free>;

// Uninitialised memory, aligned to a cache line, and to huge pages where it is large. Throws std::bad_alloc.
Bytes aligned_bytes(int64_t count);

// `width` bits from bit `at` on, lowest first, of a row as octavo_pack writes it.
inline uint64_t read_bits(const uint32_t* words, int64_t at, int width) {
    const int64_t word = at >> 5;
    const int shift = static_cast<int>(at & 31);
    uint64_t value = words[word] >> shift;
    if (shift + width > 32) value |= static_cast<uint64_t>(words[word + 1]) << (32 - shift);
    return value & ((uint64_t{1} << width) - 1);
}

class Matrix;
class Workspace;

// A matrix that is multiplied, what its threads need for that, and the prepared vectors of this one.
struct Product {
    const Matrix* matrix;
    Workspace* space;
    const float* prepared;
};

// A product takes two steps of every thread of a team, with a barrier between them and one behind them.
class Matrix {
  public:
    int64_t out = 0, in = 0;
    std::vector<float> bias;   // [out] or empty
    int64_t transform = 0;     // block of the Hadamard transform of the inputs, or 0
    std::vector<float> signs;  // [in], over sqrt(transform)
    // Equal where prepare() makes the same of the same x, and where start() makes the same tables of that, so that it
    // can do so for several matrices at once; 0 equals nothing.
    uint64_t input = 0, tables = 0;

    virtual ~Matrix() = default;

    // Sizes of what a thread needs per column of x, and for `columns` of them.
    virtual int64_t x_floats() const = 0;
    virtual int64_t sums_floats() const = 0;
    virtual int64_t scratch_bytes(int64_t columns) const = 0;
    // Threads beyond which there is no work.
    virtual int64_t most_threads() const = 0;
    virtual int64_t code_bytes() const = 0;

    // What the codes are multiplied by in place of x [in]: to [x_floats()].
    virtual void prepare(const float* x, float* to) const = 0;
    // First step of up to kTogether products with the prepared `columns` vectors: the first is this matrix's, and all
    // have its `tables`.
    virtual void start(const Product* products, int count, int64_t columns, int rank, const Team& team,
                       int isa) const = 0;
    // Second step: this thread's rows of y [columns][out], bias included. The prepared vectors are still there.
    virtual void finish(const float* prepared, int64_t columns, int rank, const Team& team, Workspace& space, int isa,
                        float* y) const = 0;
    // Rows [first, last) as float32 or bfloat16, [last - first][in], to be multiplied by rotated() inputs.
    virtual void decode(int64_t first, int64_t last, bool bfloat16, void* to, int threads) const = 0;

    // Whether there is a way for many vectors that rounds them to bytes: y[i] = W x[i] + bias for x [n][in].
    virtual bool has_many() const { return false; }
    virtual void many(const float*, int64_t, int, float*) const {}
    // Whether single rows can be decoded, transforms undone: to [in].
    virtual bool has_rows() const { return false; }
    virtual void row(int64_t, float*) const {}
    // Products, without bias, of n rows `which` with one x [in], from `indices` as they were passed to create: those
    // stand row by row, as single rows are wanted.
    virtual bool has_row_products() const { return false; }
    virtual void row_products(const uint32_t*, const int64_t*, int64_t, const float*, int, float*) const {}

    // Signs and Hadamard transform of x [in].
    void rotate(const float* x, float* to) const;
    // Reads the signs, a bit per input, set for -1.
    void set_transform(int64_t block, const uint32_t* sign_bits);
};

// Prepares x [columns][in] for up to kTogether products and takes their first steps; what is the same for several of
// them is done once.
void start_all(Product* products, int count, const float* x, int64_t columns, int rank, const Team& team, int isa);

// Memory of all threads of a team. Throws std::bad_alloc.
class Workspace {
  public:
    Workspace(int threads, int64_t x_floats, int64_t sums_floats, int64_t scratch_bytes);
    float* x(int rank) { return reinterpret_cast<float*>(at(rank)); }
    float* sums(int rank) { return reinterpret_cast<float*>(at(rank) + x_bytes_); }
    uint8_t* scratch(int rank) { return at(rank) + x_bytes_ + sums_bytes_; }

  private:
    uint8_t* at(int rank) { return memory_.get() + rank * (x_bytes_ + sums_bytes_ + scratch_bytes_); }
    int64_t x_bytes_, sums_bytes_, scratch_bytes_;
    Bytes memory_;
};

}  // namespace octavo
