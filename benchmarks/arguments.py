"""Arguments that the command lines of the benchmarks share. Imported first: it reports which packages are missing."""

import argparse
import os
import sys
from pathlib import Path

import torch

try:
    import efft_kernels  # noqa: F401
    import matplotlib  # noqa: F401, draws the charts
    import tqdm  # noqa: F401
    from record import prepare_folder
except ModuleNotFoundError as error:
    sys.exit(f'the benchmarks need efft_kernels, tqdm, tabulate and matplotlib: pip install -e ".[bench]" ({error})')


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A positive, finite number of seconds."""
    try:
        if 0 < float(text) < float("inf"):
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")


def add_common(p: argparse.ArgumentParser, repeats: int, limit: float, what: str, out: str) -> None:
    """Add the options of where and how long to measure; ``what`` the time limit is for, ``out`` the files of --out."""
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    p.add_argument("--threads", type=positive, metavar="T", help="of torch (default: its own choice)")
    p.add_argument("--repeats", type=positive, default=repeats, metavar="N", help="most rounds (default: %(default)s)")
    p.add_argument("--seconds", type=seconds, default=limit, metavar="S", help=f"{what} (default: %(default)g)")
    p.add_argument("--out", type=Path, metavar="DIR", help=f"folder to write {out} to")


def use_device(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set the number of threads, or exit with a message if torch cannot use --device, or EFFT_BACKEND is set."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("argument --device: expected a device that torch can use, got 'cuda' without a GPU or a CUDA torch")
    if chosen := os.environ.get("EFFT_BACKEND"):
        p.error(f"EFFT_BACKEND: expected unset, as backends are compared or chosen by --backend here, got {chosen!r}")


def check_out(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Create the folder --out, or exit with a message if it cannot be written."""
    if args.out is not None:
        try:
            prepare_folder(args.out)
        except OSError as error:
            p.error(f"argument --out: expected a folder that can be written, got {str(args.out)!r}: {error.strerror}")
