/* C interface of the octavo_c library. Loaded with ctypes: no Python, no exceptions and no state cross it.
 *
 * All arrays are dense and row-major and belong to the caller. Every function returns one of the codes below.
 */
#ifndef OCTAVO_C_H
#define OCTAVO_C_H

#include <stdint.h>

#if defined(_WIN32)
#define OCTAVO_API __declspec(dllexport)
#else
#define OCTAVO_API __attribute__((visibility("default")))
#endif

/* Changes whenever a signature below does; the Python side refuses any other number. */
#define OCTAVO_ABI 3

#define OCTAVO_OK 0
#define OCTAVO_BAD_ARGUMENT 1
#define OCTAVO_NO_MEMORY 2
#define OCTAVO_OUT_OF_RANGE 3

/* Instruction sets, for the `isa` argument; OCTAVO_ISA_BEST takes the widest that the processor has. */
#define OCTAVO_ISA_BEST 0
#define OCTAVO_ISA_BASELINE 1
#define OCTAVO_ISA_AVX2 2
#define OCTAVO_ISA_AVX512 3

#ifdef __cplusplus
extern "C" {
#endif

OCTAVO_API int octavo_abi(void);
OCTAVO_API const char* octavo_version(void);

/* Widest instruction set that is both compiled in and present: one of OCTAVO_ISA_*. */
OCTAVO_API int octavo_isa(void);

/* out[i] = argmin_c sum_j w[i][j] (points[i][j] - book[c][j])^2, the lowest c of equals.
 *
 * points [n][v], weights [n][v] >= 0 or NULL for ones, book [k][v], out [n]; 1 <= v <= 16, 1 <= k < 2^31.
 * NaN never wins: a centroid with NaN is not chosen, a point with NaN gets 0. The result does not depend on `threads`.
 */
OCTAVO_API int octavo_nearest(const float* points, const float* weights, int64_t n, const float* book, int64_t k,
                              int32_t v, int64_t* out, int32_t threads, int32_t isa);

/* Nearest centroids where every tile_rows consecutive points have a codebook of their own:
 * out[i] = argmin_c |(points[i] - books[i / tile_rows][c]) root|^2.
 *
 * points [n][v], books [ceil(n / tile_rows)][k][v], root [v][v] (row vectors times root) or NULL for the identity.
 */
OCTAVO_API int octavo_nearest_tiles(const float* points, int64_t n, int64_t tile_rows, const float* books, int64_t k,
                                    int32_t v, const float* root, int64_t* out, int32_t threads, int32_t isa);

/* Beam search over additive codebooks for the codes of every point that minimise
 * |(points[i] - sum_s books[s][out[i][s]]) root|^2. After every stage the `beam` best sums of centroids are kept, and
 * each is extended by all centroids of the next book; of equal ones, those with the lower first code come first, then
 * the lower second one, and so on.
 *
 * points [n][v]; books: `stages` of them one after the other, [sizes[s]][v]; root [v][v] or NULL for the identity;
 * out [n][stages]; 1 <= v <= 16, 2 <= stages <= 4, 1 <= sizes[s] <= 4096, 1 <= beam <= 65536. The scale of points,
 * books and root is of no account. A centroid that is not finite is not chosen; a point that is not finite, or more
 * than 1e30 times as large as all centroids, gets zeros. The result does not depend on `threads`. Holds 4 bytes for
 * every pair of centroids of different books.
 */
OCTAVO_API int octavo_nearest_additive(const float* points, int64_t n, int32_t v, const float* books,
                                       const int64_t* sizes, int32_t stages, const float* root, int32_t beam,
                                       int64_t* out, int32_t threads, int32_t isa);

/* Generalised Lloyd for many codebooks at once. Rows [n] of `vectors` vectors each; tile t, the rows
 * [t * tile_rows, ..), fits centroids[t] to minimise sum_i sum_c weights[i][c] |(points[i][c] - q) roots[c]|^2.
 *
 * points [n][vectors][v]; weights [n][vectors] >= 0 or NULL; roots [vectors][v][v], not singular, or NULL;
 * centroids [tiles][k][v]: the start, replaced by the result; with uniforms [tiles][k], numbers in [0, 1), the start is
 * drawn by D^2 sampling instead. Empty clusters move onto the worst-served vectors. A tile stops after `iterations`
 * steps or when a step lowers its error by less than the share `tolerance`. errors [tiles] receives the last errors.
 * The result does not depend on `threads`.
 */
OCTAVO_API int octavo_fit_tiles(const float* points, const float* weights, const float* roots, int64_t n,
                                int64_t vectors, int32_t v, int64_t tile_rows, int64_t k, float* centroids,
                                const double* uniforms, int32_t iterations, double tolerance, double* errors,
                                int32_t threads, int32_t isa);

/* codes [rows][count], each below 2^width, to bit streams words [rows][ceil(count * width / 32)]; 1 <= width <= 32.
 * OCTAVO_OUT_OF_RANGE: a code does not fit; the contents of words are then unspecified.
 */
OCTAVO_API int octavo_pack(const int64_t* codes, int64_t rows, int64_t count, int32_t width, uint32_t* words,
                           int32_t threads);

/* The inverse of octavo_pack. */
OCTAVO_API int octavo_unpack(const uint32_t* words, int64_t rows, int64_t count, int32_t width, int64_t* codes,
                             int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
