// Quantized matrices regrouped for this processor, and products with them inside a team of threads.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "lookup.h"
#include "team.h"

namespace octavo {

struct Free {
    void operator()(void* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<uint8_t[], Free>;

// Uninitialised memory, aligned to a cache line, and to huge pages where it is large. Throws std::bad_alloc.
Bytes aligned_bytes(int64_t count);

// Owns what `look_up` points to.
struct Matrix {
    int64_t out = 0, in = 0;
    LookUp look_up = {};
    std::vector<float> books[kMaxMatrixStages];
    std::vector<int64_t> chunk_starts, chunk_block;
    Bytes codes;
    int64_t code_count = 0;     // bytes of codes
    std::vector<float> scales;  // [blocks][rows]
    std::vector<float> bias;    // [out] or empty
    int64_t transform = 0;      // block of the Hadamard transform of the inputs, or 0
    std::vector<float> signs;   // [in], over sqrt(transform)
    uint64_t input = 0;         // equal where the same x is transformed and padded in the same way
};

// What the codes of a matrix are multiplied by instead of x [in]: signs and the Hadamard transform.
void transform(const Matrix& m, const float* x, float* to);

// Memory of all threads of a team for products with matrices of at most these sizes. Throws std::bad_alloc.
class Workspace {
   public:
    Workspace(int threads, int64_t columns, int64_t padded_in, int64_t rows, int64_t scratch);
    float* x(int rank) { return reinterpret_cast<float*>(at(rank)); }
    float* sums(int rank) { return reinterpret_cast<float*>(at(rank) + x_bytes_); }
    uint8_t* scratch(int rank) { return at(rank) + x_bytes_ + sums_bytes_; }

   private:
    uint8_t* at(int rank) { return memory_.get() + rank * (x_bytes_ + sums_bytes_ + scratch_bytes_); }
    int64_t x_bytes_, sums_bytes_, scratch_bytes_;
    Bytes memory_;
};

// y = W x + bias for `columns` vectors x [columns][in], in two steps of every thread of a team, with a barrier between
// them. The first adds up this thread's share of the inputs; `moved` is what another product with the same
// Matrix::input has left in its space.x(rank), or NULL. The second writes rows [first, last) of y [columns][out].
void start_product(const Matrix& m, const float* x, int64_t columns, const float* moved, int rank, const Team& team,
                   Workspace& space, Accumulate accumulate);
void finish_product(const Matrix& m, int64_t columns, int64_t first, int64_t last, const Team& team, Workspace& space,
                    float* y);

// The kernel for one of OCTAVO_ISA_*.
Accumulate accumulate_for(int isa);

}  // namespace octavo
