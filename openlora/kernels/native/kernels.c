/* Runs a list of operations on one step: all files in one unit, compiled at first use.

   Nothing here links an OpenMP runtime: the symbols are those of the one torch has loaded, so
   that both use the same threads. */
#include "linear.c"
#include "lora.c"
#include "elementwise.c"
#include "attention.c"
#include "pages.c"

typedef void (*Kernel)(const Op *, const Step *, const Share *);

static const Kernel KERNELS[] = {
    run_linear, run_shrink, run_expand, run_norm, run_norm_heads, run_gated, run_rope,
    run_attention, run_embed, run_add, run_greedy, run_soft_cap,
};

/* Sizes that the caller checks its own against. */
int64_t ol_abi(int64_t which) {
    const int64_t sizes[] = {sizeof(Op), sizeof(Step), sizeof(Fill), MAX_GROUP, MAX_GROUP_DIM, PANEL};
    return sizes[which];
}

/* Run ops[0..count) in order on the step; every operation is done before the next one begins. */
void ol_run(const Op *ops, int64_t count, const Step *step, int64_t threads) {
    int64_t next[3][8] = {{0}}; /* a cache line each */
#pragma omp parallel num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        Share share = {next[i % 3], threads};
        /* The next operation's counter: its last user was two barriers ago. */
        __atomic_store_n(next[(i + 1) % 3], 0, __ATOMIC_RELAXED);
        KERNELS[ops[i].kind](&ops[i], step, &share);
#pragma omp barrier
    }
}
