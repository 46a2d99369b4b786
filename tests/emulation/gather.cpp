#include "../../src/octavo/kernels/cuda/numbers.cuh"

#include "../../src/octavo/kernels/cuda/gather.cu"

EMULATE(KERNEL(octavo_multiply_1), KERNEL(octavo_multiply_2), KERNEL(octavo_multiply_4), KERNEL(octavo_order),
        KERNEL(octavo_decode))
