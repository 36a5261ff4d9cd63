// Decoding on CPUs: one layer of the model for one new position of each row, and the product that the head needs.
//
// Generating one token reads every weight once, so these run at the speed of the memory. Each output is summed in the
// same order however many rows there are: a row's result does not depend on what else is in the batch.
//
// B rows, C channels, H query heads, Hkv key/value heads, D head dim.

#include "cpu_kernels.h"

enum { AHEAD = 2048 / sizeof(real) };  // so far ahead of its reading memory is fetched

// One step of a dot product takes STEP elements.
#if defined(BFLOAT16) && defined(__AVX512BF16__)
enum { STEP = 32 };
static inline floats step(floats sum, const real *a, const real *b) {
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
}
#else
enum { STEP = LANES };
static inline floats step(floats sum, const real *a, const real *b) { return sum + load(a) * load(b); }
#endif

// Sum of a vector's floats; and of four vectors at once, in the same order.
#if defined(__AVX512F__)
static inline __m128 join_quarters(__m512 v) {
    __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}
static inline float total(floats v) {
    __m512 x = (__m512)v;
    x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4e));  // 2 3 0 1
    return _mm_cvtss_f32(join_quarters(_mm512_add_ps(x, _mm512_permute_ps(x, 0xb1))));  // 1 0 3 2
}
static inline void total_four(const floats *v, float *out) {
    __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    _mm_storeu_ps(out, join_quarters(_mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd))));
}
#else
static inline float total(floats v) {
    float lanes[LANES];
    memcpy(lanes, &v, sizeof lanes);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}
static inline void total_four(const floats *v, float *out) {
    for (int i = 0; i < 4; i++) out[i] = total(v[i]);
}
#endif

// --- products --------------------------------------------------------------------------------------------------------

// R rows of x (., K) times J rows of w (., K) -> out, whose rows lie N apart; R and J are constants at every call.
static inline __attribute__((always_inline)) void tile(int R, int J, const real *x, const real *w, real *out, int64_t N,
                                                       int64_t K, int64_t ahead) {
    floats sums[4][4];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < J; j++) sums[r][j] = (floats){0};
    for (int64_t k = 0; k < K; k += STEP) {
        __builtin_prefetch(w + ahead + k);
        for (int r = 0; r < R; r++)
            for (int j = 0; j < J; j++) sums[r][j] = step(sums[r][j], x + r * K + k, w + j * K + k);
    }
    for (int r = 0; r < R; r++) {
        float totals[4];
        if (J == 4) total_four(sums[r], totals);
        else totals[0] = total(sums[r][0]);
        for (int j = 0; j < J; j++) out[r * N + j] = rounded(totals[j]);
    }
}

// out (B, N) = x (B, K) w (N, K)^T; N a multiple of 4, K of 32. For few rows w is read from one end to the other, as memory
// likes best; many rows share four of its rows while eight rows further on are fetched, one by each tile.
void linear(const real *x, const real *w, real *out, int64_t B, int64_t N, int64_t K, int threads) {
    if (B <= 4) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t n = 0; n < N; n++) switch (B) {
            case 1: tile(1, 1, x, w + n * K, out + n, N, K, AHEAD); break;
            case 2: tile(2, 1, x, w + n * K, out + n, N, K, AHEAD); break;
            case 3: tile(3, 1, x, w + n * K, out + n, N, K, AHEAD); break;
            case 4: tile(4, 1, x, w + n * K, out + n, N, K, AHEAD);
        }
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < N; n += 4) {
        int64_t b = 0;
        for (; b + TILE <= B; b += TILE)
            tile(TILE, 4, x + b * K, w + n * K, out + b * N + n, N, K, (8 + b / TILE % 4) * K);
        for (; b < B; b++) tile(1, 4, x + b * K, w + n * K, out + b * N + n, N, K, 8 * K);
    }
}

// out (n) = cap tanh(x / cap)
void softcap(const real *x, float *out, int64_t n, float cap, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) out[i] = cap * tangent(read(x[i]) / cap);
}

// --- what a layer consists of -------------------------------------------------------------------------------------------

// out (C) = a x + b y, and its RMS norm -> normed (C).
static void add_norm(float a, const real *x, float b, const real *y, real *out, real *normed, int64_t C, float epsilon) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < C; c++) {
        out[c] = rounded(a * read(x[c]) + b * read(y[c]));
        squares += read(out[c]) * read(out[c]);
    }
    float factor = 1 / sqrtf(squares / C + epsilon);
    for (int64_t c = 0; c < C; c++) normed[c] = rounded(factor * read(out[c]));
}

// Rotary embedding of x (H, D) by minus the angle whose cos and sin (D/2) are given, RMS norm, times scale; in place.
static void rotary_norm(real *x, const real *cosine, const real *sine, int64_t H, int64_t D, float scale, float epsilon) {
    float low[D / 2], high[D / 2];
    for (int64_t h = 0; h < H; h++, x += D) {
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < D / 2; d++) {
            low[d] = read(x[d]) * read(cosine[d]) + read(x[D / 2 + d]) * read(sine[d]);
            high[d] = read(x[D / 2 + d]) * read(cosine[d]) - read(x[d]) * read(sine[d]);
            squares += low[d] * low[d] + high[d] * high[d];
        }
        float factor = scale / sqrtf(squares / D + epsilon);
        for (int64_t d = 0; d < D / 2; d++) {
            x[d] = rounded(factor * low[d]);
            x[D / 2 + d] = rounded(factor * high[d]);
        }
    }
}

// out (V * LANES) += weights (count) times the values, `stride` apart; V vectors stay in registers.
static inline __attribute__((always_inline)) void mix(int V, const float *weights, const real *values, real *out,
                                                      int64_t count, int64_t stride, float sum) {
    floats sums[8];
    for (int i = 0; i < V; i++) sums[i] = (floats){0};
    for (int64_t s = 0; s < count; s++, values += stride)
        for (int i = 0; i < V; i++) {
            __builtin_prefetch(values + i * LANES + AHEAD);
            sums[i] += weights[s] * load(values + i * LANES);
        }
    for (int i = 0; i < V; i++)
        for (int j = 0; j < LANES; j++) out[i * LANES + j] = rounded(sums[i][j] / sum);
}

// One query (D) over `count` keys and values, `stride` apart -> out (D).
static void attend(const real *query, const real *keys, const real *values, real *out, int64_t count, int64_t stride,
                   int64_t D) {
    float weights[count], scale = 1 / sqrtf((float)D), top = -INFINITY, sum = 0;
    for (int64_t s = 0; s < count; s++) {
        floats dot = {0};
        for (int64_t d = 0; d < D; d += STEP) {
            __builtin_prefetch(keys + s * stride + d + AHEAD);
            dot = step(dot, query + d, keys + s * stride + d);
        }
        weights[s] = scale * total(dot);
        top = fmaxf(top, weights[s]);
    }
#pragma omp simd
    for (int64_t s = 0; s < count; s++) weights[s] = exponential(weights[s] - top);
    for (int64_t s = 0; s < count; s++) sum += weights[s];
    if (D % (8 * LANES) == 0)
        for (int64_t d = 0; d < D; d += 8 * LANES) mix(8, weights, values + d, out + d, count, stride, sum);
    else
        for (int64_t d = 0; d < D; d += 2 * LANES) mix(2, weights, values + d, out + d, count, stride, sum);
}

// --- a layer ---------------------------------------------------------------------------------------------------------

typedef struct {  // in the order of BlockArguments in cpu_kernels.py
    const real *x, *x0, *c_q, *c_k, *c_v, *c_proj, *ve_gate, *c_fc, *mlp_c_proj, *value_embedding, *cos, *sin;
    real *k_cache, *v_cache, *scratch, *out;
    const int64_t *slots, *lengths;  // (B): the row's place in the caches, and how many of its positions are there
    int64_t B, C, F, H, Hkv, D, gate_channels, window, slot_stride, head_stride, place_stride, threads;
    float resid_lambda, x0_lambda, qk_scale, epsilon;
} block_arguments;

// One key/value head of one row: gate the value embedding, turn queries and key, store key and value, attend -> out.
static void attend_head(const block_arguments *a, int64_t b, int64_t head, const real *h, real *q, real *k, real *v,
                        real *out) {
    const int64_t D = a->D, group = a->H / a->Hkv, row = b * a->Hkv + head, last = a->lengths[b];
    const real *cosine = a->cos + b * (D / 2), *sine = a->sin + b * (D / 2);
    q += row * group * D, k += row * D, v += row * D, out += row * group * D;
    if (a->ve_gate) {
        float gate = 0;
        for (int64_t c = 0; c < a->gate_channels; c++)
            gate += read(h[b * a->C + c]) * read(a->ve_gate[head * a->gate_channels + c]);
        gate = 3 / (1 + expf(-gate));
        for (int64_t d = 0; d < D; d++) v[d] = rounded(read(v[d]) + gate * read(a->value_embedding[row * D + d]));
    }
    rotary_norm(q, cosine, sine, group, D, a->qk_scale, a->epsilon);
    rotary_norm(k, cosine, sine, 1, D, a->qk_scale, a->epsilon);
    const int64_t start = a->slots[b] * a->slot_stride + head * a->head_stride;
    real *keys = a->k_cache + start, *values = a->v_cache + start;
    memcpy(keys + last * a->place_stride, k, D * sizeof(real));
    memcpy(values + last * a->place_stride, v, D * sizeof(real));
    const int64_t first = a->window >= 0 && last > a->window ? last - a->window : 0;
    for (int64_t i = 0; i < group; i++)
        attend(q + i * D, keys + first * a->place_stride, values + first * a->place_stride, out + i * D,
               last - first + 1, a->place_stride, D);
}

// Block.begin, attention and Block.close of gpt.py for x (B, C), one new position of each row; C and D multiples of 32. `scratch`
// has room for B (3 C + 2 Hkv D + F) numbers.
void block(const block_arguments *a) {
    const int64_t B = a->B, C = a->C, F = a->F, KV = a->Hkv * a->D;
    const int threads = a->threads;
    real *out = a->out, *h = a->scratch, *y = h + B * C, *q = y + B * C, *k = q + B * C, *v = k + B * KV, *wide = v + B * KV;
#pragma omp parallel for num_threads(threads) if (B > 1)
    for (int64_t i = 0; i < B * C; i += C)
        add_norm(a->resid_lambda, a->x + i, a->x0_lambda, a->x0 + i, out + i, h + i, C, a->epsilon);
    linear(h, a->c_q, q, B, C, C, threads);
    linear(h, a->c_k, k, B, KV, C, threads);
    linear(h, a->c_v, v, B, KV, C, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t row = 0; row < B * a->Hkv; row++) attend_head(a, row / a->Hkv, row % a->Hkv, h, q, k, v, y);
    linear(y, a->c_proj, q, B, C, C, threads);
#pragma omp parallel for num_threads(threads) if (B > 1)
    for (int64_t i = 0; i < B * C; i += C) add_norm(1, out + i, 1, q + i, out + i, h + i, C, a->epsilon);
    linear(h, a->c_fc, wide, B, F, C, threads);
#pragma omp parallel for num_threads(threads) if (B > 1)
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = b * F; i < (b + 1) * F; i++) {
            float x = read(wide[i]);
            wide[i] = rounded(x > 0 ? x * x : 0);
        }
    linear(wide, a->mlp_c_proj, y, B, C, F, threads);
    for (int64_t i = 0; i < B * C; i++) out[i] = rounded(read(out[i]) + read(y[i]));
}
