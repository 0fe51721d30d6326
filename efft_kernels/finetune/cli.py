"""The command efft-finetune: settings from flags and YAML files, error messages, exit codes."""

import argparse
import codecs
import contextlib
import logging
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from typing import Literal, get_args, get_origin

import torch

from ..extras import need
from . import commands
from .methods import METHODS
from .settings import Settings

DONE, FAILED, WRONG, STORAGE, INTERRUPTED = 0, 1, 2, 74, 75


def _defaults(method) -> str:
    return ", ".join(f"{name} {list(v) if isinstance(v, tuple) else v}" for name, v in method.options.items())


_EPILOG = f"""
examples:
  efft-finetune --data photos/ --out runs/photos --checkpoint download
      photos/ has one folder of images per class; a fifth of each class is held out for testing
  efft-finetune --data vtab/svhn --out runs/svhn --checkpoint ViT-B_16.npz --method lora --rank 8
  efft-finetune --config run.yaml --seed 1 --out runs/1
  efft-finetune --data photos/ --out runs/try --model hf:FOLDER --select val --image-size 112 --epochs 10
  torchrun --nproc-per-node 4 -m efft_kernels.finetune.cli --data photos/ --out runs/photos --checkpoint download
      the first run again, on four GPUs or in four processes of a CPU

other commands:
  efft-finetune report OUT                  write the report of a finished run again
  efft-finetune predict OUT IMAGE...        label images, also whole folders with --out FILE.csv
  efft-finetune export OUT --to onnx        or lora, a folder for PEFT, or weights, merged for timm or transformers
  efft-finetune export OUT --to hub --out OWNER/NAME
      upload the adapter and the run's record; then hf-hub:OWNER/NAME may stand for OUT
  efft-finetune compare OUT OUT...          a table of runs, and a page with plots

exit status:
  {DONE}   success: adapter, metrics.json, predictions.csv, curves.png and report.html are in OUT
  {FAILED}   an unexpected error, with its traceback
  {WRONG}   settings, data, weights or paths that cannot be used, before the first step; or the loss is not finite
  {STORAGE}  the disk is full or fails; the files in OUT are complete, and the same command continues from them.
      Also where standard output cannot be written
  {INTERRUPTED}  stopped by SIGTERM or SIGINT after writing a checkpoint; the same command continues from it.
      Also of the other processes of a run, when one of them was killed, and of other commands, which begin again

methods and the defaults of their options:
""" + "\n".join(
    f"  {m.name:<12} {m.meaning}" + "".join(f"\n{'':15}{line}" for line in textwrap.wrap(_defaults(m), 100))
    for m in METHODS.values()
)


def parser():
    """The parser of flags and of --config FILE.yaml, both named as in Settings. A flag after --config overrides it."""
    jsonargparse = need("jsonargparse")

    class Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message, *rest):
            kinds = {field.name: field.type for field in fields(Settings)}
            wrong = re.search(r'key "(\w+)":.*(?:Given|Got) value: (.*)', message, re.DOTALL)
            if wrong and wrong[1] in kinds:
                *first, last = _written(kinds[wrong[1]])
                message = f"{wrong[1]} must be {', '.join(first)}{' or ' * bool(first)}{last}, got {wrong[2]}"
            elif re.match("unrecognized arguments: [^-]", message):
                message += f"; the commands are {', '.join(commands.NAMES)}, and without one a run is trained"
            super().error(message, *rest)

    made = Parser(
        prog="efft-finetune",
        usage="efft-finetune --data DATA --out OUT [--config FILE.yaml] [--SETTING VALUE ...]",
        description="Fine-tune a vision transformer on labelled images, with EFFT or with a method to compare it to.",
        epilog=_EPILOG,
        formatter_class=Formatter,
        default_env=False,
    )
    made.add_argument("--config", action="config", help="read settings from a YAML file")
    made.add_class_arguments(Settings)
    return made


def _written(kind) -> list[str]:
    """What a setting of this type may be, as one writes it in a shell."""
    if get_origin(kind) is Literal:
        return [*map(repr, get_args(kind))]
    if get_origin(kind) is tuple:
        first, other = get_args(kind)
        example = "'[a,b]'" if first is str else "'[1,2]'"
        return [f"a list such as {example}" if other is ... else f"a pair such as {example}"]
    if get_args(kind):
        return [words for each in get_args(kind) for words in _written(each)]
    return [{int: "an int", float: "a finite number", bool: "true or false", str: "a text", type(None): "null"}[kind]]


def settings(argv: Sequence[str]) -> Settings:
    """Parse arguments into settings; exits with status 2 and a message if that fails."""
    found = parser().parse_args([_underscored(arg) for arg in argv])
    return Settings(**{field.name: found[field.name] for field in fields(Settings)})


def _underscored(arg: str) -> str:
    """--batch-size=64 as --batch_size=64"""
    name, equals, value = arg.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else arg


def _encoded(error: UnicodeEncodeError) -> tuple[bytes | str, int]:
    """Of a character that an encoding lacks the byte that it stands for in the name of a file, or an escape."""
    error.end, code = error.start + 1, ord(error.object[error.start])
    return bytes([code - 0xDC00]) if 0xDC80 <= code < 0xDD00 else codecs.backslashreplace_errors(error)[0], error.end


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_Handler()])
    for name in ("httpx", "matplotlib", "PIL"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with contextlib.suppress(AttributeError, TypeError):  # of a stream that a caller put in its place
        codecs.register_error("efft-finetune", _encoded)
        sys.stdout.reconfigure(errors="efft-finetune")
    finished = bool(argv) and argv[0] in commands.NAMES
    try:
        return commands.run(argv) if finished else _train(settings(argv))
    except KeyboardInterrupt:  # before the first step, or the second signal
        then = "begins again" if finished else "continues from the last checkpoint, if any"
        print(f"efft-finetune: stopped; the same command {then}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return _explained(error)


def _train(chosen: Settings) -> int:
    from .loop import train
    from .results import NAMES

    result = train(chosen)
    if int(os.environ.get("RANK", 0)) == 0:
        for part, found in result.metrics.items():
            named = ", ".join(f"{NAMES[key]} {v:.2f} %" for key, v in found.items() if key != "loss")
            commands.say(f"{part}: {named}")
        commands.say(f"report:  {result.out / 'report.html'}")
        commands.say(f"adapter: {result.adapter}")
        out = shlex.quote(str(result.out))
        commands.say(f"predict: efft-finetune predict {out} IMAGE...")
        if chosen.method.startswith(("efft", "fact", "lora")) or chosen.method in ("full", "linear", "bitfit"):
            commands.say(f"merge:   efft-finetune export {out} --to weights")
    return DONE


def _explained(error: Exception) -> int:
    """Print a message for an error that the user can correct, a traceback for any other; returns the exit status."""
    from .checkpoints import StorageError
    from .loop import Interrupted, PeerLost

    wrong = ValueError, TypeError, OSError, ImportError
    kinds = {(Interrupted, PeerLost): INTERRUPTED, StorageError: STORAGE, wrong: WRONG}
    for kind, code in kinds.items():
        if isinstance(error, kind):
            text = error.strerror if isinstance(error, StorageError) and error.strerror else str(error)
            print(f"efft-finetune: {text}", file=sys.stderr)
            return code
    if isinstance(error, torch.OutOfMemoryError):
        text = "the memory of the device is too small; a larger accumulate takes less"
        print(f"efft-finetune: {text}: {str(error).splitlines()[0]}", file=sys.stderr)
        return WRONG
    logging.getLogger("efft_kernels.finetune").exception("efft-finetune failed")
    return FAILED


class _Handler(logging.Handler):
    """Writes log messages above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        need("tqdm").tqdm.write(self.format(record), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
