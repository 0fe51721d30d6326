"""Methods compared in pairs, image by image: differences of top-1 with errors from a bootstrap.

    python benchmarks/paper/paired.py FOLDER [--against lora fact-tt]     # after vtab1k.py --offline --gpu --out FOLDER
    python benchmarks/paper/paired.py FOLDER --plot FOLDER/paired.png     # EFFT1 and EFFT2 against these

FOLDER has runs.csv, with what each run predicted of every test image, and labels.csv, with the right classes.
"""

import argparse
import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Difference(NamedTuple):
    """Top-1 of one method minus that of another, in percentage points."""

    mean: float
    error: float  # standard deviation of the bootstrap
    seeds: int  # that both methods have


def write_labels(path: Path, labels: dict[str, str]) -> None:
    """A line per data set: its name and the class of every test image as a digit to the base 36."""
    from efft_kernels.storage import write_bytes

    write_bytes(path, "".join(f"{name},{text}\n" for name, text in [("data", "labels"), *labels.items()]).encode())


def labels_of(folder: Path) -> dict[str, str]:
    """What :func:`write_labels` wrote as labels.csv of the folder."""
    with (folder / "labels.csv").open() as file:
        return {row["data"]: row["labels"] for row in csv.DictReader(file)}


def right(folder: Path) -> dict[tuple[str, str], dict[int, np.ndarray]]:
    """{(method, data): {seed: for each test image whether the run was right}}"""
    labels = {data: np.array(list(text)) for data, text in labels_of(folder).items()}
    found: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    with (folder / "runs.csv").open() as file:
        for row in csv.DictReader(file):
            if row["part"] == "test" and row.get("predictions"):
                said = np.array(list(row["predictions"].strip('"')))
                if len(said) != len(labels[row["data"]]):
                    raise ValueError(f"{folder}: {len(said)} predictions of {len(labels[row['data']])} images")
                seeds, seed = found.setdefault((row["method"], row["data"]), {}), int(row["seed"])
                if seed in seeds:
                    raise ValueError(f"{folder}: {row['method']} has two results for {row['data']}, seed {seed}")
                seeds[seed] = said == labels[row["data"]]
    return found


def difference(one: dict[int, np.ndarray], other: dict[int, np.ndarray], draws: int = 2000) -> Difference | None:
    """The difference of two methods on one data set, over the seeds that both have; None if there are none.

    A draw takes seeds and images with replacement, the same ones for both methods.
    """
    seeds = sorted(set(one) & set(other))
    if not seeds:
        return None
    gaps = 100.0 * np.stack([one[seed].astype(np.float64) - other[seed] for seed in seeds])  # [seeds, images]
    random = np.random.default_rng(0)
    n, images = gaps.shape
    found = []
    for _ in range(draws):
        some = np.bincount(random.integers(n, size=n), minlength=n) @ gaps / n
        found.append(some[random.integers(images, size=images)].mean())
    return Difference(float(gaps.mean()), float(np.std(found)), n)


def _compared(found: dict, methods: Iterable[str], against: list[str]) -> None:
    """ValueError for a method to compare with that shares no data set and seed with any of the others."""
    for other in against:
        if not any(found[m, data].keys() & found.get((other, data), {}).keys() for m, data in found if m in methods):
            raise ValueError(f"--against: expected methods that share data and seeds with {methods}, got {other!r}")


def table(folder: Path, against: list[str]) -> str:
    """A line per method and method that it is compared with, a column per data set: difference ± standard error."""
    found = right(folder)
    names = list(dict.fromkeys(data for _, data in found))
    methods = [m for m in dict.fromkeys(method for method, _ in found) if m not in against]
    _compared(found, methods, against)
    lines = ["| method | against | " + " | ".join(names) + " |", "| --- | --- |" + " ---: |" * len(names)]
    for method in methods:
        for other in against:
            gaps = [difference(found.get((method, name), {}), found.get((other, name), {})) for name in names]
            if any(gaps):
                cells = [f"{gap.mean:+.1f} ± {gap.error:.1f}" if gap else "–" for gap in gaps]
                lines.append(f"| {method} | {other} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(folder: Path, path: Path, against: list[str], methods: tuple[str, ...] = ("efft1", "efft2")) -> None:
    """Draw the differences of some methods, with a bar of two standard errors to either side."""
    from matplotlib.figure import Figure

    found = right(folder)
    _compared(found, methods, against)
    names = [data for data in dict.fromkeys(data for _, data in found) if all((m, data) in found for m in methods)]
    figure = Figure(figsize=(4.2 * len(against), 3.2), layout="constrained")
    for axes, other in zip(figure.subplots(1, len(against), sharey=True, squeeze=False)[0], against):
        for i, method in enumerate(methods):
            gaps = [difference(found[method, name], found.get((other, name), {})) for name in names]
            at = 0.3 * (i - (len(methods) - 1) / 2)
            drawn = [(gap.mean, row + at, 2 * gap.error) for row, gap in enumerate(gaps) if gap]
            means, rows, errors = zip(*drawn) if drawn else ((), (), ())
            axes.errorbar(means, rows, xerr=errors, fmt="o", markersize=4, label=method.upper())
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set(title=f"minus {other}", xlabel="points of top-1", yticks=range(len(names)), yticklabels=names)
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", nargs="+", default=["lora", "fact-tt"], metavar="METHOD")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw EFFT1 and EFFT2 against these instead")
    args = parser.parse_args(arguments)
    try:
        if args.plot:
            plot(args.folder, args.plot, args.against)
        else:
            print(table(args.folder, args.against))
    except (OSError, ValueError, KeyError) as error:
        print(f"paired: {error!r}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
