// Training on CPUs: causal attention, its gradients, and the loss's pass over the logits.
//
// Attention works on one head at a time, in blocks of BLOCK keys by BLOCK queries, and never holds more of the scores
// than one block (FlashAttention, arXiv 2205.14135). Blocks are computed transposed, keys by queries: the lanes of a
// vector are queries, so that the maximum and the sum over a query's keys need no shuffling.
//
// B rows, T positions, H query heads, Hkv key/value heads, D head dim; inside a head D is rounded up to whole tiles.

#include "cpu_kernels.h"
#include <stdlib.h>

typedef uint32_t word __attribute__((may_alias));  // PAIR numbers that a product multiplies and adds in one go
enum { PAIR = sizeof(word) / sizeof(real), BLOCK = 64, WIDE = 2 * LANES, TALL = LANES == 8 ? 4 : 8 };

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// --- products --------------------------------------------------------------------------------------------------------

static inline floats multiply_add(floats sum, word a, const word *b) {
#if defined(BFLOAT16) && defined(__AVX512BF16__)
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)_mm512_loadu_si512(b));
#elif defined(BFLOAT16)
    const words pairs = *(const words *)b;
    return sum + read((real)a) * (floats)(pairs << 16) + read((real)(a >> 16)) * (floats)(pairs & 0xffff0000u);
#else
    float value;
    memcpy(&value, &a, 4);
    return sum + value * *(const floats *)b;
#endif
}

// out (M, N) = left (M, K words) times right (K words, N), or += it; M a multiple of TALL, N of WIDE.
static inline void product(int add, float *out, const void *left, const word *right, int64_t M, int64_t N, int64_t K) {
    for (int64_t n = 0; n < N; n += WIDE)
        for (int64_t m = 0; m < M; m += TALL) {
            const word *a = (const word *)left + m * K, *b = right + n;
            float *c = out + m * N + n;
            floats sums[TALL][2];
            for (int r = 0; r < TALL; r++)
                for (int j = 0; j < 2; j++) sums[r][j] = add ? *(floats *)(c + r * N + j * LANES) : (floats){0};
            for (int64_t k = 0; k < K; k++)
                for (int r = 0; r < TALL; r++)
                    for (int j = 0; j < 2; j++) sums[r][j] = multiply_add(sums[r][j], a[r * K + k], b + k * N + j * LANES);
            for (int r = 0; r < TALL; r++)
                for (int j = 0; j < 2; j++) *(floats *)(c + r * N + j * LANES) = sums[r][j];
        }
}

// --- one head's queries, keys, values or gradients ----------------------------------------------------------------------

// X (T, D) block by block, each of BLOCK D numbers: X and its transpose as the left and as the right side of a product.
typedef struct {
    real *left;
    word *right, *turned_left, *turned_right;
} matrix;
enum { RIGHT = 1, TURNED_LEFT = 2, TURNED_RIGHT = 4 };  // what is asked for besides `left`

// x (rows, N) -> words (rows / PAIR, N), each of numbers from PAIR rows.
static void pair_rows(word *out, const real *x, int64_t rows, int64_t N) {
#if defined(BFLOAT16)
    for (int64_t r = 0; r < rows; r += 2, x += 2 * N, out += N)
#pragma omp simd
        for (int64_t n = 0; n < N; n++) out[n] = x[n] | (word)x[N + n] << 16;
#else
    memcpy(out, x, rows * N * sizeof(real));
#endif
}

static void transpose(word *out, const void *x, int64_t rows, int64_t N) {
    for (int64_t n = 0; n < N; n++)
        for (int64_t r = 0; r < rows; r++) out[n * rows + r] = ((const word *)x)[r * N + n];
}

// Lay out x (T, D), whose rows lie `stride` apart, in `memory`, filled up with zeros -> the memory behind it.
static char *lay_out(matrix *to, char *memory, const real *x, int64_t T, int64_t D, int64_t stride, int wanted) {
    const int64_t wide = rounded_up(D, WIDE), size = rounded_up(T, BLOCK) * wide, block = BLOCK * wide;
    to->left = (real *)memory;
    to->right = (word *)(to->left + size), to->turned_left = to->right + size / PAIR;
    to->turned_right = to->turned_left + size / PAIR;
    memset(memory, 0, wide == D ? 0 : size * sizeof(real));
    memset(to->left + T * wide, 0, (size - T * wide) * sizeof(real));
    for (int64_t t = 0; t < T; t++) memcpy(to->left + t * wide, x + t * stride, D * sizeof(real));
    for (int64_t i = 0; i < size; i += block) {
        if (wanted & (RIGHT | TURNED_LEFT)) pair_rows(to->right + i / PAIR, to->left + i, BLOCK, wide);
        if (wanted & TURNED_LEFT) transpose(to->turned_left + i / PAIR, to->right + i / PAIR, BLOCK / PAIR, wide);
        if (wanted & TURNED_RIGHT) transpose(to->turned_right + i / PAIR, to->left + i, BLOCK, wide / PAIR);
    }
    return (char *)(to->turned_right + size / PAIR);
}

// scale times x (D, BLOCK) -> the first `count` rows of out (BLOCK, D), which lie `stride` apart.
static void store_transposed(real *out, int64_t stride, int64_t count, int64_t D, const float *x, float *scratch, float scale) {
    const int64_t wide = rounded_up(D, WIDE);
    transpose((word *)scratch, x, wide, BLOCK);
    for (int64_t r = 0; r < count; r++)
#pragma omp simd
        for (int64_t d = 0; d < D; d++) out[r * stride + d] = rounded(scale * scratch[r * wide + d]);
}

// --- attention ---------------------------------------------------------------------------------------------------------

typedef struct {  // in the order of AttentionArguments in cpu_kernels.py
    const real *q, *k, *v, *grad;  // (B, T, H, D), (B, T, Hkv, D) twice, (B, T, H, D)
    real *out, *grad_q, *grad_k, *grad_v;
    float *normalizer;  // (B, H, T): logarithm of the sum of exponentials
    int64_t B, T, H, Hkv, D, window, threads;
    float scale;
} attention_arguments;

// Minus infinity for scores (rows, BLOCK) of the keys from `key` on that the queries from `query` on must not see.
static void hide(float *scores, int64_t key, int64_t query, int64_t window, int64_t rows) {
    for (int64_t later = key - query, r = 0; r < rows; r++, later++, scores += BLOCK) {
        for (int64_t c = 0; c < least(BLOCK, later); c++) scores[c] = -INFINITY;
        if (window >= 0)
            for (int64_t c = most(0, later + window + 1); c < BLOCK; c++) scores[c] = -INFINITY;
    }
}

// Whether some query of block i must not see some key of block j.
static int partly_hidden(int64_t i, int64_t j, int64_t window) {
    return i == j || (window >= 0 && (i + 1) * BLOCK - 1 - j * BLOCK > window);
}

// Weights of a block (BLOCK keys, BLOCK queries) as the right side of a product; `top` and `sum` of each query go on, and
// `factor` is what earlier results are to be multiplied with.
static void soften(float *scores, float scale, float *top, float *sum, float *factor, word *weights) {
    memcpy(factor, top, BLOCK * sizeof(float));
    for (int r = 0; r < BLOCK; r++)
#pragma omp simd
        for (int c = 0; c < BLOCK; c++) {
            float score = scale * scores[r * BLOCK + c];
            top[c] = score > top[c] ? score : top[c];
        }
#pragma omp simd
    for (int c = 0; c < BLOCK; c++) {
        factor[c] = exponential(factor[c] - top[c]);
        sum[c] *= factor[c];
    }
    for (int r = 0; r < BLOCK; r += PAIR)
#pragma omp simd
        for (int c = 0; c < BLOCK; c++) {
            float weight = exponential(scale * scores[r * BLOCK + c] - top[c]);
#if defined(BFLOAT16)
            float next = exponential(scale * scores[(r + 1) * BLOCK + c] - top[c]);
            sum[c] += weight + next;
            weights[r / PAIR * BLOCK + c] = rounded(weight) | (word)rounded(next) << 16;
#else
            sum[c] += weight;
            ((float *)weights)[r * BLOCK + c] = weight;
#endif
        }
}

static void attend_head(const attention_arguments *a, int64_t b, int64_t head, const matrix *Q, const matrix *K,
                        const matrix *V, float *scratch) {
    const int64_t D = rounded_up(a->D, WIDE), block = BLOCK * D / PAIR, stride = a->H * a->D;
    float *scores = scratch, *result = scores + BLOCK * BLOCK;  // (BLOCK, BLOCK), (D, BLOCK)
    word *weights = (word *)(result + BLOCK * D);
    for (int64_t i = 0; i * BLOCK < a->T; i++) {
        const int64_t query = i * BLOCK, count = least(BLOCK, a->T - query);
        float top[BLOCK], sum[BLOCK] = {0}, factor[BLOCK];
        for (int c = 0; c < BLOCK; c++) top[c] = -INFINITY;
        memset(result, 0, BLOCK * D * sizeof(float));
        // from its own block backwards: there each query sees a key, itself, so that `top` is finite ever after
        for (int64_t j = i; j >= (a->window < 0 ? 0 : most(0, query - a->window) / BLOCK); j--) {
            product(0, scores, K->left + j * BLOCK * D, Q->turned_right + i * block, BLOCK, BLOCK, D / PAIR);
            if (partly_hidden(i, j, a->window)) hide(scores, j * BLOCK, query, a->window, BLOCK);
            soften(scores, a->scale, top, sum, factor, weights);
            for (int64_t d = 0; d < D; d++)
#pragma omp simd
                for (int c = 0; c < BLOCK; c++) result[d * BLOCK + c] *= factor[c];
            product(1, result, V->turned_left + j * block, weights, D, BLOCK, BLOCK / PAIR);
        }
        for (int64_t d = 0; d < D; d++)
#pragma omp simd
            for (int c = 0; c < BLOCK; c++) result[d * BLOCK + c] /= sum[c];
        store_transposed(a->out + (b * a->T + query) * stride + head * a->D, stride, count, a->D, result,
                         (float *)weights, 1);
        for (int c = 0; c < count; c++)
            a->normalizer[(b * a->H + head) * a->T + query + c] = top[c] + logf(sum[c]);
    }
}

// Adds to grad_k and grad_v (T, D), which the query heads of a key/value head share; grad_k lacks the scale.
static void attend_head_backward(const attention_arguments *a, int64_t b, int64_t head, const matrix *Q, const matrix *K,
                                 const matrix *V, const matrix *G, float *grad_k, float *grad_v, float *scratch) {
    const int64_t T = a->T, padded = rounded_up(T, BLOCK), blocks = padded / BLOCK, stride = a->H * a->D;
    const int64_t D = rounded_up(a->D, WIDE), block = BLOCK * D / PAIR, place = b * T * stride + head * a->D;
    float *grad_q = scratch, *normalizer = grad_q + padded * D, *inner = normalizer + padded;  // grad_q by block, turned
    float scores[TALL * BLOCK], grad_weights[TALL * BLOCK];
    real *weights = (real *)(inner + padded), *grad_scores = weights + BLOCK * BLOCK;  // (BLOCK keys, BLOCK queries)
    word *grad_scores_right = (word *)(grad_scores + BLOCK * BLOCK);
    memset(grad_q, 0, (padded * D + 2 * padded) * sizeof(float));
    for (int64_t t = 0; t < T; t++) {
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t d = 0; d < a->D; d++) dot += read(a->out[place + t * stride + d]) * read(G->left[t * D + d]);
        inner[t] = dot;
        normalizer[t] = a->normalizer[(b * a->H + head) * T + t];
    }
    for (int64_t j = 0; j < blocks; j++) {
        const int64_t last = a->window < 0 ? blocks - 1 : least(blocks - 1, ((j + 1) * BLOCK - 1 + a->window) / BLOCK);
        for (int64_t i = j; i <= last; i++) {
            const float *normalizers = normalizer + i * BLOCK, *inners = inner + i * BLOCK;
            for (int64_t r = 0; r < BLOCK; r += TALL) {
                const int64_t rows = (j * BLOCK + r) * D;
                product(0, scores, K->left + rows, Q->turned_right + i * block, TALL, BLOCK, D / PAIR);
                product(0, grad_weights, V->left + rows, G->turned_right + i * block, TALL, BLOCK, D / PAIR);
                if (partly_hidden(i, j, a->window)) hide(scores, j * BLOCK + r, i * BLOCK, a->window, TALL);
                for (int s = 0; s < TALL; s++) {
                    real *w = weights + (r + s) * BLOCK, *g = grad_scores + (r + s) * BLOCK;
#pragma omp simd
                    for (int c = 0; c < BLOCK; c++) {
                        float weight = exponential(a->scale * scores[s * BLOCK + c] - normalizers[c]);
                        w[c] = rounded(weight);
                        g[c] = rounded(weight * (grad_weights[s * BLOCK + c] - inners[c]));
                    }
                }
            }
            pair_rows(grad_scores_right, grad_scores, BLOCK, BLOCK);
            product(1, grad_v + j * BLOCK * D, weights, G->right + i * block, BLOCK, D, BLOCK / PAIR);
            product(1, grad_k + j * BLOCK * D, grad_scores, Q->right + i * block, BLOCK, D, BLOCK / PAIR);
            product(1, grad_q + i * BLOCK * D, K->turned_left + j * block, grad_scores_right, D, BLOCK, BLOCK / PAIR);
        }
    }
    for (int64_t t = 0; t < T; t += BLOCK)
        store_transposed(a->grad_q + place + t * stride, stride, least(BLOCK, T - t), a->D, grad_q + t * D,
                         (float *)weights, a->scale);
}

// Key/value head `head` of row b, with the query heads that share it: forward, or backward where there is a gradient.
static void attend_group(const attention_arguments *a, int64_t b, int64_t head, char *memory) {
    const int64_t T = a->T, stride = a->Hkv * a->D, place = b * T * stride + head * a->D, group = a->H / a->Hkv;
    const int64_t D = rounded_up(a->D, WIDE), size = rounded_up(T, BLOCK) * D;
    const int backward = a->grad != NULL;
    matrix Q, K, V, G;
    memory = lay_out(&K, memory, a->k + place, T, a->D, stride, backward ? TURNED_LEFT : 0);
    memory = lay_out(&V, memory, a->v + place, T, a->D, stride, backward ? 0 : TURNED_LEFT);
    float *grad_k = (float *)memory, *grad_v = grad_k + size;
    memset(grad_k, 0, backward ? 2 * size * sizeof(float) : 0);
    for (int64_t h = head * group; h < (head + 1) * group; h++) {
        const int64_t queries = (b * T * a->H + h) * a->D;
        char *next = lay_out(&Q, (char *)(grad_v + size), a->q + queries, T, a->D, a->H * a->D,
                             TURNED_RIGHT | (backward ? RIGHT : 0));
        if (!backward) {
            attend_head(a, b, h, &Q, &K, &V, (float *)next);
            continue;
        }
        next = lay_out(&G, next, a->grad + queries, T, a->D, a->H * a->D, RIGHT | TURNED_RIGHT);
        attend_head_backward(a, b, h, &Q, &K, &V, &G, grad_k, grad_v, (float *)next);
    }
    for (int64_t t = 0; backward && t < T; t++)
#pragma omp simd
        for (int64_t d = 0; d < a->D; d++) {
            a->grad_k[place + t * stride + d] = rounded(a->scale * grad_k[t * D + d]);
            a->grad_v[place + t * stride + d] = rounded(grad_v[t * D + d]);
        }
}

// Causal attention: q, k, v -> out, normalizer; or, where there is a gradient, all these -> grad_q, grad_k, grad_v.
// Returns 0, or 1 if there is not enough memory, as softmax_gradient does.
int attention(const attention_arguments *a) {
    const int64_t rows = rounded_up(a->T, BLOCK), D = rounded_up(a->D, WIDE);
    const int64_t matrices = 4 * 4 * rows * D * sizeof(real), sums = (3 * rows * D + 2 * rows) * sizeof(float);
    const int64_t blocks = (3 * BLOCK * BLOCK + 2 * BLOCK * D) * sizeof(float);
    int failed = 0;
#pragma omp parallel num_threads((int)a->threads) reduction(| : failed)
    {
        char *memory = aligned_alloc(64, rounded_up(matrices + sums + blocks, 64));
        failed = memory == NULL;
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < a->B * a->Hkv; row++)
            if (memory) attend_group(a, row / a->Hkv, row % a->Hkv, memory);
        free(memory);
    }
    return failed;
}

// --- loss ----------------------------------------------------------------------------------------------------------------

// Raw logits (n, V) become d logsumexp(cap tanh(raw / cap)) / d raw, times `valid` (n); sums (n): of the exponentials.
int softmax_gradient(real *raw, const float *valid, float *sums, int64_t n, int64_t V, float cap, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *slopes = malloc(V * sizeof(float)), inverse = 1 / cap;
        failed = slopes == NULL;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) {
            if (!slopes) continue;
            real *row = raw + i * V;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < V; j++) {
                float squashed = tangent(read(row[j]) * inverse), weight = exponential(cap * squashed);
                sum += weight;
                slopes[j] = weight * (1 - squashed * squashed);
            }
            const float factor = valid[i] / sum;
#pragma omp simd
            for (int64_t j = 0; j < V; j++) row[j] = rounded(factor * slopes[j]);
            sums[i] = sum;
        }
        free(slopes);
    }
    return failed;
}

// Whether this was compiled with OpenMP, without which there is one thread.
int threaded(void) {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}
