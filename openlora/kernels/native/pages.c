/* LoRA tensors as files have them into pages, transposed, scaled and checked in one pass. */
#include "common.h"

#define TILE 16 /* PAGE_RANK */

typedef uint16_t Words __attribute__((vector_size(2 * TILE)));
typedef uint32_t Longs __attribute__((vector_size(4 * TILE)));
typedef float Floats __attribute__((vector_size(4 * TILE)));

/* One tensor: lora_A [rank, features] or lora_B [features, rank]. Page p takes ranks 16p to 16p+15,
   r counting from there: A's element (r, f) goes to page[f * stride + r], B's element (f, r) to
   page[f / block * block_stride + r * stride + f % block]. */
typedef struct {
    const void *from; /* contiguous, of any alignment */
    void *to;         /* of the first page */
    int64_t rank, features;
    int64_t page_stride, stride, block, block_stride; /* in elements; the last two are B's */
    int32_t is_b, from_type, to_type;
    float scale; /* in fp32, before the rounding */
} Fill;

#if defined(__clang__)
#define MIX(a, b, T, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIX(a, b, T, ...) __builtin_shuffle(a, b, (T){__VA_ARGS__})
#endif
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31

/* Four perfect shuffles transpose 16 x 16. */
#define TRANSPOSE(T)                                                                              \
    for (int round = 0; round < 4; round++) {                                                     \
        T next[TILE];                                                                             \
        UNROLL for (int i = 0; i < TILE / 2; i++) {                                               \
            next[2 * i] = MIX(tile[i], tile[i + TILE / 2], T, LOW);                               \
            next[2 * i + 1] = MIX(tile[i], tile[i + TILE / 2], T, HIGH);                          \
        }                                                                                         \
        UNROLL for (int i = 0; i < TILE; i++) tile[i] = next[i];                                  \
    }

INLINE float one(const char *from, int64_t i, int type) {
    if (type == F32) {
        float x;
        memcpy(&x, from + 4 * i, sizeof x);
        return x;
    }
    bf16 x;
    memcpy(&x, from + 2 * i, sizeof x);
    return to_float(x);
}

/* As bits of the page's type; adds to `bad` where they are no number. */
INLINE uint32_t rounded(float x, int type, uint32_t *bad) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (type == BF16) bits = to_bf16(x) << 16;
    *bad |= (bits & 0x7f800000) == 0x7f800000;
    return type == BF16 ? bits >> 16 : bits;
}

INLINE void put_bits(char *to, int64_t i, int type, uint32_t bits) {
    if (type == F32) {
        memcpy(to + 4 * i, &bits, 4);
    } else {
        uint16_t word = (uint16_t)bits;
        memcpy(to + 2 * i, &word, 2);
    }
}

INLINE Longs rounded_row(const char *from, int from_type, int to_type, float scale, int scaled,
                         Longs *bad) {
    Floats x;
    if (from_type == F32) {
        memcpy(&x, from, sizeof x);
    } else {
        Words words;
        memcpy(&words, from, sizeof words);
        x = (Floats)(__builtin_convertvector(words, Longs) << 16);
    }
    if (scaled) x *= scale;
    Longs bits = (Longs)x;
    if (to_type == BF16 && (scaled || from_type == F32)) {
        /* To nearest even, in the upper half; what is no number stays none. */
        Longs up = bits + 0x7fff + ((bits >> 16) & 1);
        Longs none = (Longs)((bits & 0x7fffffff) > 0x7f800000);
        bits = (up & ~none) | (none & 0x7fc00000);
    }
    *bad |= (Longs)((bits & 0x7f800000) == 0x7f800000);
    return bits;
}

/* 16 rows of 16, `from_stride` elements apart (those from `rows` on are zeros), transposed. */
INLINE void fill_tile(const char *from, int64_t from_stride, int rows, char *to, int64_t to_stride,
                      int from_type, int to_type, float scale, int scaled, Longs *bad) {
    const int64_t from_size = from_type == F32 ? 4 : 2, to_size = to_type == F32 ? 4 : 2;
    if (to_type == BF16) {
        Words tile[TILE];
        for (int i = 0; i < TILE; i++) {
            tile[i] = (Words){0};
            if (i < rows)
                tile[i] = __builtin_convertvector(
                    rounded_row(from + i * from_stride * from_size, from_type, to_type, scale,
                                scaled, bad) >>
                        16,
                    Words);
        }
        TRANSPOSE(Words)
        UNROLL for (int i = 0; i < TILE; i++)
            memcpy(to + i * to_stride * to_size, &tile[i], sizeof tile[i]);
    } else {
        Longs tile[TILE];
        for (int i = 0; i < TILE; i++) {
            tile[i] = (Longs){0};
            if (i < rows)
                tile[i] = rounded_row(from + i * from_stride * from_size, from_type, to_type,
                                      scale, scaled, bad);
        }
        TRANSPOSE(Longs)
        UNROLL for (int i = 0; i < TILE; i++)
            memcpy(to + i * to_stride * to_size, &tile[i], sizeof tile[i]);
    }
}

INLINE uint32_t fill_typed(const Fill *fill, int from_type, int to_type, int scaled) {
    const int64_t from_size = from_type == F32 ? 4 : 2, to_size = to_type == F32 ? 4 : 2;
    const int64_t rank = fill->rank, features = fill->features, stride = fill->stride;
    const char *from = fill->from;
    Longs wide = {0};
    uint32_t bad = 0;
    for (int64_t first = 0; first < rank; first += TILE) {
        const int ranks = rank - first < TILE ? (int)(rank - first) : TILE;
        char *page = (char *)fill->to + first / TILE * fill->page_stride * to_size;
        int64_t k = 0;
        if (!fill->is_b) {
            const char *part = from + first * features * from_size;
            for (; k + TILE <= features; k += TILE)
                fill_tile(part + k * from_size, features, ranks, page + k * stride * to_size,
                          stride, from_type, to_type, fill->scale, scaled, &wide);
            for (; k < features; k++)
                for (int r = 0; r < ranks; r++) {
                    float x = one(part, r * features + k, from_type);
                    if (scaled) x *= fill->scale;
                    put_bits(page, k * stride + r, to_type, rounded(x, to_type, &bad));
                }
            continue;
        }
        const char *part = from + first * from_size;
        for (; k < features;) {
            const int64_t in_block = k % fill->block;
            char *to = page + (k / fill->block * fill->block_stride + in_block) * to_size;
            if (ranks == TILE && in_block + TILE <= fill->block) {
                fill_tile(part + k * rank * from_size, rank, TILE, to, stride, from_type, to_type,
                          fill->scale, scaled, &wide);
                k += TILE;
                continue;
            }
            for (int r = 0; r < ranks; r++) {
                float x = one(part, k * rank + r, from_type);
                if (scaled) x *= fill->scale;
                put_bits(to, r * stride, to_type, rounded(x, to_type, &bad));
            }
            k++;
        }
    }
    for (int i = 0; i < TILE; i++) bad |= wide[i];
    return bad;
}

/* Fill pages from all tensors; the index of the first that holds what is no number, -1: none. */
int64_t ol_fill_pages(const Fill *fills, int64_t count) {
    int64_t first_bad = -1;
    for (int64_t i = 0; i < count; i++) {
        const Fill *fill = &fills[i];
        const int scaled = fill->scale != 1.0f;
        uint32_t bad;
#define TYPED(from, to)                                                                           \
    else if (fill->from_type == from && fill->to_type == to) bad =                                \
        scaled ? fill_typed(fill, from, to, 1) : fill_typed(fill, from, to, 0)
        if (0) bad = 0;
        TYPED(F32, F32);
        TYPED(F32, BF16);
        TYPED(BF16, F32);
        else bad = scaled ? fill_typed(fill, BF16, BF16, 1) : fill_typed(fill, BF16, BF16, 0);
        if (bad && first_bad < 0) first_bad = i;
    }
    return first_bad;
}
