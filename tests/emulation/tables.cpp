#include "../../src/octavo/kernels/cuda/numbers.cuh"

#include "../../src/octavo/kernels/cuda/tables.cu"

EMULATE(KERNEL(octavo_multiply_1), KERNEL(octavo_multiply_2), KERNEL(octavo_multiply_4), KERNEL(octavo_finish), KERNEL(octavo_decode))
