"""The rows of bench_forward.py: the work that each one stands for, sums over a model, and where efft is slower."""

import torch
from shapes import work

COLOURS = {
    "onednn": "#9e9e9e",
    "einsum_dw": "#8c2d04",
    "einsum": "#d9603b",
    "einsum_compiled": "#f0a589",
    "peft": "#c28f00",
    "peft_compiled": "#ecc94b",
    "peft_autotuned": "#f5dc8a",
    "unfused": "#5b8fc7",
    "left_to_right": "#b2abd2",
    "efft": "#1b7837",
    "efft_group": "#7fbf7b",
}


def raise_limits(record: dict) -> None:
    """Raise the machine's limits to what a variant reached, where it was faster than they allow."""
    limits = record["limits"]
    for row in record["results"]:
        seconds, (flops, moved) = row["ms"] * 1e-3, row_work(row)
        reached, speed = flops / seconds, moved / seconds
        if reached <= limits["flops"][row["dtype"]] and speed <= limits["bandwidth"]:
            continue
        limits["flops"][row["dtype"]] = max(reached, limits["flops"][row["dtype"]])
        limits["bandwidth"] = max(speed, limits["bandwidth"])
        limits["source"] = f"{limits['source'].partition(';')[0]}; more where a variant showed more"


def row_work(row: dict) -> tuple[int, int]:
    """(FLOPs, bytes) that the fused layer needs for the case and pass of a row, whatever its variant does."""
    return work(row["M"], row["K"], row["N"], row["R"], getattr(torch, row["dtype"]).itemsize)[row["pass"]]


def floor_share(row: dict, limits: dict) -> float:
    """The share of a row's time that the fused layer would take at the machine's limits."""
    flops, moved = row_work(row)
    return max(flops / limits["flops"][row["dtype"]], moved / limits["bandwidth"]) * 1e3 / row["ms"]


def summary(rows: list[dict]) -> list[dict]:
    """Per size, dtype and pass: ms by variant, summed over all Linears of the model, and efft over each variant."""
    sums = []
    for (size, dtype, part), group in groups(rows, "size", "dtype", "pass"):
        names = list(dict.fromkeys(row["layer"] for row in group))
        ms = {}
        for variant, own in groups(group, "variant"):
            if len(own) == len(names):
                ms[variant[0]] = sum(row["count"] * row["ms"] for row in own)
        efft = ms.get("efft")
        ratio = {name: efft / value for name, value in ms.items() if name != "efft"} if efft else {}
        sums.append({"size": size, "dtype": dtype, "pass": part, "layers": names, "ms": ms, "efft_ratio": ratio})
    return sums


def groups(rows: list[dict], *keys: str) -> list[tuple[tuple, list[dict]]]:
    """The rows with equal values of the keys together: [(the values, their rows)], in the order of first appearance."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(found.items())


def slower(rows: list[dict]) -> list[str]:
    """The cases in which the automatic choice is more than 2 % slower than plain torch, and slower in 3 of 4 rounds."""
    found = []
    for row in rows:
        ratio = row.get("ratio_unfused") if row["variant"] == "efft" else None
        if ratio and ratio > 1.02 and row["ratio_unfused_q1"] > 1:
            found.append(f"{row['layer']} {row['dtype']} M={row['M']} {row['pass']} ({ratio:.2f})")
    return found
