/* Attention of one query per sequence over its blocks of the KV cache, softmax in one pass. */
#include "common.h"

#define CHUNK 64          /* positions scored at a time: their V stays in the first-level cache */
#define MAX_HEAD_DIM 512  /* checked by Python */

/* One kv head's sequence and the query heads that read it. */
typedef struct {
    const void *k, *v;       /* of position 0's block 0, this head */
    const int32_t *table;
    int64_t block_size, dim, block_stride;
    int type;
} Head;

INLINE int64_t place_of(const Head *head, int64_t position) {
    return head->table[position / head->block_size] * head->block_stride
           + position % head->block_size * head->dim;
}

INLINE void score(const Head *head, const float *q, int64_t first, int64_t count, float *scores,
                  int type) {
    for (int64_t i = 0; i < count; i++) {
        const void *k = at(head->k, place_of(head, first + i), type);
        vf sum = {0};
        float rest = 0;
        int64_t d = 0;
        for (; d + LANES <= head->dim; d += LANES) sum += load(q + d) * get_v(k, d, type);
        for (; d < head->dim; d++) rest += q[d] * get(k, d, type);
        scores[i] = sum_of(sum) + rest;
    }
}

INLINE void mix(const Head *head, const float *p, int64_t first, int64_t count, float keep,
                float *out, int type) {
    int64_t d = 0;
    for (; d + 4 * LANES <= head->dim; d += 4 * LANES) {
        vf acc[4];
        UNROLL for (int i = 0; i < 4; i++) acc[i] = load(out + d + i * LANES) * keep;
        for (int64_t j = 0; j < count; j++) {
            const void *v = at(head->v, place_of(head, first + j) + d, type);
            UNROLL for (int i = 0; i < 4; i++) acc[i] += splat(p[j]) * get_v(v, i * LANES, type);
        }
        UNROLL for (int i = 0; i < 4; i++) store(out + d + i * LANES, acc[i]);
    }
    for (; d + LANES <= head->dim; d += LANES) {
        vf acc = load(out + d) * keep;
        for (int64_t j = 0; j < count; j++)
            acc += splat(p[j]) * get_v(head->v, place_of(head, first + j) + d, type);
        store(out + d, acc);
    }
    for (; d < head->dim; d++) {
        out[d] *= keep;
        for (int64_t j = 0; j < count; j++)
            out[d] += p[j] * get(head->v, place_of(head, first + j) + d, type);
    }
}

INLINE float largest(const float *x, int64_t count, float most) {
    for (int64_t i = 0; i < count; i++) most = x[i] > most || x[i] != x[i] ? x[i] : most;
    return most;
}

/* Softmax weights of scores relative to their maximum; returns their sum. */
INLINE float weigh(float *scores, int64_t count, float most) {
    for (int64_t i = count; i % LANES; i++) scores[i] = -__builtin_inff();
    for (int64_t i = 0; i < count; i += LANES) store(scores + i, exp_of(load(scores + i) - most));
    float sum = 0;
    for (int64_t i = 0; i < count; i++) sum += scores[i];
    return sum;
}

INLINE void soft_cap(float *scores, int64_t count, float cap) {
    for (int64_t i = count; i % LANES; i++) scores[i] = 0;
    for (int64_t i = 0; i < count; i += LANES)
        store(scores + i, tanh_capped(load(scores + i), cap));
}

INLINE void attend(const Head *head, const void *q, int64_t first, int64_t end, float scale,
                   float cap, void *y, int type) {
    float scaled[MAX_HEAD_DIM], out[MAX_HEAD_DIM] = {0}, scores[CHUNK];
    for (int64_t d = 0; d < head->dim; d++) scaled[d] = get(q, d, type) * scale;
    float most = -__builtin_inff(), sum = 0;
    for (int64_t start = first; start < end; start += CHUNK) {
        int64_t count = end - start < CHUNK ? end - start : CHUNK;
        score(head, scaled, start, count, scores, type);
        if (cap > 0) soft_cap(scores, count, cap);
        float top = largest(scores, count, most);
        float keep = start == first ? 0.0f : exp_of(splat(most - top))[0];
        sum = sum * keep + weigh(scores, count, top);
        mix(head, scores, start, count, keep, out, type);
        most = top;
    }
    for (int64_t d = 0; d < head->dim; d++) put(y, d, type, out[d] / sum);
}

/* p: qkv (rotated), cache of the layer, y; n: query heads, kv heads, head_dim, blocks,
   block_size, window (0: all); f: scale, soft cap (0: none). Decode rows alone. */
void run_attention(const Op *op, const Step *step, const Share *share) {
    int64_t q_heads = op->n[0], kv_heads = op->n[1], dim = op->n[2], group = q_heads / kv_heads;
    int64_t plane = op->n[3] * kv_heads * op->n[4] * dim, tasks = step->decode_rows * kv_heads;
    for (int64_t task = claim(share, 1); task < tasks; task = claim(share, 1)) {
        int64_t row = task / kv_heads, kv_head = task % kv_heads, end = step->context_lens[row];
        int64_t first = op->n[5] && end > op->n[5] ? end - op->n[5] : 0;
        Head head = {.table = step->block_tables + row * step->table_width,
                     .block_size = op->n[4], .dim = dim, .type = op->type,
                     .block_stride = kv_heads * op->n[4] * dim};
        head.k = at(op->p[1], kv_head * op->n[4] * dim, op->type);
        head.v = at(head.k, plane, op->type);
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++) {
            const void *q = at(op->p[0], (row * (q_heads + 2 * kv_heads) + h) * dim, op->type);
            void *y = (char *)at(op->p[2], (row * q_heads + h) * dim, op->type);
            if (op->type == F32)
                attend(&head, q, first, end, op->f[0], op->f[1], y, F32);
            else
                attend(&head, q, first, end, op->f[0], op->f[1], y, BF16);
        }
    }
}
