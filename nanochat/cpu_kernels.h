// Numbers of the C kernels, compiled for fp32, or with -DBFLOAT16 for bf16; sums are in fp32.

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
enum { LANES = 16, TILE = 4 };  // floats in a vector; rows whose sums stay in registers together
#elif defined(__ARM_NEON)
enum { LANES = 4, TILE = 4 };
#else
enum { LANES = 8, TILE = 2 };
#endif
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));

// `real` is what tensors hold
#if defined(BFLOAT16)
typedef uint16_t real;
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));

static inline floats load(const real *p) { return (floats)(__builtin_convertvector(*(const halves *)p, words) << 16); }
static inline float read(real x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline real rounded(float value) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (real)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#else
typedef float real;
static inline floats load(const real *p) { return *(const floats *)p; }
static inline float read(real x) { return x; }
static inline real rounded(float value) { return value; }
#endif

// Hyperbolic tangent as a quotient of polynomials (that of the Eigen library, error about 1e-7).
static inline float tangent(float x) {
    x = x > 7.9f ? 7.9f : x < -7.9f ? -7.9f : x;  // not fminf, which compilers do not vectorize
    float s = x * x, p = -2.76076847742355e-16f, q = 1.19825839466702e-06f;
    p = p * s + 2.00018790482477e-13f;
    p = p * s - 8.60467152213735e-11f;
    p = p * s + 5.12229709037114e-08f;
    p = p * s + 1.48572235717979e-05f;
    p = p * s + 6.37261928875436e-04f;
    p = p * s + 4.89352455891786e-03f;
    q = q * s + 1.18534705686654e-04f;
    q = q * s + 2.26843463243900e-03f;
    q = q * s + 4.89352518554385e-03f;
    return x * p / q;
}

// e^x for x up to 87 as a power of two times a polynomial (Taylor's, error 2e-7); 0 below -87.
static inline float exponential(float x) {
    const float magic = 12583039;  // 1.5 * 2^23 + 127: adding it rounds to a whole number, whose low bits are an exponent's
    float shifted = x * 1.44269504f + magic, n = shifted - magic, r = x - n * 0.693145752f - n * 1.42860677e-6f, power;
    float p = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r / 720)))));
    uint32_t bits;
    memcpy(&bits, &shifted, 4), bits <<= 23, memcpy(&power, &bits, 4);
    return x < -87 ? 0 : p * power;
}
