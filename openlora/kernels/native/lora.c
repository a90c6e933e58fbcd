/* SGMV straight from the pages: y[rows] += sum over (page, weight) of weight * (x A) B.

   A of one layer: [pages][k][slices * PAGE_RANK]; B: [pages][blocks][PAGE_RANK][block_out], with
   page strides. All sums are fp32. A row's sums run in one order whatever else is in the step:
   even and odd inputs apart in the shrink, then page by page and rank by rank. */
#include "common.h"

#define SHRINK_ROWS 4
#define EXPAND_ROWS 4

INLINE void shrink(int rows, int type, int64_t k, const void *a, int64_t lda, const void *x,
                   int64_t ldx, float *h, int64_t ldh) {
    enum { VECTORS = PAGE_RANK / LANES };
    vf acc[SHRINK_ROWS][2][VECTORS] = {0};
    int64_t i = 0;
    for (; i + 1 < k; i += 2) {
        UNROLL for (int odd = 0; odd < 2; odd++) {
            vf av[VECTORS];
            UNROLL for (int v = 0; v < VECTORS; v++)
                av[v] = get_v(a, (i + odd) * lda + v * LANES, type);
            UNROLL for (int m = 0; m < rows; m++) {
                vf xm = splat(get(x, m * ldx + i + odd, type));
                UNROLL for (int v = 0; v < VECTORS; v++) acc[m][odd][v] += xm * av[v];
            }
        }
    }
    if (i < k)
        UNROLL for (int m = 0; m < rows; m++)
            UNROLL for (int v = 0; v < VECTORS; v++)
                acc[m][0][v] += splat(get(x, m * ldx + i, type)) *
                                get_v(a, i * lda + v * LANES, type);
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int v = 0; v < VECTORS; v++)
            store(h + m * ldh + v * LANES, acc[m][0][v] + acc[m][1][v]);
}

INLINE void shrink_rows(int64_t rows, int type, int64_t k, const void *a, int64_t lda,
                        const void *x, float *h, int64_t ldh) {
    for (int64_t row = 0; row < rows; row += SHRINK_ROWS) {
        const void *xr = at(x, row * k, type);
        float *hr = h + row * ldh;
        switch (rows - row) {
            case 1: shrink(1, type, k, a, lda, xr, k, hr, ldh); break;
            case 2: shrink(2, type, k, a, lda, xr, k, hr, ldh); break;
            case 3: shrink(3, type, k, a, lda, xr, k, hr, ldh); break;
            default: shrink(4, type, k, a, lda, xr, k, hr, ldh);
        }
    }
}

/* One (group, page) of run_linear's op: h = x A, [rows, slices * PAGE_RANK]. */
void shrink_task(const Op *op, const Step *step, int64_t task) {
    const Site *site = &step->sites[op->n[2]];
    const int32_t *pair = site->tasks + 2 * task;
    const int32_t *group = site->groups + GROUP_FIELDS * pair[0];
    int64_t k = op->n[0], slices = op->n[4], lda = slices * PAGE_RANK;
    const void *a = at(op->p[5], site->pages[group[2] + pair[1]] * op->n[3], op->type);
    const void *x = at(op->p[0], group[0] * k, op->type);
    float *h = site->h + (group[4] + pair[1] * group[1]) * lda;
    for (int64_t slice = 0; slice < slices; slice++) {
        const void *as = at(a, slice * PAGE_RANK, op->type);
        if (op->type == F32)
            shrink_rows(group[1], F32, k, as, lda, x, h + slice * PAGE_RANK, lda);
        else
            shrink_rows(group[1], BF16, k, as, lda, x, h + slice * PAGE_RANK, lda);
    }
}

/* y += weight * h B of one page and block, for up to EXPAND_ROWS rows. */
INLINE void expand(int rows, int type, const float *h, int64_t ldh, float weight, const void *b,
                   int64_t width, float *y, int64_t ldy) {
    /* Four ranks at a time: as many streams through B, and y stays in the first-level cache. */
    for (int r = 0; r < PAGE_RANK; r += 4) {
        vf scaled[EXPAND_ROWS][4];
        UNROLL for (int m = 0; m < rows; m++)
            UNROLL for (int i = 0; i < 4; i++) scaled[m][i] = splat(h[m * ldh + r + i] * weight);
        int64_t j = 0;
        for (; j + LANES <= width; j += LANES) {
            vf bv[4];
            UNROLL for (int i = 0; i < 4; i++) bv[i] = get_v(b, (r + i) * width + j, type);
            UNROLL for (int m = 0; m < rows; m++) {
                vf sum = load(y + m * ldy + j);
                UNROLL for (int i = 0; i < 4; i++) sum += scaled[m][i] * bv[i];
                store(y + m * ldy + j, sum);
            }
        }
        for (; j < width; j++)
            for (int m = 0; m < rows; m++)
                for (int i = 0; i < 4; i++)
                    y[m * ldy + j] = __builtin_fmaf(scaled[m][i][0],
                                                    get(b, (r + i) * width + j, type),
                                                    y[m * ldy + j]);
    }
}

INLINE void expand_rows(int64_t rows, int type, const float *h, int64_t ldh, float weight,
                        const void *b, int64_t width, float *y, int64_t ldy) {
    for (int64_t row = 0; row < rows; row += EXPAND_ROWS) {
        const float *hr = h + row * ldh;
        float *yr = y + row * ldy;
        switch (rows - row) {
            case 1: expand(1, type, hr, ldh, weight, b, width, yr, ldy); break;
            case 2: expand(2, type, hr, ldh, weight, b, width, yr, ldy); break;
            case 3: expand(3, type, hr, ldh, weight, b, width, yr, ldy); break;
            default: expand(4, type, hr, ldh, weight, b, width, yr, ldy);
        }
    }
}

INLINE void round_row(const float *from, bf16 *to, int64_t n) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) store_bf16(to + j, load(from + j));
    for (; j < n; j++) to[j] = to_bf16(from[j]);
}

/* p: y, fp32 y, B of the layer, int64 slice of each block; n: columns, site, B's page stride in
   elements, blocks, block_out, slices. Adds the updates to the fp32 y that run_linear left and
   brings it to y's type. Without LoRA at this site of the step nothing is done; else its groups
   hold every row, those without pages too. */
void run_expand(const Op *op, const Step *step, const Share *share) {
    const Site *site = &step->sites[op->n[1]];
    if (!site->num_tasks) return;
    int64_t columns = op->n[0], blocks = op->n[3], block_out = op->n[4], slices = op->n[5];
    const int64_t *block_slices = op->p[3];
    float *y = op->p[1];
    int64_t tasks = site->num_groups * blocks;
    for (int64_t task = claim(share, 1); task < tasks; task = claim(share, 1)) {
        const int32_t *group = site->groups + GROUP_FIELDS * (task / blocks);
        int64_t block = task % blocks, slice = block_slices[block];
        int64_t place = group[0] * columns + block * block_out;
        for (int64_t i = 0; i < group[3]; i++) {
            int64_t page = group[2] + i, ldh = slices * PAGE_RANK;
            const float *h = site->h + (group[4] + i * group[1]) * ldh + slice * PAGE_RANK;
            const void *b = at(op->p[2], site->pages[page] * op->n[2]
                                             + block * PAGE_RANK * block_out, op->type);
            if (op->type == F32)
                expand_rows(group[1], F32, h, ldh, site->weights[page], b, block_out, y + place,
                            columns);
            else
                expand_rows(group[1], BF16, h, ldh, site->weights[page], b, block_out, y + place,
                            columns);
        }
        if (op->type == BF16)
            for (int64_t row = 0; row < group[1]; row++)
                round_row(y + place + row * columns, (bf16 *)op->p[0] + place + row * columns,
                          block_out);
    }
}
