"""Arguments that the command lines of the benchmarks share. Imported first: it reports which packages are missing."""

import argparse
import sys

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


def use_device(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set the number of threads, or exit with a message if torch cannot use --device."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("argument --device: expected a device that torch can use, got 'cuda' without a GPU or a CUDA torch")


def check_out(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Create the folder --out, or exit with a message if it cannot be written."""
    if args.out is not None:
        try:
            prepare_folder(args.out)
        except OSError as error:
            p.error(f"argument --out: expected a folder that can be written, got {str(args.out)!r}: {error.strerror}")
