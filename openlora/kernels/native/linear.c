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

/* One LINEAR operation on one step. */
typedef struct {
    int type, y_type;
    int64_t k, n, ldx, ldy;
    const void *w, *x;
    const float *bias;
    void *y;
    const Site *site; /* null: no LoRA */
    const void *b;
    const int64_t *block_slices;
    int64_t page_stride, block_out, slices;
} Linear;

/* The block that holds all of a panel's columns; -1: there is none. */
INLINE int64_t block_of(const Linear *t, int64_t first) {
    int64_t block = first / t->block_out;
    return first + PANEL <= (block + 1) * t->block_out ? block : -1;
}

INLINE const void *b_of(const Linear *t, int64_t page, int64_t block, int64_t column) {
    int64_t place = t->site->pages[page] * t->page_stride + block * PAGE_RANK * t->block_out;
    return at(t->b, place + column, t->type);
}

#define LORA_ROWS 4

/* sums += weight * (h B) of one page and block for rows of the same pages, rank by rank. Rows are
   taken together for each is one chain of additions, which alone would leave most of the time
   unused. */
INLINE void add_page(int rows, int type, const Linear *t, const float *h, int64_t ldh, float weight,
                     const void *b, float sums[][PANEL]) {
    vf acc[LORA_ROWS][2];
    UNROLL for (int m = 0; m < rows; m++) {
        acc[m][0] = load(sums[m]);
        acc[m][1] = load(sums[m] + LANES);
    }
    for (int r = 0; r < PAGE_RANK; r++) {
        vf low = get_v(b, r * t->block_out, type), high = get_v(b, r * t->block_out + LANES, type);
        UNROLL for (int m = 0; m < rows; m++) {
            vf scaled = splat(h[m * ldh + r] * weight);
            acc[m][0] += scaled * low;
            acc[m][1] += scaled * high;
        }
    }
    UNROLL for (int m = 0; m < rows; m++) {
        store(sums[m], acc[m][0]);
        store(sums[m] + LANES, acc[m][1]);
    }
}

/* The same for a panel whose columns are of several blocks, or more than there are. */
INLINE void add_page_slowly(int type, const Linear *t, const float *h, float weight, int64_t page,
                            int64_t first, float *sums) {
    for (int64_t j = 0; j < PANEL && first + j < t->n; j++) {
        int64_t block = (first + j) / t->block_out;
        const float *hj = h + t->block_slices[block] * PAGE_RANK;
        const void *b = b_of(t, page, block, first + j - block * t->block_out);
        for (int r = 0; r < PAGE_RANK; r++)
            sums[j] = __builtin_fmaf(hj[r] * weight, get(b, r * t->block_out, type), sums[j]);
    }
}

/* LoRA of the rows of a tile in the columns of a panel, page by page. */
INLINE void add_lora(int type, const Linear *t, int64_t row, int64_t rows, int64_t first,
                     float sums[][PANEL]) {
    int64_t block = block_of(t, first), ldh = t->slices * PAGE_RANK;
    for (int64_t m = 0, count; m < rows; m += count) {
        /* Rows of one group lie one behind the other in h. */
        const int32_t *own = t->site->rows + ROW_FIELDS * (row + m);
        const int32_t *last = own + ROW_FIELDS * (LORA_ROWS - 1);
        count = block >= 0 && m + LORA_ROWS <= rows && last[0] == own[0]
                        && last[2] == own[2] + LORA_ROWS - 1 ? LORA_ROWS : 1;
        for (int64_t i = 0; i < own[1]; i++) {
            const float *h = t->site->h + (own[2] + i * own[3]) * ldh;
            float weight = t->site->weights[own[0] + i];
            if (block < 0) {
                add_page_slowly(type, t, h, weight, own[0] + i, first, sums[m]);
                continue;
            }
            const void *b = b_of(t, own[0] + i, block, first - block * t->block_out);
            h += t->block_slices[block] * PAGE_RANK;
            if (count == 1)
                add_page(1, type, t, h, ldh, weight, b, sums + m);
            else
                add_page(LORA_ROWS, type, t, h, ldh, weight, b, sums + m);
        }
    }
}

/* Bias, LoRA and the way to y, for the sums of one panel in a few rows. */
INLINE void finish(const Linear *t, int type, int64_t row, int64_t rows, int64_t first,
                   float sums[][PANEL]) {
    int64_t width = t->n - first < PANEL ? t->n - first : PANEL;
    if (t->bias)
        for (int64_t m = 0; m < rows; m++)
            for (int64_t j = 0; j < width; j++) sums[m][j] += t->bias[first + j];
    if (t->site) add_lora(type, t, row, rows, first, sums);
    for (int64_t m = 0; m < rows; m++) {
        float *sum = sums[m];
        int64_t place = (row + m) * t->ldy + first;
        if (width == PANEL) {
            put_v(t->y, place, t->y_type, load(sum));
            put_v(t->y, place + LANES, t->y_type, load(sum + LANES));
        } else {
            for (int64_t j = 0; j < width; j++) put(t->y, place + j, t->y_type, sum[j]);
        }
    }
}

INLINE void tile(int rows, int type, const Linear *t, int64_t first, int64_t row,
                 float sums[][PANEL]) {
    vf acc[MAX_ROWS][2] = {0};
    int64_t k = t->k, even = (k + 1) & ~1;
    const void *x = at(t->x, row * t->ldx, type);
    const void *w = at(t->w, first * (type == F32 ? k : even), type);
    if (type == F32)
        tile_f32(rows, k, w, x, t->ldx, acc);
    else
        tile_bf16(rows, k, w, x, t->ldx, acc);
    UNROLL for (int m = 0; m < rows; m++) {
        store(sums[m], acc[m][0]);
        store(sums[m] + LANES, acc[m][1]);
    }
}

#define CASE(rows) \
    case rows: tile(rows, type, t, panel * PANEL, row, sums); break;

INLINE void panels_of(int type, const Linear *t, int64_t panel, int64_t row, int64_t end) {
    float sums[MAX_ROWS][PANEL];
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
        finish(t, type, row, rows, panel * PANEL, sums);
        row += rows;
    }
}

static void panels_f32(const Linear *t, int64_t panel, int64_t row, int64_t end) {
    panels_of(F32, t, panel, row, end);
}

static void panels_bf16(const Linear *t, int64_t panel, int64_t row, int64_t end) {
    panels_of(BF16, t, panel, row, end);
}

/* p: x, packed w, bias (fp32 or null), y, B of the layer (null: no LoRA), int64 slice of each of
   its blocks, A of the layer, fp32 y; n: k, outputs, site, B's page stride in elements, block_out,
   slices, A's page stride, blocks. With LoRA and few rows, the sums are left in the fp32 y for
   run_expand, and the shrink is done on the way. */
void run_linear(const Op *op, const Step *step, const Share *share) {
    const Site *site = op->p[4] ? &step->sites[op->n[2]] : 0;
    if (site && !site->num_tasks) site = 0;
    int is_split = site && step->rows <= FEW_ROWS;
    Linear t = {.type = op->type, .k = op->n[0], .n = op->n[1], .ldx = op->n[0], .ldy = op->n[1],
                .w = op->p[1], .x = op->p[0], .bias = op->p[2], .site = is_split ? 0 : site,
                .y = is_split ? op->p[7] : op->p[3], .y_type = is_split ? F32 : op->type,
                .b = op->p[4], .block_slices = op->p[5], .page_stride = op->n[3],
                .block_out = op->n[4], .slices = op->n[5]};
    /* The rows that stay in the second-level cache while all panels pass. */
    int64_t width = op->type == F32 ? 4 : 2;
    int64_t block = (384 << 10) / (t.k * width) / MAX_ROWS * MAX_ROWS;
    if (block < 2 * MAX_ROWS) block = 2 * MAX_ROWS;
    int64_t blocks = (step->rows + block - 1) / block, panels = (t.n + PANEL - 1) / PANEL;
    int64_t shrinks = is_split ? site->num_tasks : 0, total = shrinks + blocks * panels;
    int64_t size = piece(share, blocks * panels), first = claim(share, size);
    for (; first < total; first = claim(share, size))
        for (int64_t task = first; task < first + size && task < total; task++) {
            if (task < shrinks) {
                shrink_task(op, site, task);
                continue;
            }
            int64_t panel = (task - shrinks) % panels, row = (task - shrinks) / panels * block;
            int64_t end = row + block < step->rows ? row + block : step->rows;
            if (op->type == F32)
                panels_f32(&t, panel, row, end);
            else
                panels_bf16(&t, panel, row, end);
        }
    if (is_split) fetch_block(op, site, (first - total) / size);
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
