// Matrices of row vectors with codebooks per tile times few vectors, and their rows decoded for many: GPTVQ's.
//
// Compiled once per shape of codes, with these macros:
//   VECTOR    weights of a vector: 1, 2, 4 or 8
//   BITS      bits of a code as it is read: 2, 4, 8 or 16
//
// A vector of inputs meets every centroid of the codebooks of its column once: the products are kept in shared memory,
// and rows add them up by their codes, whatever the length of a vector and the type of a centroid. That takes one read
// and one addition for VECTOR weights, in float32 without rounding; making a table costs as much as VECTOR * entries
// products, for all rows of a tile, so that tall tiles are best.
//
// Lanes have rows: the word of a lane holds the codes of kLaneRows neighbouring rows for one vector of inputs, and
// neighbouring lanes have neighbouring words. Blocks share columns out among themselves; their sums are added up at the
// end, always in the same order.

#if BITS == 2
typedef uint16_t Word;  // 16 rows would not leave a lane enough registers
#else
typedef uint32_t Word;
#endif
constexpr int kLaneRows = 8 * sizeof(Word) / BITS;  // rows of a lane
constexpr int kColumns = 8;                         // vector columns at a time, at most
constexpr int kInteger = 3;                         // beside the types of numbers.cuh: bytes of integers

struct Matrix {
    const Word* codes;      // [vectors][words], kLaneRows rows in a word, the first lowest; zeros behind the last
    const void* books;      // [tile rows][tile columns][1 << entry_bits][VECTOR] of book_type
    const float* units;     // [tile rows][tile columns], what integers are worth, or NULL
    const void* scales;     // [blocks][rows] of scale_type, or NULL
    const float* levels;    // [blocks][1 << level_bits], the scales that integers stand for, or NULL
    const float* bias;      // [rows] or NULL
    int rows, vectors, words;
    int tile_rows, tile_vectors, tile_columns;  // rows and vectors of a tile, number of tiles side by side
    int scale_vectors;                          // vectors of a row that share a scale
    int entry_bits, level_bits, book_type, scale_type;
};

struct alignas(VECTOR) Integers {
    int8_t element[VECTOR];
};
struct alignas(2 * VECTOR) Halves {
    uint16_t element[VECTOR];
};

DEVICE void load_centroid(const Matrix& m, int64_t book, int entry, float (&weights)[VECTOR]) {
    const int64_t at = (book << m.entry_bits) + entry;
    if (m.book_type == kInteger) {
        const Integers integers = static_cast<const Integers*>(m.books)[at];
        const float unit = m.units[book];
        for (int j = 0; j < VECTOR; ++j) weights[j] = static_cast<float>(integers.element[j]) * unit;
    } else if (m.book_type == kFloat32) {
        for (int j = 0; j < VECTOR; ++j) weights[j] = static_cast<const float*>(m.books)[at * VECTOR + j];
    } else {
        const Halves halves = static_cast<const Halves*>(m.books)[at];
        for (int j = 0; j < VECTOR; ++j) weights[j] = load_as_float(halves.element, j, m.book_type);
    }
}

DEVICE float scale_of(const Matrix& m, int block, int row) {
    if (m.scales == nullptr) return 1.0f;
    const int64_t at = static_cast<int64_t>(block) * m.rows + row;
    if (m.scale_type != kInteger) return load_as_float(m.scales, at, m.scale_type);
    const int level = static_cast<const uint8_t*>(m.scales)[at];
    return m.levels[(static_cast<int64_t>(block) << m.level_bits) + level];
}

DEVICE int code_of(uint32_t word, int r) { return static_cast<int>(word >> BITS * r & ((1u << BITS) - 1u)); }

// The products of an entry, one for every token.
template <int Tokens>
struct alignas(4 * Tokens) Products {
    float of[Tokens];
};

// partial [splits][tokens][rows] float32 for x [tokens][vectors * VECTOR]. Grid (rows / (threads * kLaneRows) up,
// splits): a block has `share` vector columns, `step` (kColumns at most) at a time.
template <int Tokens>
DEVICE void multiply(const Matrix& m, const float* x, int share, int step, float* partial) {
    extern __shared__ uint4 memory[];
    Products<Tokens>* const tables = reinterpret_cast<Products<Tokens>*>(memory);  // [column][tile][entry]
    const int first = blockIdx.x * blockDim.x * kLaneRows, begin = blockIdx.y * share;
    const int end = first + static_cast<int>(blockDim.x) * kLaneRows < m.rows ? first + blockDim.x * kLaneRows : m.rows;
    const int last = begin + share < m.vectors ? begin + share : m.vectors;
    const int tile = first / m.tile_rows;
    const int size = ((end - 1) / m.tile_rows - tile + 1) << m.entry_bits;  // entries of a column
    const int lane_word = blockIdx.x * blockDim.x + threadIdx.x, lane_row = lane_word * kLaneRows;
    int offset[kLaneRows];
    for (int r = 0; r < kLaneRows; ++r)
        offset[r] = ((lane_row + r < end ? lane_row + r : end - 1) / m.tile_rows - tile) << m.entry_bits;
    float sums[Tokens][kLaneRows] = {}, totals[Tokens][kLaneRows] = {};
    int block = begin / m.scale_vectors, block_end = (block + 1) * m.scale_vectors;
#pragma unroll 1
    for (int column = begin, count; column < last; column += count) {
        const int stop = block_end < last ? block_end : last;
        count = step < stop - column ? step : stop - column;
        // Codes are asked for before the tables are made, which takes as long as they need.
        Word words[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
            words[c] = c < count && lane_word < m.words
                           ? __ldcs(m.codes + static_cast<int64_t>(column + c) * m.words + lane_word)
                           : Word{0};
        __syncthreads();
#pragma unroll 1
        for (int c = 0; c < count; ++c) {
            float in[Tokens][VECTOR];
            for (int t = 0; t < Tokens; ++t)
                for (int j = 0; j < VECTOR; ++j)
                    in[t][j] = x[(static_cast<int64_t>(t) * m.vectors + column + c) * VECTOR + j];
            const int64_t from = static_cast<int64_t>(tile) * m.tile_columns + (column + c) / m.tile_vectors;
#pragma unroll 1
            for (int i = threadIdx.x; i < size; i += blockDim.x) {
                float weights[VECTOR];
                const int64_t book = from + static_cast<int64_t>(i >> m.entry_bits) * m.tile_columns;
                load_centroid(m, book, i & ((1 << m.entry_bits) - 1), weights);
                Products<Tokens> products;
                for (int t = 0; t < Tokens; ++t) {
                    products.of[t] = 0.0f;
                    for (int j = 0; j < VECTOR; ++j) products.of[t] += weights[j] * in[t][j];
                }
                tables[c * size + i] = products;
            }
        }
        __syncthreads();
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            if (c >= count) continue;
#pragma unroll
            for (int r = 0; r < kLaneRows; ++r) {
                const Products<Tokens> products = tables[c * size + offset[r] + code_of(words[c], r)];
                for (int t = 0; t < Tokens; ++t) sums[t][r] += products.of[t];
            }
        }
        if (column + count != stop) continue;
        for (int r = 0; r < kLaneRows; ++r) {
            const float scale = scale_of(m, block, lane_row + r < end ? lane_row + r : end - 1);
            for (int t = 0; t < Tokens; ++t) {
                totals[t][r] += sums[t][r] * scale;
                sums[t][r] = 0.0f;
            }
        }
        ++block;
        block_end += m.scale_vectors;
    }
    for (int t = 0; t < Tokens; ++t) {
        float* const to = partial + (static_cast<int64_t>(blockIdx.y) * Tokens + t) * m.rows;
        for (int r = 0; r < kLaneRows; ++r)
            if (lane_row + r < end) to[lane_row + r] = totals[t][r];
    }
}

#define MULTIPLY(TOKENS, BLOCKS)                                                             \
    extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) octavo_multiply_##TOKENS( \
        Matrix m, const float* x, int share, int step, float* partial) {                     \
        multiply<TOKENS>(m, x, share, step, partial);                                        \
    }
MULTIPLY(1, 2)
MULTIPLY(2, 1)
MULTIPLY(4, 1)
#undef MULTIPLY

// y [tokens][rows] of `type` from the sums of all splits. Grid (rows / threads up, tokens).
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    octavo_finish(const float* partial, int splits, int64_t rows, const float* bias, void* y, int type) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, token = blockIdx.y;
    if (row >= rows) return;
    float sum = bias == nullptr ? 0.0f : bias[row];
#pragma unroll 8
    for (int s = 0; s < splits; ++s) sum += partial[(static_cast<int64_t>(s) * gridDim.y + token) * rows + row];
    store_as(y, token * rows + row, sum, type);
}

// Rows [first, first + rows) as numbers of `type`, [rows][in], in the order of the columns that is stored; `first` is a
// multiple of kLaneRows. A thread decodes a word; those of a warp have neighbouring vectors, those of a block
// neighbouring words as well, so that what is read and what is written both are whole lines.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    octavo_decode(Matrix m, int64_t first, int64_t rows, int64_t in, void* to, int type) {
    constexpr int kWords = kThreads / 32;  // of a block
    const int64_t across = (m.vectors + 31) / 32, down = (rows + kLaneRows * kWords - 1) / (kLaneRows * kWords);
#pragma unroll 1
    for (int64_t n = blockIdx.x; n < across * down; n += gridDim.x) {
        const int vector = static_cast<int>(n % across * 32) + threadIdx.x % 32;
        const int64_t word = first / kLaneRows + n / across * kWords + threadIdx.x / 32;
        if (vector >= m.vectors || word >= m.words) continue;
        const Word codes = m.codes[vector * static_cast<int64_t>(m.words) + word];
        for (int r = 0; r < kLaneRows; ++r) {
            const int row = static_cast<int>(word) * kLaneRows + r;
            if (row >= first + rows) break;
            const int64_t book = static_cast<int64_t>(row / m.tile_rows) * m.tile_columns + vector / m.tile_vectors;
            float weights[VECTOR];
            load_centroid(m, book, code_of(codes, r), weights);
            const float scale = scale_of(m, vector / m.scale_vectors, row);
            for (int j = 0; j < VECTOR && vector * VECTOR + j < in; ++j)
                store_as(to, (row - first) * in + vector * VECTOR + j, weights[j] * scale, type);
        }
    }
}
