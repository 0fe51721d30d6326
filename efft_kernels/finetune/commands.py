"""What efft-finetune does with finished runs: report, predict, export, compare."""

import argparse
import contextlib
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..storage import write_bytes
from . import checkpoints

NAMES = ("report", "predict", "export", "compare")


def run(argv: Sequence[str]) -> int:
    """Run one of these commands, argv[0]; returns the exit status 0, or 2 if no image could be read."""
    made = argparse.ArgumentParser(prog=f"efft-finetune {argv[0]}", description=_COMMANDS[argv[0]].__doc__)
    _ARGUMENTS[argv[0]](made)
    return _COMMANDS[argv[0]](made.parse_args(argv[1:]))


def say(*words: object, sep: str = " ") -> None:
    """Print, and end the program if standard output fails: with status 0 if its reader, such as head, has ended."""
    try:
        print(*words, sep=sep, flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):  # what is left in the buffer would fail again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(0)
        print(f"efft-finetune: standard output could not be written: {error.strerror}", file=sys.stderr)
        sys.exit(74)  # cli.STORAGE


def _run_folder(made: argparse.ArgumentParser) -> None:
    made.add_argument("run", metavar="RUN", help="folder of a finished run, or hf-hub:OWNER/NAME")


def _weights(made: argparse.ArgumentParser) -> None:
    made.add_argument("--checkpoint", help="the pre-trained weights, or the folder of the model, if they have moved")


def _report_arguments(made: argparse.ArgumentParser) -> None:
    _run_folder(made)
    made.add_argument("--data", help="the images, if they have moved since the run")
    made.add_argument("--out", metavar="FILE.html", help="default: report.html in RUN")


def _report(given: argparse.Namespace) -> int:
    """Write the report of a finished run again, a page of HTML."""
    from . import page, predictions
    from .finished import beside, read_record
    from .outputs import check_file, read_by

    path = Path(given.out) if given.out else beside(given.run, page.NAME)
    record = read_record(given.run)
    check_file(path, ".html", read_by(given.run, data=given.data))
    rows = Path(given.run) / predictions.NAME
    rows = predictions.from_csv(rows, record.get("multilabel", False), record["classes"]) if rows.is_file() else []
    html = page.build(record, rows, _pictures(record, given.data))
    with checkpoints.storing(path.parent, str(path)):
        write_bytes(path, html.encode())
    say(path)
    return 0


def _pictures(record: dict, data: str | None):
    """The function that finds the picture of a prediction. Without the data a report has the names of the files."""
    from .data import open_data
    from .images import DataError
    from .page import loader
    from .settings import Settings

    s = Settings(**record["settings"])
    fractions = {"test_fraction": s.test_fraction, "val_fraction": s.val_fraction}
    try:
        opened = open_data(data or s.data, s.image_size, hold_out=s.select == "val", classes=s.classes, **fractions)
    except DataError as error:
        if data:
            raise  # before a report with pictures is replaced by one without
        print(f"efft-finetune: the report has no pictures, --data can name their place: {error}", file=sys.stderr)
        return lambda row: None
    contents = record.get("identity", {}).get("contents")  # an earlier version did not record them
    if contents and contents != opened.contents():
        if data:
            raise ValueError(f"data must be the images of the run, but {data} has others")
        print(f"efft-finetune: the report has no pictures: {data or s.data} has others than the run", file=sys.stderr)
        return lambda row: None
    if not data:
        return loader(opened)
    from dataclasses import replace

    found = loader(opened)
    old, new = (path.parent if path.suffix.lower() in (".csv", ".tsv") else path for path in (Path(s.data), Path(data)))

    def moved(name: str) -> str:
        return str(new / Path(name).relative_to(old)) if Path(name).is_relative_to(old) else name

    return lambda row: found(replace(row, image=moved(row.image)))


def _predict_arguments(made: argparse.ArgumentParser) -> None:
    _run_folder(made)
    made.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="images, and folders of any number of them")
    made.add_argument("--out", metavar="FILE.csv", help="write the labels to a CSV file instead of printing them")
    made.add_argument("--batch-size", type=int, default=32, help="images per forward (default 32)")
    made.add_argument("--workers", type=int, default=0, help="processes that read images (default 0)")
    made.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps or xpu")
    _weights(made)


def _predict(given: argparse.Namespace) -> int:
    """Label images with a finished run."""
    from .finished import read_record
    from .labelling import find_files, label, label_to_csv
    from .outputs import check_file, read_by
    from .prepared import find_device

    for name, least in (("batch_size", 1), ("workers", 0)):
        if getattr(given, name) < least:
            raise ValueError(f"{name} must be an int of at least {least}, got {getattr(given, name)}")
    find_device(given.device)  # before the run is read, which may be on the hub
    files = find_files(given.images, read_record(given.run)["classes"])
    options = {"checkpoint": given.checkpoint, "device": given.device, "batch_size": given.batch_size}
    options |= {"workers": given.workers, "show": given.out is not None}
    if given.out is None:
        bad = []
        for found in label(given.run, files, **options):
            if found.problem:
                bad.append(found.problem)
                continue
            pairs = list(zip(found.classes, found.probabilities))[: None if found.several else 1]
            say(found.file, "|".join(c for c, _ in pairs), "|".join(f"{p:.4f}" for _, p in pairs), sep="\t")
    else:
        check_file(Path(given.out), ".csv", itertools.chain(files, read_by(given.run, given.checkpoint)))
        bad = label_to_csv(given.run, files, Path(given.out), **options)
        say(f"{given.out}: {len(files) - len(bad)} images labelled")
    if bad:
        print(f"efft-finetune: {len(bad)} of {len(files)} images are left out:", *bad, sep="\n  ", file=sys.stderr)
    return 2 if len(bad) == len(files) else 0


def _export_arguments(made: argparse.ArgumentParser) -> None:
    _run_folder(made)
    made.add_argument("--to", required=True, choices=("lora", "onnx", "weights", "hub"))
    made.add_argument("--out", metavar="PATH", help="the file, the folder of a LoRA, or OWNER/NAME on the hub")
    _weights(made)


def _export(given: argparse.Namespace) -> int:
    """Export a finished run: a LoRA for PEFT, an ONNX model that takes pixels, merged weights, or to the hub."""
    from .exporting import export

    say(export(given.run, given.to, given.out, given.checkpoint))
    return 0


def _compare_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    made.add_argument("--out", metavar="FILE.html", default="compare.html", help="the page (default compare.html)")


def _compare(given: argparse.Namespace) -> int:
    """Compare finished runs: a table, also on a page with plots."""
    from . import page
    from .finished import read_record
    from .outputs import check_file, read_by

    path, runs = Path(given.out), list(dict.fromkeys(given.runs))
    check_file(path, ".html", (file for run in runs for file in read_by(run)))
    names = {str(Path(run).resolve()): run for run in runs}
    parents = {Path(path).parent for path in names}
    # the shortest names that tell the runs apart
    short = len({Path(path).name for path in names}) == len(names) and len(parents) == 1
    records = {Path(path).name if short else run: read_record(run, later=True) for path, run in names.items()}
    header, rows = page.compare(records)
    html = page.build_comparison(records)
    with checkpoints.storing(path.parent, str(path)):  # first, because who reads the table may end
        write_bytes(path, html.encode())
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    say(f"\nplots: {path}")
    return 0


_COMMANDS = {"report": _report, "predict": _predict, "export": _export, "compare": _compare}
_ARGUMENTS = dict(zip(NAMES, (_report_arguments, _predict_arguments, _export_arguments, _compare_arguments)))
