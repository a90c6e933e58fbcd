/* What all kernels share: vectors, element types, and the descriptions Python passes. */
#ifndef OPENLORA_COMMON_H
#define OPENLORA_COMMON_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#define MAX_ROWS 12 /* of one register tile: 24 accumulators of 32 registers */
#elif defined(__AVX__)
#define LANES 8
#define MAX_ROWS 4 /* 8 accumulators of 16 registers */
#else
#define LANES 4
#define MAX_ROWS 8
#endif

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#define PANEL (2 * LANES) /* outputs of a packed weight panel */
#define PAGE_RANK 16
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef uint16_t bf16;

enum { F32 = 0, BF16 = 1 };

INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf load_bf16(const bf16 *p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}

/* Round to nearest even; a NaN stays one. */
INLINE void store_bf16(bf16 *p, vf v) {
    vu u = (vu)v;
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vu is_nan = (vu)(v != v);
    rounded = (rounded & ~is_nan) | (((vu){0} + 0x7fc0) & is_nan);
    vh h = __builtin_convertvector(rounded, vh);
    memcpy(p, &h, sizeof h);
}

INLINE float to_float(bf16 x) {
    uint32_t u = (uint32_t)x << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

INLINE bf16 to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return f != f ? 0x7fc0 : (bf16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

/* Elements of either type, by index. */
INLINE float get(const void *p, int64_t i, int type) {
    return type == F32 ? ((const float *)p)[i] : to_float(((const bf16 *)p)[i]);
}

INLINE void put(void *p, int64_t i, int type, float x) {
    if (type == F32)
        ((float *)p)[i] = x;
    else
        ((bf16 *)p)[i] = to_bf16(x);
}

INLINE vf get_v(const void *p, int64_t i, int type) {
    return type == F32 ? load((const float *)p + i) : load_bf16((const bf16 *)p + i);
}

INLINE void put_v(void *p, int64_t i, int type, vf x) {
    if (type == F32)
        store((float *)p + i, x);
    else
        store_bf16((bf16 *)p + i, x);
}

INLINE const void *at(const void *p, int64_t i, int type) {
    return (const char *)p + i * (type == F32 ? 4 : 2);
}

#if LANES == 16
#define EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif LANES == 8
#define EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14
#define ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15
#else
#define EVEN_LANES 0, 2, 4, 6
#define ODD_LANES 1, 3, 5, 7
#endif
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

/* Sums of neighbours: a's in the first half of the lanes, b's in the second. */
INLINE vf add_pairs(vf a, vf b) {
    return SHUFFLE(a, b, EVEN_LANES) + SHUFFLE(a, b, ODD_LANES);
}

INLINE float sum_of(vf v) {
    for (int width = LANES; width > 1; width /= 2) v = add_pairs(v, v);
    return v[0];
}

/* e^x to about 1 ulp (Cephes' polynomial); below -87 it stays at e^-87, NaN stays NaN. */
INLINE vf exp_of(vf x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    vi low = x < -87.0f, high = x > 88.0f;
    x = (vf)(((vi)x & ~low & ~high) | ((vi)splat(-87.0f) & low) | ((vi)splat(88.0f) & high));
    vf shifted = x * 1.44269504f + magic;
    vf whole = shifted - magic;
    vf r = x - whole * 0.693359375f;
    r = r + whole * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vi exponent = ((vi)shifted - 0x4b400000 + 127) << 23;
    return p * (vf)exponent;
}

/* cap * tanh(x / cap) */
INLINE vf tanh_capped(vf x, float cap) {
    return cap - 2.0f * cap / (exp_of(x * (2.0f / cap)) + 1.0f);
}

enum { SILU = 0, GELU_TANH = 1 };

INLINE vf gate_of(vf x, int kind) {
    /* gelu_tanh is x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3)). */
    vf z = kind == SILU ? x : 1.5957691216f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp_of(-z));
}

/* One LoRA site of a step. A group is up to MAX_GROUP adjacent rows with the same pages; h holds
   [slices * PAGE_RANK] for each row and page. */
#define MAX_GROUP 8
#define GROUP_FIELDS 2
#define TASK_FIELDS 4
#define ROW_FIELDS 4
typedef struct {
    int64_t num_tasks;      /* 0: no row has pages here */
    int64_t num_groups;
    const int32_t *tasks;   /* [num_tasks, 4] of the shrink: first row, rows, page, first h */
    const int32_t *rows;    /* [rows, 4] of the expand: first of pages, pages, first h, step of h */
    const int32_t *groups;  /* [num_groups, 2], all rows of the step: first row, rows */
    const int32_t *pages;   /* page IDs of the groups, one after the other */
    const float *weights;   /* one a page */
    float *h;
} Site;

/* Few rows, as in decode, mostly have an adapter each: whole matrices B are read one by one, in
   run_expand. Many rows share them: what is left of LoRA is done panel by panel in run_linear. The
   sums are the same. */
#define FEW_ROWS 32

/* What changes from step to step. Rows are tokens; decode rows come first. */
typedef struct {
    int64_t rows;
    int64_t decode_rows;
    const int32_t *token_ids;
    const int32_t *slots;         /* [rows] block * block_size + place in it */
    const int32_t *context_lens;  /* [decode_rows] */
    const int32_t *block_tables;  /* [decode_rows, table_width] */
    int64_t table_width;
    const float *cos[2];          /* [rows, rotary_dim / 2]: of all layers, of local layers */
    const float *sin[2];
    Site sites[4];
} Step;

/* One operation; which of the fields it reads stands with its kernel. */
typedef struct {
    int32_t kind;
    int32_t type; /* of activations, weights and cache */
    int64_t n[8];
    void *p[8];
    float f[2];
} Op;

/* How the threads of one operation share its tasks: whoever is free takes the next ones. */
typedef struct {
    int64_t *next;
    int64_t threads;
} Share;

INLINE int64_t claim(const Share *share, int64_t count) {
    return __atomic_fetch_add(share->next, count, __ATOMIC_RELAXED);
}

/* Tasks claimed at a time: few claims, yet enough pieces to even out a thread that was delayed. */
INLINE int64_t piece(const Share *share, int64_t tasks) {
    int64_t size = tasks / (share->threads * 8);
    return size < 1 ? 1 : size;
}

void run_linear(const Op *op, const Step *step, const Share *share);
void run_shrink(const Op *op, const Step *step, const Share *share);
void run_expand(const Op *op, const Step *step, const Share *share);
void shrink_task(const Op *op, const Site *site, int64_t task);
void fetch_block(const Op *op, const Site *site, int64_t task);
void run_norm(const Op *op, const Step *step, const Share *share);
void run_norm_heads(const Op *op, const Step *step, const Share *share);
void run_gated(const Op *op, const Step *step, const Share *share);
void run_rope(const Op *op, const Step *step, const Share *share);
void run_attention(const Op *op, const Step *step, const Share *share);
void run_embed(const Op *op, const Step *step, const Share *share);
void run_add(const Op *op, const Step *step, const Share *share);
void run_greedy(const Op *op, const Step *step, const Share *share);
void run_soft_cap(const Op *op, const Step *step, const Share *share);

#endif
