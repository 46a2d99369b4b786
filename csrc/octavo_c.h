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
#define OCTAVO_ABI 6

#define OCTAVO_OK 0
#define OCTAVO_BAD_ARGUMENT 1
#define OCTAVO_NO_MEMORY 2
#define OCTAVO_OUT_OF_RANGE 3

/* Rows of a matrix are decoded in multiples of so many. */
#define OCTAVO_ROWS 64

/* Instruction sets, for the `isa` argument; OCTAVO_ISA_BEST takes the widest that the processor has. */
#define OCTAVO_ISA_BEST 0
#define OCTAVO_ISA_BASELINE 1
#define OCTAVO_ISA_AVX2 2
#define OCTAVO_ISA_AVX512 3
#define OCTAVO_ISA_VBMI 4 /* AVX-512 with BW, DQ, VL, VBMI and VNNI */

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

/* A matrix whose products with centroids are looked up; freed by octavo_matrix_destroy, which takes NULL as well.
 *
 * W = (sum of centroids) * scale between the signs and the block Hadamard transform of the inputs. Row r of `indices`
 * [out][ceil(ceil(in / v) * code_bits / 32)] holds a code of code_bits = sum of bits[s] for every v consecutive inputs,
 * that of the first stage in the lowest bits. books: `stages` of them one after the other, [2^bits[s]][v]; v one of
 * 1, 2, 4, 8; 1 to 4 stages of 1 to 8 bits. scales [out][ceil(in / scale_columns)], scale_columns a multiple of v or
 * not below in. transform: block size, a power of two that divides in, or 0; signs: a bit per input, set for -1. bias
 * [out] or NULL. Nothing of what is passed is kept.
 */
OCTAVO_API int octavo_lookup_create(int64_t out, int64_t in, int32_t v, int32_t stages, const int32_t* bits,
                                    const float* books, const uint32_t* indices, int64_t scale_columns,
                                    const float* scales, int64_t transform, const uint32_t* signs, const float* bias,
                                    int32_t threads, void** matrix);

/* Vectors of one codebook, or of the sum of several, in a row of them. codes: code_bits = sum of bits[s] (and v for
 * signs) each, that of the first stage in the lowest bits, signs in the highest, set for a negative element; rows of
 * them as octavo_pack writes. books: `stages` one after the other, [2^bits[s]][v] float32.
 */
typedef struct {
    int64_t columns; /* inputs */
    int32_t v, stages;
    int32_t bits[4];   /* 1 to 16 */
    int32_t sign_bits; /* 0 or 1 */
    const float* books;
    const uint32_t* codes;
} octavo_vectors;

/* A matrix of any codebooks, regrouped so that centroids are added up where they lie. With column_vectors a vector is v
 * outputs of one input, and `parts` may be two that stand side by side (outlier columns first); else it is v inputs of
 * one output, and there is one part. W = (the vectors) * scales [out] or NULL, after: input i of the parts is
 * order[i] of x (NULL for as they are), x is multiplied by input_scale [in] (or NULL), and offsets [in] (or NULL) are
 * added to every row of W. The transform is as in octavo_lookup_create and comes first.
 */
OCTAVO_API int octavo_gather_create(int64_t out, int64_t in, int32_t column_vectors, const octavo_vectors* parts,
                                    int32_t part_count, const float* scales, const int64_t* order,
                                    const float* input_scale, const float* offsets, int64_t transform,
                                    const uint32_t* signs, const float* bias, int32_t threads, void** matrix);

OCTAVO_API void octavo_matrix_destroy(void* matrix);

/* y[i] = W x[i] + bias for x [n][in], y [n][out]. Products that are looked up are rounded to 15 bits of the largest sum
 * of a dozen vectors. The sums of different numbers of threads are rounded differently, those of the same number alike.
 */
OCTAVO_API int octavo_matrix_multiply(const void* matrix, const float* x, int64_t n, float* y, int32_t threads,
                                      int32_t isa);

/* The same for many vectors at a time, whose inputs, transformed, are rounded to 8 bits by groups of 128, as are the
 * weights: about 1 % of a result where inputs are of similar size, which a transform makes them. Only where
 * octavo_matrix_has_many says 1 on this processor. The result does not depend on `threads`.
 */
OCTAVO_API int octavo_matrix_has_many(const void* matrix);
OCTAVO_API int octavo_matrix_many(const void* matrix, const float* x, int64_t n, float* y, int32_t threads);

/* y[i] = row rows[i] of W times x [in], without bias, for n rows; only of matrices of octavo_lookup_create with one scale
 * along a row, whose `indices` are passed again.
 */
OCTAVO_API int octavo_matrix_rows(const void* matrix, const uint32_t* indices, const int64_t* rows, int64_t n,
                                  const float* x, float* y, int32_t threads);

/* Rows [first, last) of W without the transform, as float32 or as bfloat16, [last - first][in]; first is a multiple of
 * 64. W x = decoded * transformed, with octavo_matrix_transform for the latter.
 */
OCTAVO_API int octavo_matrix_decode(const void* matrix, int64_t first, int64_t last, int32_t bfloat16, void* weights,
                                    int32_t threads);
OCTAVO_API int octavo_matrix_transform(const void* matrix, const float* x, int64_t n, float* y, int32_t threads);

/* A linear layer of a decoder: a quantized matrix, which carries its bias, or rows [out][in] of bfloat16 or float32;
 * one of the three pointers is not NULL.
 */
typedef struct {
    const void* matrix; /* of octavo_lookup_create or octavo_gather_create */
    const uint16_t* bfloat16;
    const float* float32;
    const float* bias; /* [out] or NULL; of a dense layer only */
    int64_t out, in;
} octavo_linear;

/* A block of a decoder:
 *     h += post_attention(output(attend(norm(query x), norm(key x), value x))),  x = attention_norm(h)
 *     h += post_mlp(down(activation(gate x) * up x)),                            x = mlp_norm(h)
 * Norms are weights of RMS norms; post_attention, post_mlp, query_norm and key_norm [head_width] may be NULL.
 */
typedef struct {
    const float *attention_norm, *post_attention_norm, *mlp_norm, *post_mlp_norm, *query_norm, *key_norm;
    octavo_linear query, key, value, output, gate, up, down;
    const float* frequencies; /* [head_width / 2] of the rotary positions; number i turns with number i + half */
    float rotary_factor;      /* of sines and cosines */
    int64_t window;           /* positions that a token sees, itself included, or 0 for all */
} octavo_block;

typedef struct {
    int64_t blocks, hidden, heads, key_heads, head_width, intermediate, vocabulary;
    const octavo_block* block; /* [blocks] */
    const float* final_norm;   /* [hidden] */
    octavo_linear embedding;   /* [vocabulary][hidden], dense or of octavo_lookup_create; may be the head's matrix */
    /* With `places` [vocabulary] the row of a token is number places[token] of both matrices, one after the other;
     * without, `others` has nothing. */
    octavo_linear others;
    const int64_t* places;
    octavo_linear head; /* with out = 0 a run puts out what the head would read [hidden], without the cap */
    float epsilon, attention_scale;
    float attention_cap, logit_cap; /* x becomes cap tanh(x / cap), unless the cap is 0 */
    float embedding_factor;
    int32_t activation; /* 0 silu, 1 gelu with tanh */
} octavo_decoder;

/* How keys and values are kept: in half floats, or in bytes with a factor per token and head, each rounded by at most
 * 1/254 of the largest number of its head.
 */
#define OCTAVO_CACHE_FLOAT16 0
#define OCTAVO_CACHE_INT8 1

/* What a conversation has seen: keys and values of at most `capacity` tokens, kept as `cache` says, one of
 * OCTAVO_CACHE_*. Everything that `decoder` points to must outlive it. Freed by octavo_session_destroy, which takes
 * NULL as well.
 */
OCTAVO_API int octavo_session_create(const octavo_decoder* decoder, int64_t capacity, int32_t cache, void** session);
OCTAVO_API void octavo_session_destroy(void* session);

/* Runs n further tokens; `length` of them came before. logits [vocabulary] are those after the last one, or NULL.
 * OCTAVO_OUT_OF_RANGE: a token that is none, or more than the capacity; nothing has changed then.
 */
OCTAVO_API int octavo_session_run(void* session, const int64_t* tokens, int64_t n, int64_t length, float* logits,
                                  int32_t threads, int32_t isa);

/* Seconds that octavo_session_run took since this was asked last, and how many of them went by in linear layers. */
OCTAVO_API void octavo_session_times(void* session, double* seconds, double* linear_seconds);

/* Puts keys and values [key_heads][n][head_width] of a block, rotated, into positions [first, first + n). */
OCTAVO_API int octavo_session_write(void* session, int64_t block, int64_t first, int64_t n, const float* keys,
                                    const float* values);

/* The inverse of octavo_pack. */
OCTAVO_API int octavo_unpack(const uint32_t* words, int64_t rows, int64_t count, int32_t width, int64_t* codes,
                             int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
