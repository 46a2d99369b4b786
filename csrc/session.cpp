// The decoder of the Llama family, one call per token: everything between the token and its logits on one team of
// threads.
//
// Every thread keeps its own copy of the hidden state and works out norms by itself; what is shared is cut by output
// rows, by heads, or by positions of the cache, with a barrier before it is read.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <initializer_list>
#include <memory>
#include <new>
#include <vector>

#include "cache.h"
#include "cpu.h"
#include "half.h"
#include "matrix.h"
#include "octavo_c.h"
#include "ops.h"

namespace octavo {
namespace {

using Linear = octavo_linear;

const Matrix* quantized(const Linear& layer) { return static_cast<const Matrix*>(layer.matrix); }

// The largest sizes of all layers, for the scratch of a run.
struct Sizes {
    int64_t x = 0, sums = 0, scratch = 0;
    void add(const Linear& layer, int64_t columns) {
        if (layer.matrix == nullptr) return;
        const Matrix& m = *quantized(layer);
        x = std::max(x, columns * m.x_floats());
        sums = std::max(sums, columns * m.sums_floats());
        scratch = std::max(scratch, m.scratch_bytes(columns));
    }
};

// What a thread has for itself: hidden states, what a layer reads.
struct Own {
    std::vector<float> h, x;
    // Attention over its positions, see Attention: [columns][heads], and [columns][heads][head_width].
    std::vector<float> largest, totals, sums;
    // Of the rotary positions, [columns][head_width / 2], and what they were made from: blocks share them.
    std::vector<float> cosines, sines;
    const float* frequencies = nullptr;
    float rotary_factor = 0.0f;
};

// What the threads of a run share. Vectors of all columns stand one after the other.
struct Shared {
    std::vector<float> query, key, value, attended, gate, up, moved;
    std::vector<float> scores;  // [capacity][heads], a thread's those of its positions
    std::vector<Own> own;
};

// Memory of a run, kept for the next one of as many threads and columns.
struct Scratch {
    int threads;
    int64_t columns;
    Shared shared;
    std::vector<Workspace> spaces;

    // Throws std::bad_alloc.
    Scratch(const octavo_decoder& d, const Sizes& sizes, int threads, int64_t columns, int64_t capacity)
        : threads(threads), columns(columns) {
        for (int i = 0; i < kTogether; ++i) spaces.emplace_back(threads, sizes.x, sizes.sums, sizes.scratch);
        const auto numbers = [&](int64_t width) { return std::vector<float>(static_cast<size_t>(columns * width)); };
        const int64_t wide = d.heads * d.head_width, narrow = d.key_heads * d.head_width;
        Own own;
        own.h = own.x = numbers(d.hidden);
        own.largest = own.totals = numbers(d.heads);
        own.sums = numbers(wide);
        own.cosines = own.sines = numbers(d.head_width / 2);
        shared = {numbers(wide),
                  numbers(narrow),
                  numbers(narrow),
                  numbers(wide),
                  numbers(d.intermediate),
                  numbers(d.intermediate),
                  numbers(d.hidden),
                  {},
                  {}};
        shared.scores.resize(static_cast<size_t>(capacity * d.heads));
        shared.own.assign(static_cast<size_t>(threads), own);
    }
};

struct Session {
    octavo_decoder d;
    std::vector<octavo_block> blocks;
    int64_t capacity;
    Cache cache;
    std::unique_ptr<Scratch> scratch;
    // How long runs took, and how much of it their first threads were in linear layers, waiting for others included.
    double seconds = 0.0, linear_seconds = 0.0;

    // Throws std::bad_alloc.
    Session(const octavo_decoder& d, int64_t capacity, bool bytes)
        : d(d),
          blocks(d.block, d.block + d.blocks),
          capacity(capacity),
          cache(d.blocks, d.key_heads, d.head_width, capacity, bytes) {}
};

using Clock = std::chrono::steady_clock;

double since(Clock::time_point began) { return std::chrono::duration<double>(Clock::now() - began).count(); }

struct Target {
    const Linear* layer;
    float* y;
};

class Run {
  public:
    Run(Session& session, const int64_t* tokens, int64_t columns, int64_t length, float* logits, int isa)
        : s_(session),
          d_(session.d),
          tokens_(tokens),
          columns_(columns),
          length_(length),
          logits_(logits),
          ops_(ops_for(isa)),
          isa_(isa),
          shared_(session.scratch->shared),
          spaces_(session.scratch->spaces) {}

    // Called by every thread of the team.
    void thread(int rank, Team& team) const {
        const int64_t hidden = d_.hidden;
        Own& own = shared_.own[static_cast<size_t>(rank)];
        own.frequencies = nullptr;
        std::vector<float>&h = own.h, &x = own.x;
        for (int64_t c = 0; c < columns_; ++c) embed(tokens_[c], h.data() + c * hidden);
        for (int64_t b = 0; b < d_.blocks; ++b) {
            const octavo_block& block = s_.blocks[b];
            norm(h.data(), block.attention_norm, x.data());
            linear({{&block.query, shared_.query.data()},
                    {&block.key, shared_.key.data()},
                    {&block.value, shared_.value.data()}},
                   x.data(), rank, team);
            turn(block, own);
            remember(b, own, rank, team);
            team.barrier();
            attend(b, own, rank, team);
            team.barrier();
            put_together(rank, team);
            team.barrier();
            linear({{&block.output, shared_.moved.data()}}, shared_.attended.data(), rank, team);
            add(block.post_attention_norm, h.data(), x.data());
            norm(h.data(), block.mlp_norm, x.data());
            linear({{&block.gate, shared_.gate.data()}, {&block.up, shared_.up.data()}}, x.data(), rank, team);
            activate(rank, team);
            team.barrier();
            linear({{&block.down, shared_.moved.data()}}, shared_.gate.data(), rank, team);
            add(block.post_mlp_norm, h.data(), x.data());
        }
        if (logits_ == nullptr) return;
        const float* last = h.data() + (columns_ - 1) * hidden;
        ops_.rms_norm(last, d_.final_norm, hidden, d_.epsilon, x.data());
        if (d_.head.out == 0) {
            if (rank == 0) std::copy(x.data(), x.data() + hidden, logits_);
            return;
        }
        linear({{&d_.head, logits_}}, x.data(), rank, team, 1);
        if (d_.logit_cap == 0.0f) return;
        int64_t first, end;
        team.share(d_.vocabulary, 16, rank, &first, &end);
        for (int64_t i = first; i < end; ++i) logits_[i] = d_.logit_cap * std::tanh(logits_[i] / d_.logit_cap);
    }

  private:
    void embed(int64_t token, float* h) const {
        const int64_t place = d_.places == nullptr ? token : d_.places[token];
        if (place >= d_.embedding.out) {
            quantized(d_.others)->row(place - d_.embedding.out, h);
        } else if (d_.embedding.matrix != nullptr) {
            quantized(d_.embedding)->row(place, h);
        } else {
            for (int64_t i = 0; i < d_.hidden; ++i) {
                const int64_t at = token * d_.hidden + i;
                h[i] = d_.embedding.float32 != nullptr ? d_.embedding.float32[at]
                                                       : from_bfloat16(d_.embedding.bfloat16[at]);
            }
        }
        for (int64_t i = 0; i < d_.hidden; ++i) h[i] *= d_.embedding_factor;
    }

    void norm(const float* h, const float* weight, float* x) const {
        for (int64_t c = 0; c < columns_; ++c)
            ops_.rms_norm(h + c * d_.hidden, weight, d_.hidden, d_.epsilon, x + c * d_.hidden);
    }

    // h += shared_.moved, normed if there is a weight. Every thread does all of it for itself.
    void add(const float* weight, float* h, float* x) const {
        const float* y = shared_.moved.data();
        if (weight != nullptr) {
            norm(y, weight, x);
            y = x;
        }
        for (int64_t i = 0; i < columns_ * d_.hidden; ++i) h[i] += y[i];
    }

    // All layers that read the same x. Their outputs are complete, and may be read by all, at the end.
    void linear(std::initializer_list<Target> targets, const float* x, int rank, Team& team,
                int64_t columns = 0) const {
        const Clock::time_point began = Clock::now();
        if (columns == 0) columns = columns_;
        Product products[kTogether];
        int number = 0;
        for (const Target& target : targets) {
            if (target.layer->matrix == nullptr) continue;
            products[number] = {quantized(*target.layer), &spaces_[number], nullptr};
            ++number;
        }
        start_all(products, number, x, columns, rank, team, isa_);
        if (number > 0) team.barrier();
        number = 0;
        for (const Target& target : targets) {
            const Linear& layer = *target.layer;
            if (layer.matrix != nullptr) {
                const Product& product = products[number++];
                product.matrix->finish(product.prepared, columns, rank, team, *product.space, isa_, target.y);
                continue;
            }
            int64_t first, last;
            team.share(layer.out, 16, rank, &first, &last);
            for (int64_t c = 0; c < columns; ++c) {
                float* y = target.y + c * layer.out;
                if (layer.float32 != nullptr) {
                    ops_.dense_float32(layer.float32, layer.in, x + c * layer.in, first, last, y);
                } else {
                    ops_.dense_bfloat16(layer.bfloat16, layer.in, x + c * layer.in, first, last, y);
                }
                if (layer.bias != nullptr)
                    for (int64_t r = first; r < last; ++r) y[r] += layer.bias[r];
            }
        }
        team.barrier();
        if (rank == 0) s_.linear_seconds += since(began);
    }

    void turn(const octavo_block& block, Own& own) const {
        if (own.frequencies == block.frequencies && own.rotary_factor == block.rotary_factor) return;
        const int64_t half = d_.head_width / 2;
        for (int64_t c = 0; c < columns_; ++c) {
            for (int64_t i = 0; i < half; ++i) {
                const float angle = static_cast<float>(length_ + c) * block.frequencies[i];
                own.cosines[c * half + i] = std::cos(angle) * block.rotary_factor;
                own.sines[c * half + i] = std::sin(angle) * block.rotary_factor;
            }
        }
        own.frequencies = block.frequencies;
        own.rotary_factor = block.rotary_factor;
    }

    void rotate(const Own& own, int64_t column, float* head) const {
        const int64_t half = d_.head_width / 2;
        for (int64_t i = 0; i < half; ++i) {
            const float cosine = own.cosines[column * half + i], sine = own.sines[column * half + i];
            const float low = head[i], high = head[i + half];
            head[i] = low * cosine - high * sine;
            head[i + half] = high * cosine + low * sine;
        }
    }

    // Positions into the queries and keys of the new tokens; keys and values go into the cache.
    void remember(int64_t b, const Own& own, int rank, Team& team) const {
        const octavo_block& block = s_.blocks[b];
        const int64_t width = d_.head_width, heads = d_.heads + d_.key_heads;
        int64_t first, last;
        team.share(heads * columns_, 1, rank, &first, &last);
        for (int64_t i = first; i < last; ++i) {
            const int64_t c = i / heads, head = i % heads, kept = head - d_.heads;
            const bool is_query = kept < 0;
            float* const x = is_query ? shared_.query.data() + (c * d_.heads + head) * width
                                      : shared_.key.data() + (c * d_.key_heads + kept) * width;
            const float* const weight = is_query ? block.query_norm : block.key_norm;
            if (weight != nullptr) ops_.rms_norm(x, weight, width, d_.epsilon, x);
            rotate(own, c, x);
            s_.cache.spread(ops_, x);
            if (is_query) continue;
            const float* const value = shared_.value.data() + (c * d_.key_heads + kept) * width;
            s_.cache.write(ops_, b, kept, length_ + c, x, value);
        }
    }

    // All heads over this thread's positions.
    void attend(int64_t b, Own& own, int rank, Team& team) const {
        const int64_t window = s_.blocks[b].window, end = length_ + columns_;
        const auto oldest = [&](int64_t column) {
            return window > 0 ? std::max<int64_t>(length_ + column + 1 - window, 0) : 0;
        };
        // The same for all columns: a thread's scores are no other's.
        int64_t first, last;
        team.share(end - oldest(0), 4, rank, &first, &last);
        first += oldest(0);
        last += oldest(0);
        for (int64_t c = 0; c < columns_; ++c) {
            const int64_t from = std::max(first, oldest(c)), until = std::min(last, length_ + c + 1), at = c * d_.heads;
            Attention a = {};
            a.queries = shared_.query.data() + at * d_.head_width;
            a.heads = d_.heads;
            a.key_heads = d_.key_heads;
            a.width = d_.head_width;
            s_.cache.read(b, from, a);
            a.positions = std::max<int64_t>(until - from, 0);
            a.scale = d_.attention_scale;
            a.cap = d_.attention_cap;
            a.scores = shared_.scores.data() + first * d_.heads;
            a.largest = own.largest.data() + at;
            a.totals = own.totals.data() + at;
            a.out = own.sums.data() + at * d_.head_width;
            ops_.attend(a);
        }
    }

    // What the threads found, each over its positions, to shared_.attended.
    void put_together(int rank, Team& team) const {
        const int64_t width = d_.head_width;
        int64_t first, last;
        team.share(d_.heads * columns_, 1, rank, &first, &last);
        for (int64_t i = first; i < last; ++i) {
            float largest = -INFINITY, total = 0.0f;
            for (int t = 0; t < team.size(); ++t) largest = std::max(largest, shared_.own[t].largest[i]);
            const auto share = [&](int t) { return std::exp(shared_.own[t].largest[i] - largest); };
            for (int t = 0; t < team.size(); ++t) total += share(t) * shared_.own[t].totals[i];
            float* const to = shared_.attended.data() + i * width;
            std::fill(to, to + width, 0.0f);
            for (int t = 0; t < team.size(); ++t) {
                const float factor = share(t) / total, *sums = shared_.own[t].sums.data() + i * width;
                for (int64_t j = 0; j < width; ++j) to[j] += factor * sums[j];
            }
        }
    }

    void activate(int rank, Team& team) const {
        int64_t first, last;
        team.share(columns_ * d_.intermediate, 16, rank, &first, &last);
        ops_.gated(shared_.gate.data() + first, shared_.up.data() + first, last - first, d_.activation);
    }

    Session& s_;
    const octavo_decoder& d_;
    const int64_t* tokens_;
    int64_t columns_, length_;
    float* logits_;
    const Ops& ops_;
    int isa_;
    Shared& shared_;
    std::vector<Workspace>& spaces_;
};

bool fits(const Linear& layer, int64_t out, int64_t in) {
    if (layer.out != out || layer.in != in) return false;
    if (layer.matrix == nullptr) return layer.bfloat16 != nullptr || layer.float32 != nullptr;
    return quantized(layer)->out == out && quantized(layer)->in == in;
}

bool complete(const octavo_decoder& d) {
    if (d.blocks < 1 || d.hidden < 1 || d.heads < 1 || d.key_heads < 1 || d.heads % d.key_heads != 0) return false;
    if (d.head_width < 2 || d.head_width % 2 != 0 || d.intermediate < 1 || d.vocabulary < 1) return false;
    if (d.final_norm == nullptr || d.block == nullptr) return false;
    if (d.embedding.matrix != nullptr && !quantized(d.embedding)->has_rows()) return false;
    if (d.places != nullptr) {
        const int64_t rest = d.vocabulary - d.embedding.out;
        if (d.embedding.matrix == nullptr || d.others.matrix == nullptr || !quantized(d.others)->has_rows()) return false;
        if (!fits(d.others, rest, d.hidden)) return false;
        for (int64_t i = 0; i < d.vocabulary; ++i)
            if (d.places[i] < 0 || d.places[i] >= d.vocabulary) return false;
    }
    const int64_t wide = d.heads * d.head_width, narrow = d.key_heads * d.head_width;
    for (int64_t b = 0; b < d.blocks; ++b) {
        const octavo_block& block = d.block[b];
        if (block.attention_norm == nullptr || block.mlp_norm == nullptr || block.frequencies == nullptr) return false;
        if (!fits(block.query, wide, d.hidden) || !fits(block.key, narrow, d.hidden)) return false;
        if (!fits(block.value, narrow, d.hidden) || !fits(block.output, d.hidden, wide)) return false;
        if (!fits(block.gate, d.intermediate, d.hidden) || !fits(block.up, d.intermediate, d.hidden)) return false;
        if (!fits(block.down, d.hidden, d.intermediate)) return false;
    }
    const bool head = d.head.out == 0 || fits(d.head, d.vocabulary, d.hidden);
    return head && fits(d.embedding, d.places == nullptr ? d.vocabulary : d.embedding.out, d.hidden);
}

}  // namespace
}  // namespace octavo

using octavo::Session;

extern "C" {

int octavo_session_create(const octavo_decoder* decoder, int64_t capacity, int32_t cache, void** session) {
    using namespace octavo;
    *session = nullptr;
    if (!complete(*decoder) || capacity < 1 || cache < OCTAVO_CACHE_FLOAT16 || cache > OCTAVO_CACHE_INT8)
        return OCTAVO_BAD_ARGUMENT;
    try {
        *session = new Session(*decoder, capacity, cache == OCTAVO_CACHE_INT8);
    } catch (const std::bad_alloc&) {
        return OCTAVO_NO_MEMORY;
    }
    return OCTAVO_OK;
}

void octavo_session_destroy(void* session) { delete static_cast<Session*>(session); }

int octavo_session_run(void* session, const int64_t* tokens, int64_t n, int64_t length, float* logits, int32_t threads,
                       int32_t isa) {
    using namespace octavo;
    const Clock::time_point began = Clock::now();
    Session& s = *static_cast<Session*>(session);
    const octavo_decoder& d = s.d;
    if (isa == OCTAVO_ISA_BEST) isa = best_isa();
    if (isa < OCTAVO_ISA_BASELINE || isa > best_isa() || n < 1 || length < 0 || threads < 1) return OCTAVO_BAD_ARGUMENT;
    if (length + n > s.capacity) return OCTAVO_OUT_OF_RANGE;
    for (int64_t i = 0; i < n; ++i)
        if (tokens[i] < 0 || tokens[i] >= d.vocabulary) return OCTAVO_OUT_OF_RANGE;
    try {
        const int64_t most = std::min<int64_t>(n, kColumns);
        Sizes sizes;
        for (const octavo_block& b : s.blocks)
            for (const Linear* layer : {&b.query, &b.key, &b.value, &b.output, &b.gate, &b.up, &b.down})
                sizes.add(*layer, most);
        sizes.add(d.head, 1);
        if (s.scratch == nullptr || s.scratch->threads != threads || s.scratch->columns < most) {
            s.scratch.reset();
            s.scratch.reset(new Scratch(d, sizes, threads, most, s.capacity));
        }
        Team::run(threads, [&](int rank, Team& team) {
            for (int64_t first = 0; first < n; first += most) {
                const int64_t columns = std::min(most, n - first);
                float* wanted = first + columns == n ? logits : nullptr;
                Run(s, tokens + first, columns, length + first, wanted, isa).thread(rank, team);
                team.barrier();
            }
        });
        s.seconds += since(began);
    } catch (const std::bad_alloc&) {
        return OCTAVO_NO_MEMORY;
    }
    return OCTAVO_OK;
}

void octavo_session_times(void* session, double* seconds, double* linear_seconds) {
    Session& s = *static_cast<Session*>(session);
    *seconds = s.seconds;
    *linear_seconds = s.linear_seconds;
    s.seconds = s.linear_seconds = 0.0;
}

int octavo_session_write(void* session, int64_t block, int64_t first, int64_t n, const float* keys,
                         const float* values) {
    Session& s = *static_cast<Session*>(session);
    if (block < 0 || block >= s.d.blocks || first < 0 || n < 0) return OCTAVO_BAD_ARGUMENT;
    if (first + n > s.capacity) return OCTAVO_OUT_OF_RANGE;
    const octavo::Ops& ops = octavo::ops_for(octavo::best_isa());
    const int64_t width = s.d.head_width;
    try {
        std::vector<float> key(static_cast<size_t>(width));
        for (int64_t head = 0; head < s.d.key_heads; ++head) {
            for (int64_t i = 0; i < n; ++i) {
                const int64_t at = (head * n + i) * width;
                std::copy(keys + at, keys + at + width, key.begin());
                s.cache.spread(ops, key.data());
                s.cache.write(ops, block, head, first + i, key.data(), values + at);
            }
        }
    } catch (const std::bad_alloc&) {
        return OCTAVO_NO_MEMORY;
    }
    return OCTAVO_OK;
}
}
