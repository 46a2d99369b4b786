// The kernels of gather.cu behind one function that takes what cuLaunchKernel takes.
#include "../../src/octavo/kernels/cuda/numbers.cuh"

#include "../../src/octavo/kernels/cuda/gather.cu"

#define ARGUMENT(number, type) (*static_cast<type*>(arguments[number]))

extern "C" int octavo_emulate(const char* name, unsigned grid_x, unsigned grid_y, unsigned threads, unsigned shared,
                              void** arguments) {
    Dimensions grid;
    bool well = true;
    grid.x = grid_x;
    grid.y = grid_y;
    const auto is = [&](const char* other) { return strcmp(name, other) == 0; };
    const auto run = [&](const std::function<void()>& body) { well = emulator::launch(grid, threads, shared, body); };
    if (is("octavo_order")) {
        run([&] {
            octavo_order(ARGUMENT(0, const void*), ARGUMENT(1, int), ARGUMENT(2, int64_t), ARGUMENT(3, int64_t),
                         ARGUMENT(4, const int*), ARGUMENT(5, const float*), ARGUMENT(6, const float*),
                         ARGUMENT(7, float*), ARGUMENT(8, float*));
        });
        return well ? 0 : 2;
    }
    const auto multiply = is("octavo_multiply_1")   ? octavo_multiply_1
                          : is("octavo_multiply_2") ? octavo_multiply_2
                          : is("octavo_multiply_4") ? octavo_multiply_4
                                                    : nullptr;
    if (multiply == nullptr) return 1;
    run([&] {
        multiply(ARGUMENT(0, Part), ARGUMENT(1, const float*), ARGUMENT(2, int64_t), ARGUMENT(3, float*),
                 ARGUMENT(4, int), ARGUMENT(5, Ending));
    });
    return well ? 0 : 2;
}
