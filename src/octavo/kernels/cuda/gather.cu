// Matrices of vectors along the outputs times few vectors, with centroids where they lie: VPTQ's books of 65,536.
//
// Compiled once per layout, with these macros:
//   VECTOR    weights of a vector, consecutive outputs of one input
//   STAGES    additive books, 1 to 4
//   BITS      bits of a code of each stage, in braces: 8 (books of 256, in shared memory) or 16 (in global memory)
//   COPIES    how often a centroid stands in shared memory, so that lanes rarely wait for each other
//   BOOKS     the type of the books: kFloat16 or kBfloat16
//
// A large book comes from the second-level cache, 32 bytes for every code whatever the centroid's size, and that bounds
// this: centroids stay as they are stored. A warp has a row of vectors, a lane kCodes neighbouring inputs of it at a
// time; norms and order are those of the inputs, seen to once.

constexpr int kBits[STAGES] = BITS;
constexpr int kCodes = 8;

struct Part {
    const uint8_t* codes[STAGES];  // [vector rows][places][kCodes], one byte or two each, zeros behind the last
    const uint16_t* books[STAGES];  // [entries][VECTOR]; of 8 bits: 256 entries
    int64_t rows, vector_rows, places;
};

// What becomes of the sums: y [tokens][rows] of `type` if there is one, or else they stay sums.
struct Ending {
    void* y;
    const float* scales;  // [rows] or NULL
    const float* bias;    // [rows] or NULL
    const float* added;   // [tokens], to all rows, or NULL
    int type;
};

// x [tokens][in] of `type` in the order of the parts and scaled, zeros up to `padded`; added[token] = sum offset_i x_i.
// order [padded] says which input stands where, -1 for none. Grid (1 + padded / kThreads up, tokens): the first block
// of a token adds up, the others move.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    octavo_order(const void* x, int type, int64_t in, int64_t padded, const int* order, const float* scales,
                 const float* offsets, float* moved, float* added) {
    extern __shared__ uint4 memory[];
    const int64_t token = blockIdx.y;
    if (blockIdx.x > 0) {
        const int64_t i = (blockIdx.x - 1) * static_cast<int64_t>(kThreads) + threadIdx.x;
        if (i >= padded) return;
        const int from = order[i];
        const float value = from < 0 ? 0.0f : load_as_float(x, token * in + from, type);
        moved[token * padded + i] = from < 0 || scales == nullptr ? value : value * scales[from];
        return;
    }
    float* const partial = reinterpret_cast<float*>(memory);
    float sum = 0.0f;
    if (offsets != nullptr) {
#pragma unroll 8
        for (int64_t i = threadIdx.x; i < in; i += kThreads) sum += offsets[i] * load_as_float(x, token * in + i, type);
    }
    partial[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) added[token] = partial[0];
}

DEVICE float book_to_float(uint16_t element) {
    return BOOKS == kFloat16 ? half_to_float(element) : bits_to_float(static_cast<uint32_t>(element) << 16);
}

// Adds a centroid to weights, eight elements at once where its length allows.
DEVICE void add_centroid(const uint16_t* at, float (&weights)[VECTOR]) {
    if (VECTOR % 8 == 0) {
        for (int q = 0; q < VECTOR / 8; ++q) {
            const uint4 four = reinterpret_cast<const uint4*>(at)[q];
            const uint32_t words[4] = {four.x, four.y, four.z, four.w};
            for (int w = 0; w < 4; ++w) {
                weights[(8 * q + 2 * w) % VECTOR] += book_to_float(static_cast<uint16_t>(words[w]));
                weights[(8 * q + 2 * w + 1) % VECTOR] += book_to_float(static_cast<uint16_t>(words[w] >> 16));
            }
        }
    } else {
        for (int j = 0; j < VECTOR; ++j) weights[j] += book_to_float(at[j]);
    }
}

struct Codes {
    uint32_t word[STAGES][4];
};

DEVICE Codes load_codes(const Part& part, int64_t row, int64_t place) {
    Codes codes;
    for (int s = 0; s < STAGES; ++s) {
        const uint8_t* at = part.codes[s] + (row * part.places + place) * kBits[s];
        if (kBits[s] == 16) {
            const uint4 four = __ldcs(reinterpret_cast<const uint4*>(at));
            codes.word[s][0] = four.x;
            codes.word[s][1] = four.y;
            codes.word[s][2] = four.z;
            codes.word[s][3] = four.w;
        } else {
            const uint2 two = __ldcs(reinterpret_cast<const uint2*>(at));
            codes.word[s][0] = two.x;
            codes.word[s][1] = two.y;
        }
    }
    return codes;
}

DEVICE uint32_t code_of(const Codes& codes, int stage, int i) {
    if (kBits[stage] == 16) return codes.word[stage][i / 2] >> 16 * (i % 2) & 65535u;
    return codes.word[stage][i / 4 % 2] >> 8 * (i % 4) & 255u;
}

// Books of 256 to shared memory, [stage][entry][copy][VECTOR]; stages with larger ones have no place there.
DEVICE void load_books(const Part& part, uint16_t* shared) {
    for (int s = 0; s < STAGES; ++s) {
        if (kBits[s] != 8) continue;
#pragma unroll 1
        for (int i = threadIdx.x; i < 256 * COPIES; i += kThreads)
            for (int j = 0; j < VECTOR; ++j) shared[i * VECTOR + j] = part.books[s][i / COPIES * VECTOR + j];
        shared += 256 * COPIES * VECTOR;
    }
    __syncthreads();
}

// Sums [tokens][rows] float32 of this part, on top of what is there if `add`; with an ending they become y.
template <int Tokens>
DEVICE void multiply(const Part& part, const float* x, int64_t x_stride, float* sums, int add, const Ending& ending) {
    extern __shared__ uint4 memory[];
    load_books(part, reinterpret_cast<uint16_t*>(memory));
    const int lane = threadIdx.x % 32;
    const uint16_t* mine = reinterpret_cast<const uint16_t*>(memory) + lane % COPIES * VECTOR;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
#pragma unroll 1
    for (int64_t row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32; row < part.vector_rows; row += warps) {
        float total[Tokens][VECTOR] = {};
#pragma unroll 1
        for (int64_t place = lane; place < part.places; place += 32) {
            const Codes codes = load_codes(part, row, place);
#pragma unroll
            for (int i = 0; i < kCodes; ++i) {
                float weights[VECTOR] = {};
                const uint16_t* small = mine;
#pragma unroll
                for (int s = 0; s < STAGES; ++s) {
                    const uint32_t code = code_of(codes, s, i);
                    if (kBits[s] == 8) {
                        add_centroid(small + code * (COPIES * VECTOR), weights);
                        small += 256 * COPIES * VECTOR;
                    } else {
                        add_centroid(part.books[s] + code * VECTOR, weights);
                    }
                }
#pragma unroll
                for (int t = 0; t < Tokens; ++t) {
                    const float element = x[t * x_stride + place * kCodes + i];
                    for (int j = 0; j < VECTOR; ++j) total[t][j] += element * weights[j];
                }
            }
        }
        // Lane j goes on with output j of the vector. First all sums, then what differs between lanes.
        float kept[Tokens];
#pragma unroll
        for (int t = 0; t < Tokens; ++t) {
            kept[t] = 0.0f;
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                float all = total[t][j];
                for (int other = 16; other >= 1; other /= 2) all += __shfl_xor_sync(0xFFFFFFFFu, all, other);
                kept[t] = lane == j ? all : kept[t];
            }
        }
        const int64_t output = row * VECTOR + lane;
        if (lane < VECTOR && output < part.rows) {
#pragma unroll
            for (int t = 0; t < Tokens; ++t) {
                const int64_t at = t * part.rows + output;
                const float sum = add ? kept[t] + sums[at] : kept[t];
                if (ending.y == nullptr) {
                    sums[at] = sum;
                } else {
                    const float scaled = ending.scales == nullptr ? sum : sum * ending.scales[output];
                    const float added = ending.added == nullptr ? 0.0f : ending.added[t];
                    const float bias = ending.bias == nullptr ? 0.0f : ending.bias[output];
                    store_as(ending.y, at, scaled + added + bias, ending.type);
                }
            }
        }
    }
}

#define MULTIPLY(TOKENS)                                                                              \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) octavo_multiply_##TOKENS(               \
        Part part, const float* x, int64_t x_stride, float* sums, int add, Ending ending) {           \
        multiply<TOKENS>(part, x, x_stride, sums, add, ending);                                       \
    }
MULTIPLY(1)
MULTIPLY(2)
MULTIPLY(4)
#undef MULTIPLY

// Rows [first, first + rows) of this part as numbers of `type`, [rows][stride], from `column` on and up to whole places,
// zeros behind the last column; `first` is a multiple of VECTOR, column_scales [columns] and row_scales [rows] or NULL.
// A thread decodes the codes of a place.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    octavo_decode(Part part, int64_t first, int64_t rows, int64_t columns, const float* column_scales,
                  const float* row_scales, int64_t column, int64_t stride, void* to, int type) {
    const int64_t across = part.places, down = (rows + VECTOR - 1) / VECTOR;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
#pragma unroll 1
    for (int64_t n = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; n < across * down; n += step) {
        const int64_t row = n / across, place = n % across;
        const Codes codes = load_codes(part, first / VECTOR + row, place);
#pragma unroll
        for (int i = 0; i < kCodes; ++i) {
            const int64_t at = place * kCodes + i;
            float weights[VECTOR] = {};
#pragma unroll
            for (int s = 0; s < STAGES; ++s)
                add_centroid(part.books[s] + static_cast<int64_t>(code_of(codes, s, i)) * VECTOR, weights);
            const float scale = at >= columns ? 0.0f : column_scales == nullptr ? 1.0f : column_scales[at];
            for (int j = 0; j < VECTOR && row * VECTOR + j < rows; ++j) {
                const int64_t output = row * VECTOR + j;
                const float all = row_scales == nullptr ? scale : scale * row_scales[first + output];
                store_as(to, output * stride + column + at, at >= columns ? 0.0f : weights[j] * all, type);
            }
        }
    }
}
