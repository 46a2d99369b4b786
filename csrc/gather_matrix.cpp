// The matrix whose centroids are added up where they lie; see gather.h.
#include <algorithm>
#include <cmath>
#include <new>
#include <numeric>
#include <vector>

#include "cpu.h"
#include "gather.h"
#include "half.h"
#include "matrix.h"
#include "octavo_c.h"

namespace octavo {
namespace {

// Most numbers of a book that is kept as floats, and as half floats. Larger ones, VPTQ's 65,536 vectors of eight, are
// rounded to bytes, so that they leave room in a second-level cache: that is a rounding of the weights of 1 %, beside
// quantization errors of 10 to 30 %.
constexpr int64_t kFloatBook = 1 << 16, kHalfBook = 1 << 18;

GatherKernels kernels_for(int isa, int v) {
    switch (isa) {
#if defined(OCTAVO_X86)
        case OCTAVO_ISA_VBMI:
        case OCTAVO_ISA_AVX512: return gather_avx512(v);
        case OCTAVO_ISA_AVX2: return gather_avx2(v);
#endif
        default: return gather_baseline(v);
    }
}

struct SignTable {
    float of[256 * 8];
    SignTable() {
        for (int bits = 0; bits < 256; ++bits)
            for (int j = 0; j < 8; ++j) of[8 * bits + j] = (bits >> j & 1) != 0 ? -1.0f : 1.0f;
    }
};
const SignTable kSignTable;

// A codebook's vectors side by side, and what they are multiplied by.
struct Part {
    Gather gather = {};
    int64_t columns = 0;  // inputs
    int64_t vector_rows = 0;
    std::vector<float> books[kMaxGatherStages];
    std::vector<uint16_t> half_books[kMaxGatherStages], wide[kMaxGatherStages], signs;
    std::vector<uint8_t> narrow[kMaxGatherStages];
    std::vector<int8_t> byte_books[kMaxGatherStages];
};

class GatherMatrix : public Matrix {
  public:
    bool column_vectors = false;
    std::vector<Part> parts;
    std::vector<float> scales, input_scale, offsets;
    std::vector<int64_t> order;
    int64_t padded = 0;  // inputs of all parts, row vectors filled up
    int64_t grain = 1;   // rows that no vector crosses
    float unit = 1.0f;   // of the books: a power of two that keeps half floats far from their smallest
    int64_t bytes = 0;

    // After the inputs comes what is added to every row, and room for them in another order.
    int64_t used_floats() const { return (padded + 1 + 15) / 16 * 16; }
    int64_t x_floats() const override { return used_floats() + (order.empty() ? 0 : (in + 15) / 16 * 16); }
    // Room for whole vectors.
    int64_t sums_floats() const override { return (out + grain - 1) / grain * grain; }
    int64_t scratch_bytes(int64_t) const override { return 0; }
    int64_t most_threads() const override { return (out + grain - 1) / grain; }
    int64_t code_bytes() const override { return bytes; }

    void prepare(const float* x, float* to) const override {
        float* from = order.empty() ? to : to + used_floats();
        rotate(x, from);
        float added = 0.0f;
        if (!offsets.empty())
            for (int64_t i = 0; i < in; ++i) added += offsets[i] * from[i];
        if (!input_scale.empty())
            for (int64_t i = 0; i < in; ++i) from[i] *= input_scale[i];
        for (int64_t i = 0; i < static_cast<int64_t>(order.size()); ++i) to[i] = from[order[i]];
        std::fill(to + in, to + used_floats(), 0.0f);
        to[padded] = added;
    }

    void start(const Product*, int, int64_t, int, const Team&, int) const override {}

    void finish(const float* prepared, int64_t columns, int rank, const Team& team, Workspace& space, int isa,
                float* y) const override {
        int64_t first, last;
        team.share(out, grain, rank, &first, &last);
        if (first >= last) return;
        float* sums = space.sums(rank);
        for (int64_t c = 0; c < columns; ++c) {
            const float* x = prepared + c * x_floats();
            const float added = x[padded];
            const int64_t end = (last + grain - 1) / grain * grain;
            std::fill(sums + first, sums + end, 0.0f);
            for (const Part& part : parts) {
                const GatherKernels kernels = kernels_for(isa, part.gather.v);
                if (column_vectors) {
                    const int64_t v = part.gather.v;
                    kernels.columns(part.gather, x, first / v, std::min(end / v, part.vector_rows), sums);
                } else {
                    kernels.rows(part.gather, x, first, last, sums);
                }
                x += part.columns;
            }
            float* to = y + c * out;
            for (int64_t r = first; r < last; ++r) to[r] = sums[r] * unit;
            if (!scales.empty())
                for (int64_t r = first; r < last; ++r) to[r] *= scales[r];
            if (!offsets.empty())
                for (int64_t r = first; r < last; ++r) to[r] += added;
            if (!bias.empty())
                for (int64_t r = first; r < last; ++r) to[r] += bias[r];
        }
    }

    void decode(int64_t first, int64_t last, bool bfloat16, void* to, int threads) const override;

    // W[first.., ..] in the order of the inputs of the parts, numbers of [rows][padded].
    void numbers(int64_t first, int64_t last, float* to) const;
};

void add_centroid(const GatherStage& stage, int64_t at, int v, float* to) {
    const int64_t entry = (stage.narrow != nullptr ? stage.narrow[at] : stage.wide[at]) * int64_t{v};
    for (int j = 0; j < v; ++j)
        to[j] += stage.book != nullptr        ? stage.book[entry + j]
                 : stage.half_book != nullptr ? from_half(stage.half_book[entry + j])
                                              : stage.byte_book[entry + j] * stage.byte_step;
}

void GatherMatrix::numbers(int64_t first, int64_t last, float* to) const {
    int64_t column = 0;
    for (const Part& part : parts) {
        const Gather& g = part.gather;
        const int64_t step = column_vectors ? g.v : 1;
        for (int64_t r = first / step; r * step < last; ++r) {
            for (int64_t i = 0; i < g.vectors; ++i) {
                float vector[16] = {};
                const int64_t at = r * g.vectors + i;
                for (int s = 0; s < g.stages; ++s) add_centroid(g.stage[s], at, g.v, vector);
                for (int j = 0; j < g.v; ++j) {
                    const float value = g.signs != nullptr && (g.signs[at] >> j & 1) != 0 ? -vector[j] : vector[j];
                    if (!column_vectors) {
                        to[(r - first) * padded + column + i * g.v + j] = value;
                    } else if (r * step + j >= first && r * step + j < last) {
                        to[(r * step + j - first) * padded + column + i] = value;
                    }
                }
            }
        }
        column += part.columns;
    }
}

void GatherMatrix::decode(int64_t first, int64_t last, bool bfloat16, void* to, int threads) const {
    // Memory is taken here: an exception must not leave another thread.
    const int64_t pieces = (last - first + OCTAVO_ROWS - 1) / OCTAVO_ROWS;
    const int64_t workers = std::max<int64_t>(std::min<int64_t>(threads, pieces), 1);
    std::vector<float> all(static_cast<size_t>(workers * (OCTAVO_ROWS * padded + in)));
    Team::run(static_cast<int>(workers), [&](int rank, const Team& team) {
        float* const rows = all.data() + rank * (OCTAVO_ROWS * padded + in);
        float* const row = rows + OCTAVO_ROWS * padded;
        int64_t from, until;
        team.share(pieces, 1, rank, &from, &until);
        for (int64_t t = from; t < until; ++t) {
            const int64_t top = first + t * OCTAVO_ROWS, end = std::min<int64_t>(top + OCTAVO_ROWS, last);
            numbers(top, end, rows);
            for (int64_t r = top; r < end; ++r) {
                const float* values = rows + (r - top) * padded;
                for (int64_t i = 0; i < in; ++i) row[order.empty() ? i : order[i]] = values[i];
                const float scale = scales.empty() ? unit : unit * scales[r];
                for (int64_t i = 0; i < in; ++i) {
                    float value = row[i] * scale;
                    if (!input_scale.empty()) value *= input_scale[i];
                    if (!offsets.empty()) value += offsets[i];
                    const int64_t at = (r - first) * in + i;
                    if (bfloat16) {
                        static_cast<uint16_t*>(to)[at] = to_bfloat16(value);
                    } else {
                        static_cast<float*>(to)[at] = value;
                    }
                }
            }
        }
    });
}

// The power of two that brings the largest element of all books to between 2^7 and 2^8.
float unit_of(const octavo_vectors* parts, int count) {
    float largest = 0.0f;
    for (int i = 0; i < count; ++i) {
        int64_t numbers = 0;
        for (int s = 0; s < parts[i].stages; ++s) numbers += (int64_t{1} << parts[i].bits[s]) * parts[i].v;
        for (int64_t n = 0; n < numbers; ++n) largest = std::max(largest, std::fabs(parts[i].books[n]));
    }
    return largest > 0.0f && std::isfinite(largest) ? std::exp2(std::floor(std::log2(largest)) - 7.0f) : 1.0f;
}

// The step that loses least where elements are about normally distributed: beyond four standard deviations they are
// cut.
float byte_step(const float* book, int64_t numbers, float unit) {
    double squares = 0.0;
    float largest = 0.0f;
    for (int64_t i = 0; i < numbers; ++i) {
        const float element = std::fabs(book[i] / unit);
        squares += double{element} * element;
        largest = std::max(largest, element);
    }
    if (!(largest > 0.0f)) return 1.0f;
    const float deviation = static_cast<float>(std::sqrt(squares / static_cast<double>(numbers)));
    return std::min(largest, 4.0f * deviation) / 127.0f;
}

// Reads what a file has of one part.
void load(const octavo_vectors& from, int64_t out, bool column_vectors, float unit, Part& part) {
    Gather& g = part.gather;
    g.v = from.v;
    g.stages = from.stages;
    part.columns = column_vectors ? from.columns : (from.columns + from.v - 1) / from.v * from.v;
    part.vector_rows = column_vectors ? (out + from.v - 1) / from.v : out;
    g.vectors = column_vectors ? from.columns : part.columns / from.v;
    const size_t count = static_cast<size_t>(part.vector_rows * g.vectors);
    int code_bits = from.sign_bits != 0 ? from.v : 0;
    const float* book = from.books;
    for (int s = 0; s < from.stages; ++s) {
        code_bits += from.bits[s];
        const int64_t numbers = (int64_t{1} << from.bits[s]) * from.v;
        if (numbers <= kFloatBook || from.v != 8) {
            for (int64_t i = 0; i < numbers; ++i) part.books[s].push_back(book[i] / unit);
            g.stage[s].book = part.books[s].data();
        } else if (numbers <= kHalfBook) {
            for (int64_t i = 0; i < numbers; ++i) part.half_books[s].push_back(to_half(book[i] / unit));
            g.stage[s].half_book = part.half_books[s].data();
        } else {
            const float step = byte_step(book, numbers, unit);
            for (int64_t i = 0; i < numbers; ++i) {
                const float steps = std::nearbyint(book[i] / unit / step);
                part.byte_books[s].push_back(static_cast<int8_t>(std::clamp(steps, -127.0f, 127.0f)));
            }
            g.stage[s].byte_book = part.byte_books[s].data();
            g.stage[s].byte_step = step;
        }
        book += numbers;
        if (from.bits[s] <= 8) {
            part.narrow[s].resize(count);
            g.stage[s].narrow = part.narrow[s].data();
        } else {
            part.wide[s].resize(count);
            g.stage[s].wide = part.wide[s].data();
        }
    }
    if (from.sign_bits != 0) {
        part.signs.resize(count);
        g.signs = part.signs.data();
        g.sign_table = kSignTable.of;
    }
    const int64_t words = (g.vectors * code_bits + 31) / 32;
    size_t at = 0;
    for (int64_t r = 0; r < part.vector_rows; ++r) {
        for (int64_t i = 0; i < g.vectors; ++i, ++at) {
            uint64_t code = read_bits(from.codes + r * words, i * code_bits, code_bits);
            for (int s = 0; s < from.stages; ++s) {
                const uint64_t mine = code & ((uint64_t{1} << from.bits[s]) - 1);
                if (from.bits[s] <= 8) {
                    part.narrow[s][at] = static_cast<uint8_t>(mine);
                } else {
                    part.wide[s][at] = static_cast<uint16_t>(mine);
                }
                code >>= from.bits[s];
            }
            if (from.sign_bits != 0) part.signs[at] = static_cast<uint16_t>(code);
        }
    }
}

bool usable(const octavo_vectors& p) {
    if (p.columns < 1 || p.stages < 1 || p.stages > kMaxGatherStages || gather_baseline(p.v).rows == nullptr)
        return false;
    int bits = p.sign_bits != 0 ? p.v : 0;
    for (int s = 0; s < p.stages; bits += p.bits[s++])
        if (p.bits[s] < 1 || p.bits[s] > 16) return false;
    return bits <= 32;
}

}  // namespace
}  // namespace octavo

extern "C" int octavo_gather_create(int64_t out, int64_t in, int32_t column_vectors, const octavo_vectors* parts,
                                    int32_t part_count, const float* scales, const int64_t* order,
                                    const float* input_scale, const float* offsets, int64_t transform,
                                    const uint32_t* signs, const float* bias, int32_t threads, void** matrix) {
    using namespace octavo;
    *matrix = nullptr;
    if (out < 1 || in < 1 || threads < 1 || part_count < 1 || (column_vectors == 0 && part_count > 1))
        return OCTAVO_BAD_ARGUMENT;
    if (transform != 0 && (transform < 2 || (transform & (transform - 1)) != 0 || in % transform != 0))
        return OCTAVO_BAD_ARGUMENT;
    int64_t columns = 0;
    for (int i = 0; i < part_count; columns += parts[i++].columns)
        if (!usable(parts[i])) return OCTAVO_BAD_ARGUMENT;
    if (columns != in) return OCTAVO_BAD_ARGUMENT;
    for (int64_t i = 0; order != nullptr && i < in; ++i)
        if (order[i] < 0 || order[i] >= in) return OCTAVO_BAD_ARGUMENT;
    try {
        std::unique_ptr<GatherMatrix> made(new GatherMatrix);
        GatherMatrix& m = *made;
        m.out = out;
        m.in = in;
        m.column_vectors = column_vectors != 0;
        m.parts.resize(static_cast<size_t>(part_count));
        m.grain = 16;
        m.unit = unit_of(parts, part_count);
        for (int i = 0; i < part_count; ++i) {
            Part& part = m.parts[static_cast<size_t>(i)];
            load(parts[i], out, m.column_vectors, m.unit, part);
            m.padded += part.columns;
            if (m.column_vectors) m.grain = std::lcm(m.grain, int64_t{parts[i].v});
            for (int s = 0; s < parts[i].stages; ++s)
                m.bytes += static_cast<int64_t>(part.narrow[s].size() + 2 * part.wide[s].size());
        }
        if (scales != nullptr) m.scales.assign(scales, scales + out);
        if (order != nullptr) m.order.assign(order, order + in);
        if (input_scale != nullptr) m.input_scale.assign(input_scale, input_scale + in);
        if (offsets != nullptr) m.offsets.assign(offsets, offsets + in);
        if (bias != nullptr) m.bias.assign(bias, bias + out);
        m.set_transform(transform, signs);
        *matrix = static_cast<Matrix*>(made.release());
    } catch (const std::bad_alloc&) {
        return OCTAVO_NO_MEMORY;
    }
    return OCTAVO_OK;
}
