// Matrices of small additive codebooks times few vectors, and their rows decoded for many.
//
// Compiled once per layout, with these macros:
//   VECTOR    weights of a vector: 4 or 8
//   STAGES    additive books, 1 to 4
//   SIGNS     1: centroids are magnitudes, at least 1, and every vector has VECTOR sign bits (one stage only); else 0
//   BITS      the bits of a code of each stage, in braces: 4 or 8; with SIGNS followed by VECTOR
//   COPIES    how often a centroid stands in shared memory (below)
//
// What bounds such a product, once memory does not, is reading centroids. They have 8 bits per element and stand in
// shared memory, COPIES times side by side: with as many copies as lanes that are served at once (32 of 4 bytes, 16 of
// 8), every lane has banks of its own and no two ever wait for each other. Inputs are rounded to 8 bits by groups, so
// that dp4a multiplies four weights at a time; octavo_exact keeps them in float32 instead.
//
// A lane reads kCodes codes of each stage at once, neighbouring lanes neighbouring ones; a warp goes through kRows rows
// together, from left to right, and asks for its next codes before it uses those that are there.

constexpr int kPlanes = STAGES + SIGNS;    // of codes; the signs are the last
constexpr int kBits[kPlanes] = BITS;
static_assert(SIGNS == 0 || STAGES == 1, "a sum of signed magnitudes would need another order");
constexpr int kCodes = 8;                  // codes of a lane at a time, of each stage
constexpr int kRows = 4;                   // rows of a warp at a time
constexpr int kGroup = kCodes * VECTOR;    // inputs of a lane at a time, which share a scale
constexpr int kWords = VECTOR / 4;         // 32-bit words of a centroid
constexpr int kStride = COPIES * VECTOR;   // bytes from one centroid to the next

struct Matrix {
    const uint8_t* codes[kPlanes];  // [rows][ceil(vectors / kCodes)][kCodes codes], rounded up to whole codes of kCodes
    const uint32_t* books;          // [stages][256][kWords], zeros behind the last
    float units[STAGES];            // worth of the integers of each book
    const float* scales;            // [rows]
    const float* bias;              // [rows] or NULL
    int64_t rows, vectors;
};

// ---------------------------------------------------------------------------------------------------- inputs

// Signs, Hadamard blocks of `block` (a power of two up to 256, or 1), and the rounding to bytes by groups.
// x [tokens][in] of `type`; bytes [tokens][padded], scales [tokens][padded / kGroup], padded a multiple of kGroup.
// With `floats`, [tokens][padded] float32, nothing is rounded. A warp has 256 inputs; grid (padded / 256 up, tokens).
extern "C" __global__ void octavo_rotate(const void* x, int type, const float* signs, int64_t in, int64_t padded,
                                         int block, int8_t* bytes, float* scales, float* floats) {
    const int lane = threadIdx.x % 32;
    const int64_t token = blockIdx.y;
    const int64_t first = (blockIdx.x * static_cast<int64_t>(blockDim.x / 32) + threadIdx.x / 32) * 256 + lane * 8;
    float values[8];
    for (int j = 0; j < 8; ++j) {
        const int64_t i = first + j;
        values[j] = i < in ? load_as_float(x, token * in + i, type) * (block > 1 ? signs[i] : 1.0f) : 0.0f;
    }
    for (int half = 1; half < block; half *= 2) {
        if (half < 8) {
            for (int j = 0; j < 8; ++j) {
                if ((j & half) != 0) continue;
                const float low = values[j], high = values[j + half];
                values[j] = low + high;
                values[j + half] = low - high;
            }
        } else {
            const bool upper = (lane * 8 & half) != 0;
            for (int j = 0; j < 8; ++j) {
                const float other = __shfl_xor_sync(0xFFFFFFFFu, values[j], half / 8);
                values[j] = upper ? other - values[j] : values[j] + other;
            }
        }
    }
    const float norm = rsqrtf(static_cast<float>(block));
    float largest = 0.0f;
    bool finite = true;
    for (int j = 0; j < 8; ++j) {
        values[j] *= norm;
        finite = finite && fabsf(values[j]) < 3.0e38f;
        largest = fmaxf(largest, fabsf(values[j]));
    }
    if (!finite) largest = bits_to_float(0x7FC00000u);
    if (floats != nullptr) {
        for (int j = 0; j < 8 && first + j < padded; ++j) floats[token * padded + first + j] = values[j];
        return;
    }
    // NaN and infinity go through the scale of their group, to every product.
    for (int other = 1; other < kGroup / 8; other *= 2) {
        const float theirs = __shfl_xor_sync(0xFFFFFFFFu, largest, other);
        largest = largest >= theirs || largest != largest ? largest : theirs;
    }
    const float step = largest > 0.0f || largest != largest ? largest / 127.0f : 1.0f, back = 1.0f / step;
    if (first >= padded) return;
    for (int j = 0; j < 8; ++j)
        bytes[token * padded + first + j] =
            largest != largest ? 1 : static_cast<int8_t>(__float2int_rn(values[j] * back));
    if (first % kGroup == 0) scales[token * (padded / kGroup) + first / kGroup] = step;
}

// ---------------------------------------------------------------------------------------------------- centroids

// The books of a matrix in shared memory: [stage][centroid][copy].
DEVICE void load_books(const Matrix& m, uint32_t* shared) {
#pragma unroll 1
    for (int i = threadIdx.x; i < STAGES * 256 * COPIES; i += blockDim.x)
        for (int w = 0; w < kWords; ++w) shared[i * kWords + w] = m.books[i / COPIES * kWords + w];
    __syncthreads();
}

struct Centroid {
    uint32_t word[kWords];
};

DEVICE Centroid centroid_at(const uint8_t* mine, int stage, uint32_t code) {
    const uint8_t* at = mine + stage * 256 * kStride + code * kStride;
    Centroid found;
    if (kWords == 2) {
        const uint2 both = *reinterpret_cast<const uint2*>(at);
        found.word[0] = both.x;
        found.word[kWords - 1] = both.y;
    } else {
        found.word[0] = *reinterpret_cast<const uint32_t*>(at);
    }
    return found;
}

// kCodes codes of every plane.
struct Codes {
    uint32_t word[kPlanes][2];
};

DEVICE Codes load_codes(const Matrix& m, int64_t row, int64_t place, int64_t places) {
    Codes codes;
    for (int s = 0; s < kPlanes; ++s) {
        const uint8_t* at = m.codes[s] + (row * places + place) * kBits[s];
        if (kBits[s] == 8) {
            const uint2 both = __ldcs(reinterpret_cast<const uint2*>(at));
            codes.word[s][0] = both.x;
            codes.word[s][1] = both.y;
        } else {
            codes.word[s][0] = __ldcs(reinterpret_cast<const uint32_t*>(at));
            codes.word[s][1] = 0;
        }
    }
    return codes;
}

DEVICE uint32_t code_of(const Codes& codes, int plane, int i) {
    if (kBits[plane] == 8) return codes.word[plane][i / 4] >> 8 * (i % 4) & 255u;
    return codes.word[plane][0] >> 4 * i & 15u;
}

// Four magnitudes with their signs, of which the lowest bits are four. None is 0, so that no byte carries into the next.
DEVICE uint32_t with_signs(uint32_t magnitudes, uint32_t bits) {
    const uint32_t negative = (bits & 15u) * 0x00204081u & 0x01010101u;
    return (magnitudes ^ negative * 255u) + negative;
}

// Element j of a vector with the signs of the vector.
DEVICE float with_sign(float weight, uint32_t bits, int j) { return SIGNS && (bits >> j & 1u) ? -weight : weight; }

// The signs of vector i; 0 where there are none.
DEVICE uint32_t signs_of(const Codes& codes, int i) { return SIGNS ? code_of(codes, kPlanes - 1, i) : 0u; }

// Whether all books count in one unit, as the universal ones of two bits and less do: then one sum will do.
DEVICE bool one_unit(const Matrix& m) {
    bool same = true;
    for (int s = 1; s < STAGES; ++s) same = same && m.units[s] == m.units[0];
    return same;
}

// ---------------------------------------------------------------------------------------------------- products

// Sums of kRows numbers over the lanes of a warp; lane 0 has the first, lane 8 the second and so on.
DEVICE float sum_rows(float (&sums)[kRows], int lane) {
    // Half of the lanes go on with half of the numbers, twice; then all lanes of a quarter have the same one.
    for (int half = kRows / 2, other = 16; half >= 1; half /= 2, other /= 2) {
        const bool upper = (lane & other) != 0;
        for (int r = 0; r < half; ++r) {
            const float given = upper ? sums[r] : sums[r + half];
            const float kept = upper ? sums[r + half] : sums[r];
            sums[r] = kept + __shfl_xor_sync(0xFFFFFFFFu, given, other);
        }
    }
    for (int other = 4; other >= 1; other /= 2) sums[0] += __shfl_xor_sync(0xFFFFFFFFu, sums[0], other);
    return sums[0];
}

DEVICE void store_rows(const Matrix& m, float sum, int64_t first, int lane, int64_t token, void* y, int type) {
    const int64_t row = first + lane / 8;
    if (lane % 8 != 0 || row >= m.rows) return;
    const float bias = m.bias == nullptr ? 0.0f : m.bias[row];
    store_as(y, token * m.rows + row, sum * m.scales[row] + bias, type);
}

// y [tokens][rows] of `type` for Tokens vectors as octavo_rotate left them. Any grid of blocks of kThreads.
template <int Tokens>
DEVICE void multiply(const Matrix& m, const int8_t* bytes, const float* scales, void* y, int type) {
    extern __shared__ uint4 memory[];
    load_books(m, reinterpret_cast<uint32_t*>(memory));
    const int lane = threadIdx.x % 32;
    const uint8_t* mine = reinterpret_cast<const uint8_t*>(memory) + lane % COPIES * VECTOR;
    const int64_t places = (m.vectors + kCodes - 1) / kCodes, warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
    const bool same = one_unit(m);
#pragma unroll 1
    for (int64_t group = blockIdx.x * (kThreads / 32) + threadIdx.x / 32; group * kRows < m.rows; group += warps) {
        const int64_t first = group * kRows;
        float sums[Tokens][kRows] = {};
        Codes next[kRows];
        for (int r = 0; r < kRows; ++r)
            if (lane < places) next[r] = load_codes(m, first + r < m.rows ? first + r : first, lane, places);
        // Lanes beyond the end of the rows have nothing to add, but go on to the sums.
#pragma unroll 1
        for (int64_t place = lane; place < places; place += 32) {
            Codes codes[kRows];
            for (int r = 0; r < kRows; ++r) {
                codes[r] = next[r];
                if (place + 32 < places)
                    next[r] = load_codes(m, first + r < m.rows ? first + r : first, place + 32, places);
            }
            uint32_t x[Tokens][kCodes * kWords];
            float scale[Tokens];
#pragma unroll
            for (int t = 0; t < Tokens; ++t) {
                const uint4* from = reinterpret_cast<const uint4*>(bytes + (t * places + place) * kGroup);
#pragma unroll
                for (int i = 0; i < kGroup / 16; ++i) {
                    const uint4 four = from[i];
                    x[t][4 * i] = four.x;
                    x[t][4 * i + 1] = four.y;
                    x[t][4 * i + 2] = four.z;
                    x[t][4 * i + 3] = four.w;
                }
                scale[t] = scales[t * places + place];
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                int whole[Tokens][STAGES] = {};
#pragma unroll
                for (int i = 0; i < kCodes; ++i) {
                    const uint32_t signs = signs_of(codes[r], i);
#pragma unroll
                    for (int s = 0; s < STAGES; ++s) {
                        Centroid centroid = centroid_at(mine, s, code_of(codes[r], s, i));
                        for (int w = 0; SIGNS && w < kWords; ++w)
                            centroid.word[w] = with_signs(centroid.word[w], signs >> 4 * w);
#pragma unroll
                        for (int t = 0; t < Tokens; ++t)
#pragma unroll
                            for (int w = 0; w < kWords; ++w)
                                whole[t][s] = __dp4a(static_cast<int>(centroid.word[w]),
                                                     static_cast<int>(x[t][i * kWords + w]), whole[t][s]);
                    }
                }
#pragma unroll
                for (int t = 0; t < Tokens; ++t) {
                    float sum = 0.0f;
                    if (same) {
                        int all = 0;
                        for (int s = 0; s < STAGES; ++s) all += whole[t][s];
                        sum = static_cast<float>(all) * m.units[0];
                    } else {
                        for (int s = 0; s < STAGES; ++s) sum += static_cast<float>(whole[t][s]) * m.units[s];
                    }
                    sums[t][r] += sum * scale[t];
                }
            }
        }
        for (int t = 0; t < Tokens; ++t) store_rows(m, sum_rows(sums[t], lane), first, lane, t, y, type);
    }
}

#define MULTIPLY(TOKENS, BLOCKS)                                                                                     \
    extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) octavo_multiply_##TOKENS(                         \
        Matrix m, const int8_t* bytes, const float* scales, void* y, int type) {                             \
        multiply<TOKENS>(m, bytes, scales, y, type);                                                         \
    }
MULTIPLY(1, 2)
MULTIPLY(2, 1)
MULTIPLY(4, 1)
#undef MULTIPLY

// The same for one vector of float32, [places * kGroup], without rounding it; token by token along y of the grid.
extern "C" __global__ void __launch_bounds__(kThreads, 1) octavo_exact(Matrix m, const float* x, void* y, int type) {
    extern __shared__ uint4 memory[];
    load_books(m, reinterpret_cast<uint32_t*>(memory));
    const int lane = threadIdx.x % 32;
    const uint8_t* mine = reinterpret_cast<const uint8_t*>(memory) + lane % COPIES * VECTOR;
    const int64_t places = (m.vectors + kCodes - 1) / kCodes, warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
    const float* from = x + blockIdx.y * places * kGroup;
#pragma unroll 1
    for (int64_t group = blockIdx.x * (kThreads / 32) + threadIdx.x / 32; group * kRows < m.rows; group += warps) {
        float sums[kRows] = {};
#pragma unroll 1
        for (int64_t place = lane; place < places; place += 32) {
            for (int r = 0; r < kRows; ++r) {
                const int64_t row = group * kRows + r < m.rows ? group * kRows + r : group * kRows;
                const Codes codes = load_codes(m, row, place, places);
#pragma unroll
                for (int i = 0; i < kCodes; ++i) {
                    float weights[VECTOR] = {};
#pragma unroll
                    for (int s = 0; s < STAGES; ++s) {
                        const Centroid centroid = centroid_at(mine, s, code_of(codes, s, i));
                        for (int j = 0; j < VECTOR; ++j) {
                            const int8_t element = static_cast<int8_t>(centroid.word[j / 4] >> 8 * (j % 4));
                            weights[j] += static_cast<float>(element) * m.units[s];
                        }
                    }
                    const uint32_t signs = signs_of(codes, i);
                    for (int j = 0; j < VECTOR; ++j)
                        sums[r] += with_sign(weights[j], signs, j) * from[place * kGroup + i * VECTOR + j];
                }
            }
        }
        store_rows(m, sum_rows(sums, lane), group * kRows, lane, blockIdx.y, y, type);
    }
}

// Rows [first, first + rows) as numbers of `type`, [rows][in], before their transform; a thread decodes a vector.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    octavo_decode(Matrix m, int64_t first, int64_t rows, int64_t in, void* to, int type) {
    const int64_t places = (m.vectors + kCodes - 1) / kCodes;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
#pragma unroll 1
    for (int64_t n = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; n < rows * m.vectors; n += step) {
        const int64_t row = n / m.vectors, vector = n % m.vectors, place = vector / kCodes;
        const int i = static_cast<int>(vector % kCodes);
        const Codes codes = load_codes(m, first + row, place, places);
        float weights[VECTOR] = {};
        for (int s = 0; s < STAGES; ++s) {
            const uint32_t* centroid = m.books + (s * 256 + code_of(codes, s, i)) * kWords;
            for (int j = 0; j < VECTOR; ++j) {
                const int8_t element = static_cast<int8_t>(centroid[j / 4] >> 8 * (j % 4));
                weights[j] += static_cast<float>(element) * m.units[s];
            }
        }
        const float scale = m.scales[first + row];
        const uint32_t signs = signs_of(codes, i);
        for (int j = 0; j < VECTOR && vector * VECTOR + j < in; ++j)
            store_as(to, row * in + vector * VECTOR + j, with_sign(weights[j] * scale, signs, j), type);
    }
}
