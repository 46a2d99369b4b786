// Codebooks that belong to tiles of rows: nearest centroids, and fits of all codebooks of a matrix in one call.
//
// A vector's error is measured as |(x - q) T|^2 with a matrix T per column of vectors (for GPTVQ the inverse of the
// diagonal block of the Cholesky factor). Multiplying points and centroids by T first turns that into plain Euclidean
// distance, so the search kernels serve unchanged.
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>

#include "cpu.h"
#include "nearest.h"
#include "octavo_c.h"
#include "parallel.h"

namespace octavo {
namespace {

// to[i] = from[i] root, for n row vectors of length V, or of length v where V is 0: the usual lengths are compiled in.
template <int V>
void transform(const float* from, int64_t n, int v, const float* root, float* to) {
    if (V > 0) v = V;
    for (int64_t i = 0; i < n; ++i, from += v, to += v) {
        float sum[V > 0 ? V : kMaxVector] = {};
        for (int a = 0; a < v; ++a)
            for (int b = 0; b < v; ++b) sum[b] += from[a] * root[a * v + b];
        for (int b = 0; b < v; ++b) to[b] = sum[b];
    }
}

// Calls body with the vector length as a compile-time constant where there is one for it.
template <class Body>
void with_length(int v, const Body& body) {
    switch (v) {
        case 1: return body(std::integral_constant<int, 1>{});
        case 2: return body(std::integral_constant<int, 2>{});
        case 4: return body(std::integral_constant<int, 4>{});
        case 8: return body(std::integral_constant<int, 8>{});
        default: return body(std::integral_constant<int, 0>{});
    }
}

struct Problem {
    const float* points;
    const float* weights;
    const float* roots;
    int64_t n, vectors;
    int v;
    int64_t tile_rows, k;
    int iterations;
    double tolerance;
    Kernel kernel;
    const double* metrics;  // [vectors][v][v] = root root^T
};

// The fit of one codebook of vectors of length V (0: of any length).
template <int V>
class Fit {
   public:
    Fit(const Problem& problem, int64_t tile, float* centroids)
        : p_(problem),
          first_(tile * problem.tile_rows),
          rows_(std::min(problem.tile_rows, problem.n - first_)),
          centroids_(centroids) {
        const int64_t count = rows_ * p_.vectors;
        x_.resize(static_cast<size_t>(count * length()));
        weight_.assign(static_cast<size_t>(count), 1.0f);
        code_.resize(static_cast<size_t>(count));
        distance_.resize(static_cast<size_t>(count));
        gather();
        if (p_.roots != nullptr && length() > 1) {
            moved_.resize(x_.size());
            for (int64_t c = 0; c < p_.vectors; ++c) transform<V>(x(c), rows_, length(), root(c), &moved_[at(c)]);
        }
        book_.resize(static_cast<size_t>(p_.k * length()));
        scratch_.resize(static_cast<size_t>(prepare_floats(p_.k, length())));
    }

    // D^2 sampling (k-means++): each centroid is a vector drawn with probability weight times squared distance.
    void seed(const double* uniforms) {
        std::vector<double> chance(distance_.size());
        std::fill(distance_.begin(), distance_.end(), 1.0f);
        for (int64_t c = 0; c < p_.k; ++c) {
            double total = 0.0;
            for (size_t i = 0; i < chance.size(); ++i) chance[i] = total += double{weight_[i]} * distance_[i];
            const double wanted = uniforms[c] * total;
            const auto found = std::upper_bound(chance.begin(), chance.end(), wanted) - chance.begin();
            const auto chosen = std::min<int64_t>(found, static_cast<int64_t>(chance.size()) - 1);
            float* centroid = centroids_ + c * length();
            std::copy_n(&x_[static_cast<size_t>(chosen * length())], length(), centroid);
            for (int64_t column = 0; column < p_.vectors; ++column) {
                float here[kMaxVector];
                place(column, centroid, 1, here);
                const float* y = moved(column);
                float* nearest = &distance_[static_cast<size_t>(column * rows_)];
                for (int64_t r = 0; r < rows_; ++r) {
                    float d = gap(y + r * length(), here);
                    if (length() == 1 && p_.metrics != nullptr) d *= static_cast<float>(p_.metrics[column]);
                    nearest[r] = c == 0 ? d : std::min(nearest[r], d);
                }
            }
        }
    }

    // Lloyd steps until the error stalls; returns the error before the last update of the centroids.
    double run() {
        double previous = INFINITY, error = 0.0;
        for (int step = 0; step < p_.iterations; ++step) {
            error = assign();
            const bool repaired = update();
            if (!repaired && previous - error <= p_.tolerance * error) break;
            previous = error;
        }
        return error;
    }

   private:
    int length() const { return V > 0 ? V : p_.v; }
    size_t at(int64_t column) const { return static_cast<size_t>(column * rows_ * length()); }
    const float* x(int64_t column) const { return &x_[at(column)]; }
    const float* moved(int64_t column) const { return moved_.empty() ? x(column) : &moved_[at(column)]; }
    const float* root(int64_t column) const { return p_.roots + column * length() * length(); }

    float gap(const float* a, const float* b) const {
        float sum = 0.0f;
        for (int j = 0; j < length(); ++j) sum += (a[j] - b[j]) * (a[j] - b[j]);
        return sum;
    }

    // Centroids as they stand among the moved vectors of a column.
    void place(int64_t column, const float* from, int64_t n, float* to) const {
        if (moved_.empty())
            std::copy_n(from, n * length(), to);
        else
            transform<V>(from, n, length(), root(column), to);
    }

    // Column-major copies: the vectors of a column share a metric and stand together.
    void gather() {
        for (int64_t r = 0; r < rows_; ++r) {
            const int64_t row = first_ + r;
            for (int64_t c = 0; c < p_.vectors; ++c) {
                const float* from = p_.points + (row * p_.vectors + c) * length();
                std::copy_n(from, length(), &x_[at(c) + static_cast<size_t>(r * length())]);
                if (p_.weights != nullptr) weight_[static_cast<size_t>(c * rows_ + r)] = p_.weights[row * p_.vectors + c];
            }
        }
    }

    // Nearest centroids of all vectors; returns the weighted error.
    double assign() {
        double total = 0.0;
        // Without a metric per column there is one search for the whole tile. A single weight's metric is a number,
        // which has no say in what is nearest.
        const int64_t span = moved_.empty() ? p_.vectors : 1;
        for (int64_t c = 0; c < p_.vectors; c += span) {
            const int64_t count = span * rows_;
            place(c, centroids_, p_.k, book_.data());
            int64_t* code = &code_[static_cast<size_t>(c * rows_)];
            Search search{moved(c), nullptr, book_.data(), nullptr, p_.k, code, {}};
            if (length() > kDirectVector) prepare(search, length(), scratch_.data());
            p_.kernel(search, 0, count);
            const float* y = moved(c);
            for (int64_t i = 0; i < count; ++i) {
                const auto index = static_cast<size_t>(c * rows_ + i);
                float d = gap(y + i * length(), &book_[static_cast<size_t>(code[i] * length())]);
                if (length() == 1 && p_.metrics != nullptr) d *= static_cast<float>(p_.metrics[c + i / rows_]);
                distance_[index] = d * weight_[index];
                total += distance_[index];
            }
        }
        return total;
    }

    // Weighted least squares for every centroid; true if empty clusters were moved.
    bool update() {
        const int v = length();
        const size_t square = static_cast<size_t>(v * v);
        normal_.assign(static_cast<size_t>(p_.k) * square, 0.0);
        right_.assign(static_cast<size_t>(p_.k * v), 0.0);
        members_.assign(static_cast<size_t>(p_.k), 0);
        for (int64_t c = 0; c < p_.vectors; ++c) {
            const double* metric = p_.metrics == nullptr ? nullptr : p_.metrics + static_cast<size_t>(c) * square;
            for (int64_t r = 0; r < rows_; ++r) {
                const auto index = static_cast<size_t>(c * rows_ + r);
                const auto code = static_cast<size_t>(code_[index]);
                const double s = weight_[index];
                if (!(s > 0.0)) continue;
                ++members_[code];
                const float* point = &x_[index * static_cast<size_t>(v)];
                double* normal = &normal_[code * square];
                double* right = &right_[code * static_cast<size_t>(v)];
                for (int a = 0; a < v; ++a) {
                    if (metric == nullptr) {
                        normal[a * v + a] += s;
                        right[a] += s * point[a];
                        continue;
                    }
                    double sum = 0.0;
                    for (int b = 0; b < v; ++b) {
                        const double m = s * metric[a * v + b];
                        normal[a * v + b] += m;
                        sum += m * point[b];
                    }
                    right[a] += sum;
                }
            }
        }
        std::vector<int64_t> empty;
        for (int64_t c = 0; c < p_.k; ++c) {
            if (members_[static_cast<size_t>(c)] == 0)
                empty.push_back(c);
            else
                solve(&normal_[static_cast<size_t>(c) * square], &right_[static_cast<size_t>(c * v)], centroids_ + c * v);
        }
        if (!empty.empty()) repair(empty);
        return !empty.empty();
    }

    // Cholesky; a centroid whose equations are singular keeps its place.
    void solve(double* a, const double* b, float* centroid) const {
        const int v = length();
        double y[kMaxVector];
        for (int i = 0; i < v; ++i) {
            for (int j = 0; j <= i; ++j) {
                double sum = a[i * v + j];
                for (int l = 0; l < j; ++l) sum -= a[i * v + l] * a[j * v + l];
                if (i == j) {
                    if (!(sum > 0.0)) return;
                    a[i * v + i] = std::sqrt(sum);
                } else {
                    a[i * v + j] = sum / a[j * v + j];
                }
            }
            double sum = b[i];
            for (int l = 0; l < i; ++l) sum -= a[i * v + l] * y[l];
            y[i] = sum / a[i * v + i];
        }
        for (int i = v - 1; i >= 0; --i) {
            double sum = y[i];
            for (int l = i + 1; l < v; ++l) sum -= a[l * v + i] * y[l];
            y[i] = sum / a[i * v + i];
        }
        for (int i = 0; i < v; ++i) centroid[i] = static_cast<float>(y[i]);
    }

    // Unused centroids take the vectors that are served worst, distinct ones as far as there are.
    void repair(const std::vector<int64_t>& empty) {
        constexpr size_t kSearch = 8;
        const int v = length();
        std::vector<size_t> order(distance_.size());
        std::iota(order.begin(), order.end(), size_t{0});
        const size_t top = std::min(order.size(), kSearch * empty.size());
        const auto worse = [&](size_t a, size_t b) {
            return distance_[a] != distance_[b] ? distance_[a] > distance_[b] : a < b;
        };
        std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(top), order.end(), worse);
        const auto used = std::find_if(members_.begin(), members_.end(), [](int64_t m) { return m > 0; });
        size_t next = 0;
        const float* last = nullptr;
        for (const int64_t c : empty) {
            const float* from = nullptr;
            for (; next < top && from == nullptr; ++next) {
                const float* candidate = &x_[order[next] * static_cast<size_t>(v)];
                // Copies of one vector share their distance, so they stand together.
                if (distance_[order[next]] > 0.0f && (last == nullptr || !std::equal(candidate, candidate + v, last)))
                    from = last = candidate;
            }
            if (from == nullptr && used != members_.end()) from = centroids_ + (used - members_.begin()) * v;
            if (from != nullptr) std::copy_n(from, v, centroids_ + c * v);
        }
    }

    const Problem& p_;
    int64_t first_, rows_;
    float* centroids_;
    std::vector<float> x_, moved_, weight_, distance_, book_, scratch_;
    std::vector<double> normal_, right_;
    std::vector<int64_t> code_, members_;
};

// parallel_for whose body may run out of memory: an exception must not leave a thread.
template <class Body>
int guarded_for(int64_t n, int64_t grain, int threads, const Body& body) {
    std::atomic<bool> no_memory{false};
    parallel_for(n, grain, threads, [&](int64_t first, int64_t last) {
        try {
            body(first, last);
        } catch (const std::bad_alloc&) {
            no_memory = true;
        }
    });
    return no_memory ? OCTAVO_NO_MEMORY : OCTAVO_OK;
}

bool usable(int& isa) {
    if (isa == OCTAVO_ISA_BEST) isa = best_isa();
    return isa >= OCTAVO_ISA_BASELINE && isa <= best_isa();
}

bool sizes(int64_t n, int64_t tile_rows, int64_t k, int32_t v, int32_t threads) {
    return n >= 0 && tile_rows >= 1 && k >= 1 && k <= INT32_MAX && v >= 1 && v <= kMaxVector && threads >= 1;
}

}  // namespace
}  // namespace octavo

extern "C" int octavo_nearest_tiles(const float* points, int64_t n, int64_t tile_rows, const float* books, int64_t k,
                                    int32_t v, const float* root, int64_t* out, int32_t threads, int32_t isa) {
    using namespace octavo;
    if (!sizes(n, tile_rows, k, v, threads) || !usable(isa)) return OCTAVO_BAD_ARGUMENT;
    const Kernel kernel = nearest_kernel(isa, v);
    const bool moves = root != nullptr && v > 1;
    const int64_t tiles = (n + tile_rows - 1) / tile_rows;
    const int64_t grain = std::max(int64_t{1}, (int64_t{1} << 22) / (std::min(tile_rows, n) * k * v + 1));
    return guarded_for(tiles, grain, threads, [&](int64_t first, int64_t last) {
        std::vector<float> moved, book, scratch(static_cast<size_t>(prepare_floats(k, v)));
        if (moves) {
            moved.resize(static_cast<size_t>(std::min(tile_rows, n) * v));
            book.resize(static_cast<size_t>(k * v));
        }
        for (int64_t tile = first; tile < last; ++tile) {
            const int64_t begin = tile * tile_rows, count = std::min(tile_rows, n - begin);
            const float *x = points + begin * v, *c = books + tile * k * v;
            if (moves) {
                with_length(v, [&](auto length) {
                    transform<decltype(length)::value>(x, count, v, root, moved.data());
                    transform<decltype(length)::value>(c, k, v, root, book.data());
                });
                x = moved.data();
                c = book.data();
            }
            Search search{x, nullptr, c, nullptr, k, out + begin, {}};
            if (v > kDirectVector) prepare(search, v, scratch.data());
            kernel(search, 0, count);
        }
    });
}

extern "C" int octavo_fit_tiles(const float* points, const float* weights, const float* roots, int64_t n,
                                int64_t vectors, int32_t v, int64_t tile_rows, int64_t k, float* centroids,
                                const double* uniforms, int32_t iterations, double tolerance, double* errors,
                                int32_t threads, int32_t isa) {
    using namespace octavo;
    if (!sizes(n, tile_rows, k, v, threads) || vectors < 1 || iterations < 1 || !usable(isa)) return OCTAVO_BAD_ARGUMENT;
    try {
        std::vector<double> metrics;
        if (roots != nullptr) {
            metrics.assign(static_cast<size_t>(vectors * v * v), 0.0);
            for (int64_t c = 0; c < vectors; ++c) {
                const float* root = roots + c * v * v;
                double* metric = &metrics[static_cast<size_t>(c * v * v)];
                for (int a = 0; a < v; ++a)
                    for (int b = 0; b < v; ++b)
                        for (int l = 0; l < v; ++l) metric[a * v + b] += double{root[a * v + l]} * root[b * v + l];
            }
        }
        const Problem problem{points, weights, roots,      n,         vectors,
                              v,      tile_rows, k,        iterations, tolerance,
                              nearest_kernel(isa, v), metrics.empty() ? nullptr : metrics.data()};
        const int64_t tiles = (n + tile_rows - 1) / tile_rows;
        const int64_t grain = std::max(int64_t{1}, 4096 / std::max(int64_t{1}, std::min(tile_rows, n) * vectors));
        return guarded_for(tiles, grain, threads, [&](int64_t first, int64_t last) {
            with_length(v, [&](auto length) {
                for (int64_t tile = first; tile < last; ++tile) {
                    Fit<decltype(length)::value> fit(problem, tile, centroids + tile * k * v);
                    if (uniforms != nullptr) fit.seed(uniforms + tile * k);
                    errors[tile] = fit.run();
                }
            });
        });
    } catch (const std::bad_alloc&) {
        return OCTAVO_NO_MEMORY;
    }
}
