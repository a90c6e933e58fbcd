/* Norms, gated activations, rotary embedding, and what else works row by row. Arithmetic in fp32. */
#include "common.h"

INLINE void norm_row(const void *x, int type, const void *w, int w_type, void *y, int64_t n,
                     float eps) {
    vf squares = {0};
    float sum = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf v = get_v(x, i, type);
        squares += v * v;
    }
    for (; i < n; i++) sum += get(x, i, type) * get(x, i, type);
    sum += sum_of(squares);
    float scale = 1.0f / __builtin_sqrtf(sum / (float)n + eps);
    for (i = 0; i + LANES <= n; i += LANES)
        put_v(y, i, type, get_v(x, i, type) * scale * get_v(w, i, w_type));
    for (; i < n; i++) put(y, i, type, get(x, i, type) * scale * get(w, i, w_type));
}

static void norm(const void *x, int type, const void *w, int w_type, void *y, int64_t n, float eps) {
    if (type == F32)
        norm_row(x, F32, w, F32, y, n, eps);
    else if (w_type == F32)
        norm_row(x, BF16, w, F32, y, n, eps);
    else
        norm_row(x, BF16, w, BF16, y, n, eps);
}

INLINE void add_row(void *y, const void *x, int type, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) put_v(y, i, type, get_v(y, i, type) + get_v(x, i, type));
    for (; i < n; i++) put(y, i, type, get(y, i, type) + get(x, i, type));
}

/* p: x, weight, y, residual or null; n: columns, weight's type; f: eps. residual += x first, and
   the norm is then residual's. */
void run_norm(const Op *op, const Step *step, const Share *share) {
    int64_t n = op->n[0], size = piece(share, step->rows);
    for (int64_t first = claim(share, size); first < step->rows; first = claim(share, size))
        for (int64_t row = first; row < first + size && row < step->rows; row++) {
            char *x = (char *)at(op->p[0], row * n, op->type);
            if (op->p[3]) {
                char *residual = (char *)at(op->p[3], row * n, op->type);
                if (op->type == F32)
                    add_row(residual, x, F32, n);
                else
                    add_row(residual, x, BF16, n);
                x = residual;
            }
            norm(x, op->type, op->p[1], (int)op->n[1], (char *)at(op->p[2], row * n, op->type), n,
                 op->f[0]);
        }
}

/* p: qkv, q weight, k weight; n: query heads, kv heads, head_dim, weights' type; f: eps. */
void run_norm_heads(const Op *op, const Step *step, const Share *share) {
    int64_t q_heads = op->n[0], kv_heads = op->n[1], dim = op->n[2];
    int64_t heads = q_heads + kv_heads, tasks = step->rows * heads, size = piece(share, tasks);
    for (int64_t first = claim(share, size); first < tasks; first = claim(share, size))
        for (int64_t task = first; task < first + size && task < tasks; task++) {
            int64_t row = task / heads, head = task % heads;
            void *x = (char *)at(op->p[0], (row * (heads + kv_heads) + head) * dim, op->type);
            norm(x, op->type, op->p[head < q_heads ? 1 : 2], (int)op->n[3], x, dim, op->f[0]);
        }
}

INLINE void gated_row(const void *gate, const void *up, void *y, int64_t n, int type, int kind) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        put_v(y, i, type, gate_of(get_v(gate, i, type), kind) * get_v(up, i, type));
    for (; i < n; i++) {
        vf one = gate_of(splat(get(gate, i, type)), kind);
        put(y, i, type, one[0] * get(up, i, type));
    }
}

/* p: gate and up beside each other, y; n: columns of y, activation. */
void run_gated(const Op *op, const Step *step, const Share *share) {
    int64_t n = op->n[0], size = piece(share, step->rows);
    for (int64_t first = claim(share, size); first < step->rows; first = claim(share, size))
        for (int64_t row = first; row < first + size && row < step->rows; row++) {
            const void *gate = at(op->p[0], 2 * row * n, op->type), *up = at(gate, n, op->type);
            void *y = (char *)at(op->p[1], row * n, op->type);
            if (op->type == F32 && op->n[1] == SILU)
                gated_row(gate, up, y, n, F32, SILU);
            else if (op->type == F32)
                gated_row(gate, up, y, n, F32, GELU_TANH);
            else if (op->n[1] == SILU)
                gated_row(gate, up, y, n, BF16, SILU);
            else
                gated_row(gate, up, y, n, BF16, GELU_TANH);
        }
}

INLINE void rotate(void *x, const float *cos, const float *sin, int64_t half, int type) {
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        vf a = get_v(x, i, type), b = get_v(x, i + half, type), c = load(cos + i), s = load(sin + i);
        put_v(x, i, type, a * c - b * s);
        put_v(x, i + half, type, b * c + a * s);
    }
    for (; i < half; i++) {
        float a = get(x, i, type), b = get(x, i + half, type);
        put(x, i, type, a * cos[i] - b * sin[i]);
        put(x, i + half, type, b * cos[i] + a * sin[i]);
    }
}

/* p: qkv, cache of the layer [2, blocks, kv heads, block_size, head_dim]; n: query heads,
   kv heads, head_dim, rotary_dim, blocks, block_size, which cos and sin. Rotates q and k in place
   and copies k and v into the cache. */
void run_rope(const Op *op, const Step *step, const Share *share) {
    int64_t q_heads = op->n[0], kv_heads = op->n[1], dim = op->n[2], half = op->n[3] / 2;
    int64_t blocks = op->n[4], block_size = op->n[5], heads = q_heads + 2 * kv_heads;
    int64_t tasks = step->rows * heads, size = piece(share, tasks);
    const float *cos = step->cos[op->n[6]], *sin = step->sin[op->n[6]];
    for (int64_t first = claim(share, size); first < tasks; first = claim(share, size))
        for (int64_t task = first; task < first + size && task < tasks; task++) {
            int64_t row = task / heads, head = task % heads;
            void *x = (char *)at(op->p[0], (row * heads + head) * dim, op->type);
            if (head < q_heads + kv_heads) {
                if (op->type == F32)
                    rotate(x, cos + row * half, sin + row * half, half, F32);
                else
                    rotate(x, cos + row * half, sin + row * half, half, BF16);
            }
            if (head < q_heads) continue;
            int64_t kv_head = (head - q_heads) % kv_heads, is_v = head >= q_heads + kv_heads;
            int64_t block = step->slots[row] / block_size, place = step->slots[row] % block_size;
            int64_t to = (((is_v * blocks + block) * kv_heads + kv_head) * block_size + place) * dim;
            memcpy((char *)at(op->p[1], to, op->type), x, dim * (op->type == F32 ? 4 : 2));
        }
}

/* p: table, y; n: columns; f: factor. */
void run_embed(const Op *op, const Step *step, const Share *share) {
    int64_t n = op->n[0];
    for (int64_t row = claim(share, 1); row < step->rows; row = claim(share, 1)) {
        const void *from = at(op->p[0], step->token_ids[row] * n, op->type);
        void *to = (char *)at(op->p[1], row * n, op->type);
        memcpy(to, from, n * (op->type == F32 ? 4 : 2));
        if (op->f[0] != 1.0f)
            for (int64_t i = 0; i < n; i++) put(to, i, op->type, get(to, i, op->type) * op->f[0]);
    }
}

/* p: y, x; n: columns. y += x. */
void run_add(const Op *op, const Step *step, const Share *share) {
    int64_t n = op->n[0];
    for (int64_t row = claim(share, 1); row < step->rows; row = claim(share, 1)) {
        void *y = (char *)at(op->p[0], row * n, op->type);
        const void *x = at(op->p[1], row * n, op->type);
        if (op->type == F32)
            add_row(y, x, F32, n);
        else
            add_row(y, x, BF16, n);
    }
}

INLINE int64_t best_of(const void *x, int64_t n, int type) {
    vf best = splat(-__builtin_inff());
    vi is_nan = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        vf v = get_v(x, i, type);
        vi larger = v > best;
        is_nan |= v != v;
        best = (vf)(((vi)v & larger) | ((vi)best & ~larger));
    }
    float most = -__builtin_inff();
    for (int lane = 0; lane < LANES; lane++) {
        if (is_nan[lane]) return -1;
        if (best[lane] > most) most = best[lane];
    }
    for (; i < n; i++) {
        float v = get(x, i, type);
        if (v != v) return -1;
        if (v > most) most = v;
    }
    if (most - most != 0) return -1;
    for (i = 0; i < n; i++)
        if (get(x, i, type) == most) return i;
    return -1;
}

/* p: logits, int64 tokens; n: vocabulary. As kernels.sampling.greedy: ties to the smallest ID, -1
   where a row holds a NaN or nothing finite at its top. */
void run_greedy(const Op *op, const Step *step, const Share *share) {
    int64_t n = op->n[0];
    for (int64_t row = claim(share, 1); row < step->rows; row = claim(share, 1)) {
        const void *x = at(op->p[0], row * n, op->type);
        ((int64_t *)op->p[1])[row] = op->type == F32 ? best_of(x, n, F32) : best_of(x, n, BF16);
    }
}

/* p: x; n: columns; f: cap. x = cap * tanh(x / cap), in place. */
void run_soft_cap(const Op *op, const Step *step, const Share *share) {
    int64_t n = op->n[0], tasks = step->rows * n, size = 1 << 12;
    float cap = op->f[0];
    for (int64_t first = claim(share, size); first < tasks; first = claim(share, size)) {
        int64_t end = first + size < tasks ? first + size : tasks;
        for (int64_t i = first; i < end; i += LANES) {
            float part[LANES] = {0};
            int64_t count = end - i < LANES ? end - i : LANES;
            for (int64_t j = 0; j < count; j++) part[j] = get(op->p[0], i + j, op->type);
            store(part, tanh_capped(load(part), cap));
            for (int64_t j = 0; j < count; j++) put(op->p[0], i + j, op->type, part[j]);
        }
    }
}
