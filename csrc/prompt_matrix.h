// What prompt.h is for, from the side of a matrix.
#pragma once

#include <vector>

#include "matrix.h"
#include "prompt.h"

namespace octavo {

struct PromptBook {
    std::vector<int16_t> numbers[kMaxMatrixStages];
    PromptBooks view = {};
    // `largest`: of the weights, before their rows' scales; the few beyond are clipped.
    void load(const LookUp& m, float largest);
};

// y[i] = W x[i] + bias for x [n][in]. Throws std::bad_alloc.
void multiply_many(const Matrix& matrix, const LookUp& m, const PromptBooks& books, const float* x, int64_t n,
                   int threads, float* y);

}  // namespace octavo
