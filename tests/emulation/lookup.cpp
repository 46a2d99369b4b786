// The kernels of lookup.cu behind one function that takes what cuLaunchKernel takes.
#include "../../src/octavo/kernels/cuda/numbers.cuh"

#include "../../src/octavo/kernels/cuda/lookup.cu"

#define ARGUMENT(number, type) (*static_cast<type*>(arguments[number]))

extern "C" int octavo_emulate(const char* name, unsigned grid_x, unsigned grid_y, unsigned threads, unsigned shared,
                              void** arguments) {
    Dimensions grid;
    bool well = true;
    grid.x = grid_x;
    grid.y = grid_y;
    const auto is = [&](const char* other) { return strcmp(name, other) == 0; };
    const auto run = [&](const std::function<void()>& body) { well = emulator::launch(grid, threads, shared, body); };
    if (is("octavo_rotate")) {
        run([&] {
            octavo_rotate(ARGUMENT(0, const void*), ARGUMENT(1, int), ARGUMENT(2, const float*), ARGUMENT(3, int64_t),
                          ARGUMENT(4, int64_t), ARGUMENT(5, int), ARGUMENT(6, int8_t*), ARGUMENT(7, float*),
                          ARGUMENT(8, float*));
        });
    } else if (is("octavo_exact")) {
        run([&] {
            octavo_exact(ARGUMENT(0, Matrix), ARGUMENT(1, const float*), ARGUMENT(2, void*), ARGUMENT(3, int));
        });
    } else if (is("octavo_decode")) {
        run([&] {
            octavo_decode(ARGUMENT(0, Matrix), ARGUMENT(1, int64_t), ARGUMENT(2, int64_t), ARGUMENT(3, int64_t),
                          ARGUMENT(4, void*), ARGUMENT(5, int));
        });
    } else {
        const auto multiply = is("octavo_multiply_1")   ? octavo_multiply_1
                              : is("octavo_multiply_2") ? octavo_multiply_2
                              : is("octavo_multiply_4") ? octavo_multiply_4
                                                        : nullptr;
        if (multiply == nullptr) return 1;
        run([&] {
            multiply(ARGUMENT(0, Matrix), ARGUMENT(1, const int8_t*), ARGUMENT(2, const float*), ARGUMENT(3, void*),
                     ARGUMENT(4, int));
        });
    }
    return well ? 0 : 2;
}
