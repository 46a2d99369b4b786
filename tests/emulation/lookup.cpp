#include "../../src/octavo/kernels/cuda/numbers.cuh"

#include "../../src/octavo/kernels/cuda/lookup.cu"

EMULATE(KERNEL(octavo_multiply_1), KERNEL(octavo_multiply_2), KERNEL(octavo_multiply_4), KERNEL(octavo_exact), KERNEL(octavo_rotate),
        KERNEL(octavo_decode))
