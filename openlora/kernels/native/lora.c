/* SGMV straight from the pages: y += sum over (page, weight) of weight * (x A) B.

   A of one layer: [pages][k][slices * PAGE_RANK]; B: [pages][blocks][PAGE_RANK][block_out]; with
   page strides. Sums are fp32. A row's run in one order whatever else is in the step: even and odd
   inputs apart in the shrink; then page by page and rank by rank, here or in linear.c. */
#include "common.h"

#define VECTORS (PAGE_RANK / LANES)
#define SHRINK_ROWS 4

#define SHRINK_SLICES 3

/* columns: slices * VECTORS of them, taken in one pass over A. */
INLINE void shrink(int rows, int columns, int type, int64_t k, const void *a, int64_t lda,
                   const void *x, float *h) {
    vf acc[SHRINK_ROWS][2][SHRINK_SLICES * VECTORS] = {0};
    int64_t i = 0;
    for (; i + 1 < k; i += 2) {
        UNROLL for (int odd = 0; odd < 2; odd++) {
            UNROLL for (int v = 0; v < columns; v++) {
                vf av = get_v(a, (i + odd) * lda + v * LANES, type);
                UNROLL for (int m = 0; m < rows; m++)
                    acc[m][odd][v] += splat(get(x, m * k + i + odd, type)) * av;
            }
        }
    }
    if (i < k)
        UNROLL for (int v = 0; v < columns; v++)
            UNROLL for (int m = 0; m < rows; m++)
                acc[m][0][v] += splat(get(x, m * k + i, type)) * get_v(a, i * lda + v * LANES, type);
    UNROLL for (int m = 0; m < rows; m++)
        UNROLL for (int v = 0; v < columns; v++)
            store(h + m * lda + v * LANES, acc[m][0][v] + acc[m][1][v]);
}

INLINE void shrink_rows(int64_t rows, int columns, int type, int64_t k, const void *a, int64_t lda,
                        const void *x, float *h) {
    for (int64_t row = 0; row < rows; row += SHRINK_ROWS) {
        const void *xr = at(x, row * k, type);
        float *hr = h + row * lda;
        switch (rows - row) {
            case 1: shrink(1, columns, type, k, a, lda, xr, hr); break;
            case 2: shrink(2, columns, type, k, a, lda, xr, hr); break;
            case 3: shrink(3, columns, type, k, a, lda, xr, hr); break;
            default: shrink(4, columns, type, k, a, lda, xr, hr);
        }
    }
}

INLINE void shrink_slices(int64_t rows, int type, int64_t k, int64_t slices, const void *a,
                          const void *x, float *h) {
    int64_t lda = slices * PAGE_RANK;
    for (int64_t slice = 0; slice < slices; slice += SHRINK_SLICES) {
        const void *as = at(a, slice * PAGE_RANK, type);
        float *hs = h + slice * PAGE_RANK;
        switch (slices - slice) {
            case 1: shrink_rows(rows, VECTORS, type, k, as, lda, x, hs); break;
            case 2: shrink_rows(rows, 2 * VECTORS, type, k, as, lda, x, hs); break;
            default: shrink_rows(rows, 3 * VECTORS, type, k, as, lda, x, hs);
        }
    }
}

/* One group and page of the shrink: h = x A. Fields as of run_linear's op. */
void shrink_task(const Op *op, const Site *site, int64_t index) {
    int64_t k = op->n[0], slices = op->n[5];
    const int32_t *task = site->tasks + TASK_FIELDS * index;
    const void *a = at(op->p[6], task[2] * op->n[6], op->type);
    const void *x = at(op->p[0], task[0] * k, op->type);
    float *h = site->h + task[3] * slices * PAGE_RANK;
    if (op->type == F32)
        shrink_slices(task[1], F32, k, slices, a, x, h);
    else
        shrink_slices(task[1], BF16, k, slices, a, x, h);
}

/* The operation before run_linear, of the same fields, where that one needs all of h. */
void run_shrink(const Op *op, const Step *step, const Share *share) {
    const Site *site = &step->sites[op->n[2]];
    if (step->rows <= FEW_ROWS) return;
    for (int64_t task = claim(share, 1); task < site->num_tasks; task = claim(share, 1))
        shrink_task(op, site, task);
}

/* One row: y += scaled B, four ranks at a time. B is read in as many streams, too short for the
   processor to run ahead of; so the B that is needed next is asked for, place by place. */
INLINE void expand_row(int type, const float *scaled, const void *b, const void *next,
                       int64_t width, float *y) {
    for (int r = 0; r < PAGE_RANK; r += 4) {
        int64_t j = 0;
        for (; j + LANES <= width; j += LANES) {
            vf sum = load(y + j);
            UNROLL for (int i = 0; i < 4; i++) {
                sum += splat(scaled[r + i]) * get_v(b, (r + i) * width + j, type);
                __builtin_prefetch(at(next, (r + i) * width + j, type));
            }
            store(y + j, sum);
        }
        for (; j < width; j++)
            for (int i = 0; i < 4; i++)
                y[j] = __builtin_fmaf(scaled[r + i], get(b, (r + i) * width + j, type), y[j]);
    }
}

INLINE void round_row(const float *from, bf16 *to, int64_t n) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) store_bf16(to + j, load(from + j));
    for (; j < n; j++) to[j] = to_bf16(from[j]);
}

/* B of the index-th page of a task, which is one group and one block. */
INLINE const void *task_b(const Op *op, const Site *site, int64_t task, int64_t index) {
    int64_t blocks = op->n[7], block = task % blocks;
    const int32_t *row = site->rows + ROW_FIELDS * site->groups[GROUP_FIELDS * (task / blocks)];
    if (task >= site->num_groups * blocks || index >= row[1]) return 0;
    int64_t place = site->pages[row[0] + index] * op->n[3] + block * PAGE_RANK * op->n[4];
    return at(op->p[4], place, op->type);
}

/* For a thread that waits for run_linear's end: bring what task will read of B. */
void fetch_block(const Op *op, const Site *site, int64_t task) {
    if (task >= site->num_groups * op->n[7]) return;
    const char *b = task_b(op, site, task, 0);
    int64_t bytes = PAGE_RANK * op->n[4] * (op->type == F32 ? 4 : 2);
    for (int64_t i = 0; b && i < bytes; i += 64) __builtin_prefetch(b + i, 0, 2);
}

/* The operation behind run_linear, of the same fields, for few rows: adds the updates to the fp32
   sums that it left and brings them to y's type. */
void run_expand(const Op *op, const Step *step, const Share *share) {
    const Site *site = &step->sites[op->n[2]];
    if (!site->num_tasks || step->rows > FEW_ROWS) return;
    int64_t columns = op->n[1], blocks = op->n[7], width = op->n[4], ldh = op->n[5] * PAGE_RANK;
    const int64_t *block_slices = op->p[5];
    int64_t tasks = site->num_groups * blocks;
    for (int64_t task = claim(share, 1), after; task < tasks; task = after) {
        const int32_t *group = site->groups + GROUP_FIELDS * (task / blocks);
        int64_t block = task % blocks;
        after = claim(share, 1);
        const int32_t *pages = site->rows + ROW_FIELDS * group[0];
        for (int64_t i = 0; i < pages[1]; i++) {
            const void *b = task_b(op, site, task, i), *next = b;
            if (i + 1 < pages[1])
                next = task_b(op, site, task, i + 1);
            else if (after < tasks && task_b(op, site, after, 0))
                next = task_b(op, site, after, 0);
            for (int64_t row = group[0]; row < group[0] + group[1]; row++) {
                const int32_t *own = site->rows + ROW_FIELDS * row;
                const float *h = site->h + (own[2] + i * own[3]) * ldh
                                 + block_slices[block] * PAGE_RANK;
                float scaled[PAGE_RANK];
                for (int r = 0; r < PAGE_RANK; r++)
                    scaled[r] = h[r] * site->weights[pages[0] + i];
                float *y = (float *)op->p[7] + row * columns + block * width;
                if (op->type == F32)
                    expand_row(F32, scaled, b, next, width, y);
                else
                    expand_row(BF16, scaled, b, next, width, y);
            }
        }
        if (op->type == BF16)
            for (int64_t row = group[0]; row < group[0] + group[1]; row++) {
                int64_t place = row * columns + block * width;
                round_row((float *)op->p[7] + place, (bf16 *)op->p[3] + place, width);
            }
    }
}
