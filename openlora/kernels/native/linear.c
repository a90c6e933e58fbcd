/* y = x W^T + bias over packed weights.

   Packed: panels of PANEL outputs, [panels][k][PANEL] in fp32 and [panels][k / 2][PANEL][2] in
   bf16 (pairs of inputs, what VDPBF16PS takes), zeros behind the last output and input. A panel
   is read once for up to MAX_ROWS rows, in one stream. Every output is one chain of fused
   multiply-adds over k, so a row's result depends on no other row. */
#include "common.h"

INLINE void tile_f32(int rows, int64_t k, const float *w, const float *x, int64_t ldx,
                     vf acc[][2]) {
    for (int64_t i = 0; i < k; i++, w += PANEL) {
        vf w0 = load(w), w1 = load(w + LANES);
        UNROLL for (int m = 0; m < rows; m++) {
            vf xm = splat(x[m * ldx + i]);
            acc[m][0] += xm * w0;
            acc[m][1] += xm * w1;
        }
    }
}

#if defined(__AVX512BF16__) && LANES == 16
INLINE vf dot_pair(vf acc, uint32_t x, const bf16 *w) {
    __m512i wide = _mm512_loadu_si512(w);
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)x), (__m512bh)wide);
}
#else
INLINE vf dot_pair(vf acc, uint32_t x, const bf16 *w) {
    vu pair;
    memcpy(&pair, w, sizeof pair);
    acc += splat(to_float((bf16)x)) * (vf)(pair << 16);
    return acc + splat(to_float((bf16)(x >> 16))) * (vf)(pair & 0xffff0000u);
}
#endif

INLINE void tile_bf16(int rows, int64_t k, const bf16 *w, const bf16 *x, int64_t ldx,
                      vf acc[][2]) {
    for (int64_t i = 0; i < k; i += 2, w += 2 * PANEL) {
        UNROLL for (int m = 0; m < rows; m++) {
            uint32_t pair = x[m * ldx + i];
            if (i + 1 < k) memcpy(&pair, x + m * ldx + i, sizeof pair);
            acc[m][0] = dot_pair(acc[m][0], pair, w);
            acc[m][1] = dot_pair(acc[m][1], pair, w + 2 * LANES);
        }
    }
}

typedef struct {
    int type, y_type;
    int64_t k, n, ldx, ldy;
    const void *w, *x;
    const float *bias;
    void *y;
} Tile;

INLINE void tile(int rows, const Tile *t, int64_t panel, int64_t row) {
    vf acc[MAX_ROWS][2] = {0};
    const void *x = at(t->x, row * t->ldx, t->type);
    if (t->type == F32)
        tile_f32(rows, t->k, (const float *)t->w + panel * PANEL * t->k, x, t->ldx, acc);
    else
        tile_bf16(rows, t->k, (const bf16 *)t->w + panel * PANEL * ((t->k + 1) & ~1), x, t->ldx,
                  acc);
    int64_t first = panel * PANEL, width = t->n - first;
    if (t->bias) {
        float bias[PANEL] = {0};
        memcpy(bias, t->bias + first, sizeof(float) * (width < PANEL ? width : PANEL));
        UNROLL for (int m = 0; m < rows; m++) {
            acc[m][0] += load(bias);
            acc[m][1] += load(bias + LANES);
        }
    }
    UNROLL for (int m = 0; m < rows; m++) {
        int64_t place = (row + m) * t->ldy + first;
        if (width >= PANEL) {
            put_v(t->y, place, t->y_type, acc[m][0]);
            put_v(t->y, place + LANES, t->y_type, acc[m][1]);
        } else {
            float rest[PANEL];
            store(rest, acc[m][0]);
            store(rest + LANES, acc[m][1]);
            for (int64_t j = 0; j < width; j++) put(t->y, place + j, t->y_type, rest[j]);
        }
    }
}

#define CASE(rows) \
    case rows: tile(rows, t, panel, row); break;

static void tiles(const Tile *t, int64_t panel, int64_t row, int64_t end) {
    while (row < end) {
        int64_t rows = end - row < MAX_ROWS ? end - row : MAX_ROWS;
        switch (rows) {
            CASE(1) CASE(2) CASE(3) CASE(4)
#if MAX_ROWS >= 8
            CASE(5) CASE(6) CASE(7) CASE(8)
#endif
#if MAX_ROWS >= 12
            CASE(9) CASE(10) CASE(11) CASE(12)
#endif
        }
        row += rows;
    }
}

/* p: x, packed w, bias (fp32 or null), y, fp32 y, A of the layer; n: k, n, site (-1: none),
   A's page stride in elements, slices. With LoRA in the step, the sums go to the fp32 y, for
   run_expand to finish; the shrink of the site is done here too, for it needs x alone. */
void run_linear(const Op *op, const Step *step, const Share *share) {
    const Site *site = op->n[2] < 0 ? 0 : &step->sites[op->n[2]];
    int has_lora = site && site->num_tasks;
    Tile t = {.type = op->type, .y_type = has_lora ? F32 : op->type, .k = op->n[0], .n = op->n[1],
              .ldx = op->n[0], .ldy = op->n[1], .w = op->p[1], .x = op->p[0], .bias = op->p[2],
              .y = has_lora ? op->p[4] : op->p[3]};
    /* The rows that stay in the second-level cache while all panels pass. */
    int64_t width = op->type == F32 ? 4 : 2;
    int64_t block = (384 << 10) / (t.k * width) / MAX_ROWS * MAX_ROWS;
    if (block < 2 * MAX_ROWS) block = 2 * MAX_ROWS;
    int64_t blocks = (step->rows + block - 1) / block;
    int64_t panels = (t.n + PANEL - 1) / PANEL;
    int64_t lora = has_lora ? site->num_tasks : 0;
    int64_t total = lora + blocks * panels;
    int64_t size = piece(share, blocks * panels), last;
    for (int64_t first = claim(share, size); first < total; first = claim(share, size)) {
        last = first + size < total ? first + size : total;
        for (int64_t task = first; task < last; task++) {
            if (task < lora) {
                shrink_task(op, step, task);
                continue;
            }
            int64_t row = (task - lora) / panels * block;
            int64_t end = row + block < step->rows ? row + block : step->rows;
            tiles(&t, (task - lora) % panels, row, end);
        }
    }
}

int64_t ol_packed_bytes(int64_t n, int64_t k, int64_t type) {
    int64_t panels = (n + PANEL - 1) / PANEL;
    return panels * PANEL * (type == F32 ? k * 4 : ((k + 1) & ~1) * 2);
}

/* Pack w [n, k] row-major into out, ol_packed_bytes(n, k, type) bytes. */
void ol_pack(const void *w, int64_t n, int64_t k, int64_t type, void *out, int64_t threads) {
    int64_t panels = (n + PANEL - 1) / PANEL, even = (k + 1) & ~1;
#pragma omp parallel for num_threads(threads)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t j = 0; j < PANEL; j++) {
            int64_t row = panel * PANEL + j;
            if (type == F32) {
                float *to = (float *)out + panel * PANEL * k + j;
                const float *from = (const float *)w + row * k;
                for (int64_t i = 0; i < k; i++) to[i * PANEL] = row < n ? from[i] : 0;
            } else {
                bf16 *to = (bf16 *)out + panel * PANEL * even + 2 * j;
                const bf16 *from = (const bf16 *)w + row * k;
                for (int64_t i = 0; i < even; i++)
                    to[i / 2 * 2 * PANEL + i % 2] = row < n && i < k ? from[i] : 0;
            }
        }
}
