"""Tunes a GPU backend for the Linears of whole models: kernels/tuning/tune.py with the sizes of shapes.py.

    python benchmarks/tune_shapes.py --backend cuda --model vit_b --batch 64 --rank 16

What it finds goes to the user's own table, and is used from then on.
"""

import argparse
import math
import sys
import time

import torch

try:
    from tqdm import tqdm

    from record import digits, text_table
    from bench_forward import positive, seconds
    from efft_kernels.kernels.tuning.tune import BACKENDS, tune
except ModuleNotFoundError as error:
    sys.exit(f'the benchmarks need efft_kernels, tqdm, tabulate and matplotlib: pip install -e ".[bench]" ({error})')

from shapes import MODELS, layers


def sizes(models: list[str], batches: list[int], ranks: list[int]) -> list[tuple[int, int, int, int]]:
    """(M, K, N, R) of every Linear, each once"""
    found = ((model, batch, rank) for model in models for batch in batches for rank in ranks)
    return list(
        dict.fromkeys((B * layer.tokens, layer.K, layer.N, R) for model, B, R in found for layer in layers(model))
    )


def lines(found: dict[str, dict]) -> list[list[str]]:
    """[op, sizes, ms, torch ms, ratio] of the whole ops"""
    return [
        [*name.split(" ", 1), digits(e["ms"]), digits(e["torch_ms"]), f"{e['ms'] / e['torch_ms']:.2f}"]
        for name, e in found.items() if "torch_ms" in e
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--backend", choices=BACKENDS, required=True)
    p.add_argument("--model", nargs="+", choices=MODELS, default=["vit_b"], help="whose Linears (default: vit_b)")
    p.add_argument("--batch", nargs="+", type=positive, default=[64], metavar="B", help="images (default: 64)")
    p.add_argument("--rank", nargs="+", type=positive, default=[16], metavar="R", help="of the adapter (default: 16)")
    p.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    p.add_argument("--seconds", type=seconds, metavar="S", help="no further sizes after this time (default: all)")
    args = p.parse_args(argv)
    shapes, end, found = sizes(args.model, args.batch, args.rank), time.perf_counter() + (args.seconds or math.inf), {}
    try:
        for shape in tqdm(shapes, unit="size", disable=None):
            if time.perf_counter() > end:
                print(f"not tuned after {args.seconds:g} seconds: {shapes[shapes.index(shape):]}")
                break
            found |= tune([shape], getattr(torch, args.dtype), backend=args.backend)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if found:
            print(text_table(["op", "sizes", "ms", "torch ms", "ratio"], lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
