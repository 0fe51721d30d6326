"""Faults that a person could make in csrc/cuda; the tests plant them one at a time, and must fail."""

# name: (file, what stands there once, what is planted in its place)
LINEAR = {
    "no_wait": ("tile.h", "    cp_async_wait<STAGES - 2>();\n", ""),
    "no_barrier": ("tile.h", "    __syncthreads();\n", ""),
    "wrong_stage": ("tile.h", "load(step + STAGES - 1, next);", "load(step + STAGES - 1, stage);"),
    "wrong_swizzle": (
        "tile.h",
        "swizzled<W>(m + lane % 16, k / 8 + lane / 16)",
        "(m + lane % 16) * W + k + lane / 16 * 8",
    ),
    "wrong_lanes": (
        "tile.h",
        "swizzled<W>(k + lane % 16, n / 8 + lane / 16)",
        "swizzled<W>(k + lane / 2, n / 8 + lane % 2)",
    ),
    "beyond_the_columns": ("tile.h", "inside ? 2 * there : 0", "inside ? 16 : 0"),
    "no_barrier_after_p": ("linear.h", "      __syncthreads();\n", ""),
    "no_barrier_before_y": ("linear.h", "g.bias);\n  __syncthreads();\n", "g.bias);\n"),
    "no_barrier_after_y": ("linear.h", "  }\n  __syncthreads();\n", "  }\n"),
}

# name: (what stands in hopper.h once, what is planted in its place)
HOPPER = {
    "no_wait_for_copies": (
        "        barrier_wait(full + ring.stage, ring.parity);\n"
        "        hold(acc), hold(acc_p);\n"
        "        wgmma_fence();\n"
        "        form_p(step > 0);\n",
        "        wgmma_fence();\n"
        "        form_p(step > 0);\n",
    ),
    "no_wait_for_up": (
        "        barrier_wait(full + ring.stage, ring.parity);\n"
        "        const uint32_t a",
        "        const uint32_t a",
    ),
    "no_wait_for_readers": (
        "          barrier_wait(empty + ring.stage, ring.parity ^ 1);\n"
        "          barrier_expect(full + ring.stage, Tile::STAGE);",
        "          barrier_expect(full + ring.stage, Tile::STAGE);",
    ),
    "released_while_read": (
        "        wgmma_wait<1>();\n"
        "        if (step > 0) release(last);\n"
        "        last = ring.stage;\n",
        "        release(ring.stage);\n"
        "        last = ring.stage;\n",
    ),
    "released_too_early": (
        "        wgmma_wait<1>();\n"
        "        if (step > 0) release(last);",
        "        wgmma_wait<2>();\n"
        "        if (step > 0) release(last);",
    ),
    "released_for_one": ("if (thread < CLUSTER) barrier_arrive", "if (thread < 1) barrier_arrive"),
    "y_before_its_sum": (
        "      wgmma_wait<0>();\n"
        "      hold(acc);\n"
        "      release(last);",
        "      hold(acc);\n"
        "      release(last);",
    ),
    "p_before_its_sum": (
        "        wgmma_wait<1>();\n"
        "        hold(acc_p);\n",
        "        hold(acc_p);\n",
    ),
    "half_of_p": ("          barrier_wait_cluster(p_full + consumer, p_parity);\n", ""),
    "the_other_half_again": ("const int k16 = rank * SHARE + i;", "const int k16 = i;"),
    "p_over_what_is_read": ("          barrier_wait_cluster(p_free + consumer, p_parity ^ 1);\n", ""),
    "wrong_bytes": (
        "barrier_expect(p_full + consumer, Tile::SLOT)",
        "barrier_expect(p_full + consumer, 2 * Tile::SLOT)",
    ),
    "half_of_x": ("(1 << CLUSTER) - 1);", "1 << rank);"),
    "y_over_what_is_stored": ("tma_store_wait_read<Tile::PARTS - 1>();", "tma_store_wait_read<Tile::PARTS>();"),
    "no_fence_before_the_store": ("        fence_async();\n", ""),
    "no_barrier_before_the_store": (
        "        fence_async();\n"
        "        group_sync(1 + consumer, WARPGROUP);\n",
        "        fence_async();\n",
    ),
    "no_barrier_before_y": (
        "tma_store_wait_read<Tile::PARTS - 1>();\n"
        "        group_sync(1 + consumer, WARPGROUP);\n",
        "tma_store_wait_read<Tile::PARTS - 1>();\n",
    ),
    "gone_while_stored": ("    if (thread == 0) tma_store_wait_read<0>();\n", ""),
    "wrong_swizzle_of_y": ("(j ^ line / 2 % 4) * 16", "(j ^ line % 4) * 16"),
    "wrong_stride": (
        "descriptor(tile + k16 * 16 * LINE, terms * LINE, 8 * LINE, LINE)",
        "descriptor(tile + k16 * 16 * LINE, 8 * LINE, terms * LINE, LINE)",
    ),
    "wrong_swizzle_of_down": ("16, 16 * RANKS, 2 * RANKS);", "16, 16 * RANKS, LINE);"),
    "beyond_the_ranks": ("T::pack(r < g.R ? acc_p[i * 2] : 0,", "T::pack(acc_p[i * 2],"),
    "free_when_one_has_read": (
        "          barrier_arrive_cluster(p_free + consumer, rank ^ 1);\n",
        "          for (int i = 0; i < WARPGROUP && thread == 0; ++i)\n"
        "            barrier_arrive_cluster(p_free + consumer, rank ^ 1);\n",
    ),
    "a_bias_for_all_tiles": ("const int pair = n0 / 2 + thread;", "const int pair = thread;"),
    "no_fence_of_barriers": ("    barrier_init_fence();\n", ""),
    "barriers_before_all_know": (
        "    barrier_init_fence();\n  }\n  cluster_sync();\n",
        "    barrier_init_fence();\n  }\n",
    ),
    "gone_while_others_arrive": (
        "    if (thread == 0) tma_store_wait_read<0>();\n    cluster_sync();\n",
        "    if (thread == 0) tma_store_wait_read<0>();\n",
    ),
}
