"""Prove the kernels on this machine's GPU (or CPU), time them for a model's Linears, and use them where they win.

    python -m efft_kernels.tune --model vit_b --batch 64 --rank 16
    python -m efft_kernels.tune --shapes 12608,768,2304,16 --dtype bfloat16 float16
    python -m efft_kernels.tune --model vit_b --batch 64 --adapters 2 64    # mixed batches of 2 to 64 adapters

What it finds is kept in tuned.json in $EFFT_CACHE or the user's cache folder, and used from then on; deleting that file
undoes it.
"""

import argparse
import itertools
import sys

import torch

from .kernels.tuning import run, table
from .kernels.tuning.children import LATE
from .kernels.tuning.shapes import MODELS, model_shapes


def shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) in (4, 6) and all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        return tuple(map(int, parts))
    raise argparse.ArgumentTypeError(f"expected M,K,N,R or M,K,N,R,A,B, positive integers, got {text!r}")


def positive(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser("python -m efft_kernels.tune", description=__doc__.partition("\n")[0])
    known = ", ".join(MODELS)
    p.add_argument(
        "--model", nargs="+", default=[], metavar="NAME", help=f"whose Linears: {known}, or a name of timm's"
    )
    p.add_argument("--batch", nargs="+", type=positive, metavar="B", help="images (default: 64, on a CPU 4)")
    p.add_argument("--rank", nargs="+", type=positive, default=[16], metavar="R", help="of the adapter (default: 16)")
    several = "in mixed batches of --batch images, timed for Triton; may be empty (default: 8 and B, on a CPU none)"
    p.add_argument("--adapters", nargs="*", type=positive, metavar="A", help=several)
    sizes = "rows, inputs, outputs, rank; of a mixed batch also adapters and samples"
    p.add_argument("--shapes", nargs="+", type=shape, default=[], metavar="M,K,N,R[,A,B]", help=sizes)
    dtypes = "bfloat16", "float16", "float32"
    p.add_argument("--dtype", nargs="+", choices=dtypes, default=["bfloat16"], help="default: bfloat16")
    p.add_argument("--backend", nargs="+", choices=run.BACKENDS, help="default: all that the device has")
    p.add_argument("--device", help="cpu, cuda or cuda:INDEX; default: the current GPU if there is one, else the CPU")
    p.add_argument("--minutes", type=float, default=3.0, help="nothing new is started after this time (default: 3)")
    args = p.parse_args(argv)
    try:
        models = args.model or ([] if args.shapes else ["vit_b"])
        on_cpu = str(args.device).startswith("cpu") or (args.device is None and not torch.cuda.is_available())
        batches = args.batch or [4 if on_cpu else 64]
        if args.adapters and not models:
            p.error("--adapters needs --model; a mixed batch of --shapes is M,K,N,R,A,B")
        shapes, mixes = args.shapes, not on_cpu and "triton" in (args.backend or run.BACKENDS)
        if not mixes and (args.adapters or any(len(each) == 6 for each in shapes)):
            p.error("mixed batches are timed for triton on a GPU; expected that backend and device for them")
        for m, B, R in itertools.product(models, batches, args.rank):
            found = model_shapes(m, B, R)
            adapters = {min(8, B), B} - {1} if args.adapters is None and mixes else args.adapters or []
            shapes = [*shapes, *found, *((*s, A, B) for A in sorted(adapters) for s in found)]
        found = run.tune(
            dict.fromkeys(shapes), [getattr(torch, name) for name in args.dtype], backends=args.backend,
            device=args.device, minutes=args.minutes, say=lambda line: print(line, flush=True),
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    for line in found.left:
        print(f"not done: {line}")
    won = sum(bool(each.choice and each.choice.backend) for each in found.timed)
    left = f", {len(found.left)} are not done" if found.left else ""
    if any(line.endswith(LATE) for line in found.left):
        left += "; what is proven stays so, and a run with more --minutes does the rest"
    print(f"a kernel is chosen for {won} of {len(found.timed)} ops and sizes that were timed{left}")
    problem = f"{found.not_written}; this run's choice is lost when it ends" if found.not_written else None
    if problem := problem or (None if found.timed else "nothing was timed, so nothing new is chosen"):
        print(problem, file=sys.stderr)
        return 1
    print(f"on record in {table.user_file()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
