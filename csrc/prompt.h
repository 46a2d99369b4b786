// Products with many vectors at once, as a prompt has them: rows are decoded to bytes once, for all vectors.
//
// x is rounded to eight bits by groups of kGroup inputs, weights to eight bits of the largest. Each costs less than 1 %
// of a product. Translation units with flags of their own include this (see lanes.h).
#pragma once

#include <stdint.h>

#include "lookup.h"

namespace octavo {

constexpr int64_t kGroup = 128;   // inputs that share a factor
constexpr int kFractionBits = 7;  // that decoded weights have before they are rounded

// Vectors as the kernel reads them.
struct PromptInputs {
    int64_t n, width, groups;  // vectors, inputs of each (a multiple of four), groups of kGroup
    int8_t* x;                 // [n][width]
    float* factors;            // [n][groups]: what a unit of x is worth
    int32_t* starts;           // [n][groups]: -128 sum x, since weights come with 128 added
};

// Centroids of the stages as integers [kTable][v]: sums of them, shifted by kFractionBits, are weights over `unit`.
struct PromptBooks {
    const int16_t* book[kMaxMatrixStages];
    float unit;
};

// Fills vector i of `to` from x [in], zeros behind it.
void prompt_input_vbmi(const float* x, int64_t in, int64_t i, const PromptInputs& to);

// Rows of a tile, [kRows] of every vector: y[i * out + r] for r in [tile * kRows, ..) that are below out; scales [rows]
// and bias [out] or NULL. weights has kRows * width bytes of scratch, aligned to 64. There is one scale along a row.
void prompt_tile_vbmi(const LookUp& m, const PromptBooks& books, int64_t tile, const PromptInputs& inputs,
                      const float* bias, int64_t out, uint8_t* weights, float* y);

}  // namespace octavo
