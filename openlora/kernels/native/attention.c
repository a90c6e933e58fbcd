/* Attention of one query per sequence over its blocks of the KV cache, softmax in one pass. */
#include "common.h"

#define CHUNK 64           /* positions scored at a time: their V stays in the first-level cache */
#define MAX_GROUP_DIM 16384 /* query heads of a kv head * head_dim; checked by Python */

/* One sequence's keys and values of one kv head, and what its query heads gather from them. */
typedef struct {
    const void *k, *v; /* of block 0 */
    const int32_t *table;
    int64_t block_size, block_stride;
    float scale, cap;
} Head;

/* Lane i of the result is the sum of v[i]'s lanes. */
INLINE vf sums_of(vf v[LANES]) {
#if LANES >= 16
    UNROLL for (int i = 0; i < 8; i++) v[i] = add_pairs(v[2 * i], v[2 * i + 1]);
#endif
#if LANES >= 8
    UNROLL for (int i = 0; i < 4; i++) v[i] = add_pairs(v[2 * i], v[2 * i + 1]);
#endif
    return add_pairs(add_pairs(v[0], v[1]), add_pairs(v[2], v[3]));
}

INLINE void score(const Head *head, int64_t dim, const float *q, const int64_t *places, int64_t count,
                  float *scores, int type) {
    for (int64_t i = 0; i < count; i += LANES) {
        vf sums[LANES];
        float rest[LANES] = {0};
        UNROLL for (int j = 0; j < LANES; j++) {
            /* Behind the last position its key is read again; the score is not used. */
            int64_t place = places[i + j < count ? i + j : count - 1];
            const void *k = at(head->k, place, type);
            int64_t d = 0;
            vf sum = {0};
            for (; d + LANES <= dim; d += LANES) sum += load(q + d) * get_v(k, d, type);
            for (; d < dim; d++) rest[j] += q[d] * get(k, d, type);
            sums[j] = sum;
        }
        store(scores + i, sums_of(sums) + load(rest));
    }
}

/* out = out * keep + sum over positions of p * v. */
INLINE void mix(const Head *head, int64_t dim, const float *p, const int64_t *places, int64_t count, float keep,
                float *out, int type) {
    int64_t d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES) {
        vf acc[4];
        UNROLL for (int i = 0; i < 4; i++) acc[i] = load(out + d + i * LANES) * keep;
        for (int64_t j = 0; j < count; j++) {
            const void *v = at(head->v, places[j] + d, type);
            UNROLL for (int i = 0; i < 4; i++) acc[i] += splat(p[j]) * get_v(v, i * LANES, type);
        }
        UNROLL for (int i = 0; i < 4; i++) store(out + d + i * LANES, acc[i]);
    }
    for (; d + LANES <= dim; d += LANES) {
        vf acc = load(out + d) * keep;
        for (int64_t j = 0; j < count; j++)
            acc += splat(p[j]) * get_v(head->v, places[j] + d, type);
        store(out + d, acc);
    }
    for (; d < dim; d++) {
        out[d] *= keep;
        for (int64_t j = 0; j < count; j++)
            out[d] += p[j] * get(head->v, places[j] + d, type);
    }
}

/* Scores become softmax weights relative to the largest score so far. */
INLINE float weigh(float *scores, int64_t count, float *most, float cap) {
    if (cap > 0)
        for (int64_t i = 0; i < count; i += LANES)
            store(scores + i, tanh_capped(load(scores + i), cap));
    for (int64_t i = 0; i < count; i++)
        if (scores[i] > *most || scores[i] != scores[i]) *most = scores[i];
    for (int64_t i = count; i % LANES; i++) scores[i] = -__builtin_inff();
    vf sum = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        vf weights = exp_of(load(scores + i) - *most);
        vi hidden = load(scores + i) == -__builtin_inff();
        weights = (vf)((vi)weights & ~hidden);
        store(scores + i, weights);
        sum += weights;
    }
    return sum_of(sum);
}

/* q and y: the group's heads, one after the other, dim apart. */
INLINE void attend(const Head *head, int64_t dim, const void *q, int64_t heads, int64_t first,
                   int64_t end, void *y, int type) {
    float scaled[MAX_GROUP_DIM], out[MAX_GROUP_DIM], most[heads], sum[heads], scores[CHUNK];
    int64_t places[CHUNK];
    for (int64_t i = 0; i < heads * dim; i++) scaled[i] = get(q, i, type) * head->scale;
    memset(out, 0, heads * dim * sizeof(float));
    for (int64_t h = 0; h < heads; h++) most[h] = -__builtin_inff(), sum[h] = 0;
    for (int64_t start = first; start < end; start += CHUNK) {
        int64_t count = end - start < CHUNK ? end - start : CHUNK;
        int64_t block = start / head->block_size, offset = start % head->block_size;
        for (int64_t i = 0; i < count; i++) {
            places[i] = head->table[block] * head->block_stride + offset * dim;
            /* Read only behind all scores of the chunk: it comes meanwhile. */
            const char *v = at(head->v, places[i], type);
            for (int64_t line = 0; line < dim * (type == F32 ? 4 : 2); line += 64)
                __builtin_prefetch(v + line);
            if (++offset == head->block_size) offset = 0, block++;
        }
        for (int64_t h = 0; h < heads; h++) {
            score(head, dim, scaled + h * dim, places, count, scores, type);
            float before = most[h], total = weigh(scores, count, &most[h], head->cap);
            float keep = start == first ? 0.0f : exp_of(splat(before - most[h]))[0];
            sum[h] = sum[h] * keep + total;
            mix(head, dim, scores, places, count, keep, out + h * dim, type);
        }
    }
    for (int64_t h = 0; h < heads; h++)
        for (int64_t d = 0; d < dim; d++) put(y, h * dim + d, type, out[h * dim + d] / sum[h]);
}

/* With the usual sizes known, their loops are no loops. */
#define ATTEND(name, type)                                                                     \
    static void name(const Head *head, int64_t dim, const void *q, int64_t heads,              \
                     int64_t first, int64_t end, void *y) {                                    \
        if (dim == 64)                                                                         \
            attend(head, 64, q, heads, first, end, y, type);                                   \
        else if (dim == 128)                                                                   \
            attend(head, 128, q, heads, first, end, y, type);                                  \
        else                                                                                   \
            attend(head, dim, q, heads, first, end, y, type);                                  \
    }
ATTEND(attend_f32, F32)
ATTEND(attend_bf16, BF16)

/* p: qkv (rotated), cache of the layer, y; n: query heads, kv heads, head_dim, blocks,
   block_size, window (0: all); f: scale, soft cap (0: none). Decode rows alone. */
void run_attention(const Op *op, const Step *step, const Share *share) {
    int64_t q_heads = op->n[0], kv_heads = op->n[1], dim = op->n[2], group = q_heads / kv_heads;
    int64_t plane = op->n[3] * kv_heads * op->n[4] * dim, tasks = step->decode_rows * kv_heads;
    for (int64_t task = claim(share, 1); task < tasks; task = claim(share, 1)) {
        int64_t row = task / kv_heads, kv_head = task % kv_heads, end = step->context_lens[row];
        int64_t first = op->n[5] && end > op->n[5] ? end - op->n[5] : 0;
        Head head = {.table = step->block_tables + row * step->table_width,
                     .block_size = op->n[4], .block_stride = kv_heads * op->n[4] * dim,
                     .scale = op->f[0], .cap = op->f[1]};
        head.k = at(op->p[1], kv_head * op->n[4] * dim, op->type);
        head.v = at(head.k, plane, op->type);
        int64_t from = (row * (q_heads + 2 * kv_heads) + kv_head * group) * dim;
        const void *q = at(op->p[0], from, op->type);
        void *y = (char *)at(op->p[2], (row * q_heads + kv_head * group) * dim, op->type);
        if (op->type == F32)
            attend_f32(&head, dim, q, group, first, end, y);
        else
            attend_bf16(&head, dim, q, group, first, end, y);
    }
}
