"""Faults that a person could make in csrc/cuda; the tests plant them one at a time, and must fail.

simulator.planted_in() compiles all of them into one library, in which a test chooses one. So the text that differs, in
whole lines if there are several, is either statements, which end with a semicolon, or an expression.
"""

# name: (text that occurs in tile.h once, the faulty text that replaces it)
TILE = {
    "no_wait": ("    cp_async_wait<STAGES - 2>();\n", ""),
    "no_barrier": ("    __syncthreads();\n", ""),
    "wrong_stage": ("load(step + STAGES - 1, next);", "load(step + STAGES - 1, stage);"),
    "wrong_swizzle": ("swizzled<W>(m + lane % 16, k / 8 + lane / 16)", "(m + lane % 16) * W + k + lane / 16 * 8"),
    "wrong_lanes": ("swizzled<W>(k + lane % 16, n / 8 + lane / 16)", "swizzled<W>(k + lane / 2, n / 8 + lane % 2)"),
    "beyond_the_columns": ("inside ? 2 * there : 0", "inside ? 16 : 0"),
}

# the same in linear.h
LINEAR = {
    "no_barrier_after_p": ("      __syncthreads();\n", ""),
    "no_barrier_before_y": ("g.bias);\n  __syncthreads();\n", "g.bias);\n"),
    "no_barrier_after_y": ("  }\n  __syncthreads();\n", "  }\n"),
}

# statements that several faults leave out
COPIED = "        barrier_wait(shared.full + ring.stage, ring.parity);\n"
HELD = "        for (auto& d : acc) hold(d);\n"
WAITED = "      wgmma_wait<0>();\n"
SUMMED = f"  {WAITED}" + HELD
SUMMED_BEFORE = "        wgmma_wait<1>();\n        if (step > 0) release(last);"
RELEASED = "        release(last);\n"
STORED = "    if (lane == 0) tma_store_wait_read<0>();\n"
INITIALIZED = "    barrier_init_fence();\n"


def without(left_out, next_one):
    """(text, faulty text): statements are left out before the next one."""
    return left_out + next_one, next_one


# name: (text that occurs in hopper.h once, the faulty text that replaces it)
HOPPER = {
    "no_wait_for_copies": without(COPIED + HELD, "        wgmma_fence();\n"),
    "no_wait_for_up": without(COPIED, "        hand_over();\n"),
    "begun_before_the_other_has_seen_its_copies": ("Tile::ALTERNATE && set != first", "false"),
    "never_handed_over": ("          group_arrive(1 + (consumer ^ 1), CONSUMERS * WARPGROUP);\n", "          {}\n"),
    "no_wait_for_p": without(f"  {COPIED}", "          const uint32_t a"),
    "no_wait_for_readers": without(
        "          barrier_wait(shared.empty + ring.stage, ring.parity ^ 1);\n",
        "          barrier_expect(shared.full + ring.stage, Tile::STAGE);",
    ),
    "released_while_read": (
        f"{SUMMED_BEFORE}\n        last = ring.stage;\n",
        "        release(ring.stage);\n        last = ring.stage;\n",
    ),
    "released_too_early": (SUMMED_BEFORE, SUMMED_BEFORE.replace("<1>", "<2>")),
    "released_for_one": ("thread < CLUSTER", "thread < 1"),
    "y_before_its_sum": without(WAITED + "      for (auto& d : acc) hold(d);\n", "      release(last);\n      if"),
    "p_before_its_sum": without(SUMMED, RELEASED),
    "the_last_step_never_released": (SUMMED + RELEASED, SUMMED),
    "down_over_w": ("w_tile(ring.stage) + BN * LINE", "w_tile(ring.stage)"),
    "p_of_other_columns": ("acc[block] + BN / 2 + i * 2", "acc[block] + i * 2"),
    "half_of_x": ("(1 << CLUSTER) - 1", "1 << rank"),
    "y_over_what_is_stored": ("tma_store_wait_read<Tile::PARTS - 1>();", "tma_store_wait_read<Tile::PARTS>();"),
    "no_fence_before_the_store": ("          fence_async();\n", ""),
    "no_barrier_before_the_store": ("          fence_async();\n          warp_sync();\n", "          fence_async();\n"),
    "gone_while_stored": (STORED, ""),
    "wrong_swizzle_of_y": ("line * Tile::PART_LINE / LINE & (CHUNKS - 1)", "line & (CHUNKS - 1) / 2"),
    "rows_of_another_warp": ("m0 + warp_row + block * 64", "m0 + block * 64"),
    "blocks_of_y_turned": ("lane % 16", "lane / 16 * 8 + lane % 8", "2 * j + lane / 16", "2 * j + lane / 8 % 2"),
    "wrong_stride": (
        "descriptor(tile + k16 * 16 * LINE, terms * LINE, 8 * LINE, LINE)",
        "descriptor(tile + k16 * 16 * LINE, 8 * LINE, terms * LINE, LINE)",
    ),
    "beyond_the_ranks": ("r < g.R ? sum[0] : 0", "sum[0]"),
    "a_bias_for_all_tiles": ("n0 + j * 8 + col", "j * 8 + col"),
    "the_other_tile_not_skipped": ("      if (Tile::ALTERNATE) ring.skip(k_steps + r_steps);", ""),
    "both_start_at_once": ("    if (Tile::ALTERNATE && consumer == 1) ring.skip(k_steps + r_steps);\n", ""),
    "the_ring_comes_round_unseen": ("    parity ^= stage / STAGES & 1;\n", ""),
    "the_first_block_twice": (
        "operand<true>(a + block * 64 * LINE, k16, 0),\n                                                                operand<W_K_MAJOR>",
        "operand<true>(a, k16, 0),\n                                                                operand<W_K_MAJOR>",
    ),
    "released_for_two": ("Tile::READERS * CLUSTER", "CONSUMERS * CLUSTER"),
    "no_fence_of_barriers": (INITIALIZED, ""),
    "barriers_before_all_know": (INITIALIZED + "  }\n  cluster_sync();\n", INITIALIZED + "  }\n"),
    "gone_while_others_arrive": (STORED + "    cluster_sync();\n", STORED),
}

# name: (text that occurs in hopper_pass.h once, the faulty text that replaces it)
HOPPER_PASS = {
    "no_wait_for_dy": ("        barrier_wait(full + CONSUMER * STAGES + ring.stage, ring.parity);\n", ""),
    "no_wait_for_p": ("      barrier_wait(p_full + p_tile, p_ring.parity);\n", ""),
    "no_wait_for_up": ("    if constexpr (DP) barrier_wait(up_full, 0);\n", ""),
    "dy_over_what_is_read": ("        barrier_wait(empty + i, ring.parity ^ 1);\n", ""),
    "released_too_early": ("          wgmma_wait<1>();\n", ""),
    "dp_before_its_sum": (WAITED, ""),
    "dp_of_the_rows_before": ("i > 0 || k16 > 0", "row > 0 || i > 0 || k16 > 0"),
    "rows_for_columns": ("further(columns_of_dy, k16 * 16 * LINE)", "further(columns_of_dy, k16 * 32)"),
    "wrong_tile_of_up": ("(STEP * i + FIRST) * RANKS * LINE", "STEP * i * RANKS * LINE"),
    "parts_not_awaited": ("    barrier_wait_cluster(arrived + turn, row / 2 % 2);\n", ""),
    "parts_of_one_block": ("CONSUMERS * rank + consumer", "consumer"),
    "one_inbox": ("inboxes + (consumer * 2 + turn) * Tile::INBOX", "inboxes + (consumer * 2 + turn * 0) * Tile::INBOX"),
    "wrong_bytes": ("barrier_expect(arrived + turn, Tile::INBOX);", "barrier_expect(arrived + turn, Tile::INBOX / 2);"),
    "a_peer_for_all": (
        "map_shared(shared_address(dp_full + its * 2 + turn), peer)",
        "map_shared(shared_address(dp_full + its * 2 + turn), 0)",
    ),
    "no_fence_of_barriers": ("    barrier_init_fence();\n", ""),
    "barriers_before_all_know": ("  cluster_sync();\n", ""),
    "wrong_slot": ("((STEP * i + FIRST) * (RANKS / 8) + v)", "((COUNT * FIRST + i) * (RANKS / 8) + v)"),
    "the_rows_of_the_first_run": ("(first_of(0) + row) * PASS_ROWS", "row * PASS_ROWS"),
    "the_rows_of_the_other_warpgroup": ("(first_of(1) + row) * PASS_ROWS", "(first_of(0) + row) * PASS_ROWS"),
    "dp_of_the_first_warpgroup": ("(first + row) * PASS_ROWS", "(first_of(0) + row) * PASS_ROWS"),
    "a_slot_for_both": ("int64_t(run * g.parts + part)", "int64_t(run / 2 * g.parts + part)"),
}

# name: (file, text, faulty text), or with two texts and the faulty text after each
PLANTED = (
    {name: ("tile.h", *fault) for name, fault in TILE.items()}
    | {name: ("linear.h", *fault) for name, fault in LINEAR.items()}
    | {f"hopper_{name}": ("hopper.h", *fault) for name, fault in HOPPER.items()}
    | {f"pass_{name}": ("hopper_pass.h", *fault) for name, fault in HOPPER_PASS.items()}
)

# The same for a constant, which cannot be chosen at run time: compiled by itself.
CONSTANT = {"pass_too_few_stages_of_p": ("hopper_pass.h", "stages / (ROWS ? TILES : TILES / 2) + 2", "2")}
