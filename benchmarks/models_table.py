"""docs/models.md: what EFFT2 adapts of every family of timm and every image classifier of transformers.

    python benchmarks/models_table.py            # print the table
    python benchmarks/models_table.py --write    # refresh docs/models.md

A family is a file of timm, or a kind of model in transformers, with at least eight Linears or attentions; convolutional
ones have fewer. One of its small models stands for it. Models have no weights: they are made on the meta device, or on
the CPU where their constructor computes with values.
"""

import argparse
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import efft_kernels
from efft_kernels.extras import timm
from efft_kernels.storage import write_bytes

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
MARKERS = "<!-- models -->\n", "<!-- end -->\n"
CONFIG = efft_kernels.EFFTConfig("efft2", rank=4)
STATES = "whole", "part", "refused", "not made"
SMALLEST = tuple("atto femto pico nano xxs _xs tiny _t0 _t_ _tt mini _s0 _s_ small _b0".split())


class Row(NamedTuple):
    """What becomes of one model."""

    family: str
    model: str
    state: str  # whole, part, refused, not made
    adapted: int  # Linears
    about: str  # what is left out, or why it is refused


def row(family: str, name: str, model: nn.Module | Exception) -> Row:
    if isinstance(model, Exception):
        return Row(family, name, "not made", 0, _short(f"{type(model).__name__}: {model}"))
    try:
        made = efft_kernels.plan(model, CONFIG)
    except (TypeError, ValueError) as error:
        return Row(family, name, "refused", 0, _short(str(error)))
    adapted = sum(len(group.slots) for group in made.groups)
    left = [each for each in made.left_out if each.unexpected]
    kinds = {}
    for each in left:
        kinds.setdefault((each.kind, each.path.rpartition(".")[2], each.why), []).append(each.path)
    about = "; ".join(f"{len(paths)} `{name}` ({kind}): {why}" for (kind, name, why), paths in kinds.items())
    return Row(family, name, "part" if left else "whole", adapted, _short(about, 240))


def _short(text: str, most: int = 160) -> str:
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= most else text[: most - 1].rsplit(" ", 1)[0] + " …"


def timm_models(only: tuple[str, ...] = ()) -> Iterator[tuple[str, str, nn.Module | Exception]]:
    """(family, name, model, or why it cannot be made here) of the families with Linears in blocks"""
    library = timm()
    from timm.models import list_models, list_modules

    for family in sorted(only or list_modules()):
        names = list_models(module=family, pretrained=True) or list_models(module=family)
        names = [name.partition(".")[0] for name in names]
        if not names:
            continue
        name = min(dict.fromkeys(names), key=lambda n: (not any(mark in n for mark in SMALLEST), len(n), n))
        model = _made(lambda n=name: library.create_model(n))
        if _has_blocks(model):
            yield family, name, model


def transformers_models(only: tuple[str, ...] = ()) -> Iterator[tuple[str, str, nn.Module | Exception]]:
    """The same of transformers, with the default configuration of each"""
    timm()  # makes torchvision importable beside another build of torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    for family in sorted(only or CLASSES):
        if family == "timm_wrapper":  # a wrapped model of timm is one of timm
            continue
        name = CLASSES[family] if isinstance(CLASSES[family], str) else CLASSES[family][0]
        model = _made(lambda f=family, n=name: getattr(transformers, n)(transformers.CONFIG_MAPPING[f]()))
        if _has_blocks(model):
            yield family, name, model


def _made(make: Callable[[], nn.Module]) -> nn.Module | Exception:
    for device in ("meta", "cpu"):
        try:
            with torch.device(device), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return make()
        except Exception as error:  # whatever a constructor cannot do there, or what it needs is not installed
            found = error
    return found


def _has_blocks(model: nn.Module | Exception) -> bool:
    kinds = nn.Linear | nn.MultiheadAttention
    return isinstance(model, Exception) or sum(isinstance(module, kinds) for module in model.modules()) >= 8


def rows() -> list[tuple[str, Row]]:
    found = []
    for library, models in (("timm", timm_models), ("transformers", transformers_models)):
        for given in models():
            found.append((library, row(*given)))
            print(*found[-1][1][:4], sep="  ", file=sys.stderr, flush=True)
    return found


def markdown(found: list[tuple[str, Row]]) -> str:
    lines = []
    for library in dict.fromkeys(library for library, _ in found):
        whole = [each for name, each in found if name == library and each.state == "whole"]
        listed = ", ".join(f"{each.family} (`{each.model}`, {each.adapted})" for each in whole)
        text = f"**{library}, whole**, with the number of adapted Linears: {listed}."
        lines += ["", *textwrap.wrap(text, 120, break_on_hyphens=False)]
    lines += [
        "",
        "| library | family | model | state | adapted Linears | left out, or why |",
        "| --- | --- | --- | --- | ---: | --- |",
    ]
    for library, each in found:
        cells = (library, each.family, f"`{each.model}`", each.state, str(each.adapted or "–"), each.about)
        lines += [f"| {' | '.join(cells)} |"] * (each.state != "whole")
    counts = {state: sum(each.state == state for _, each in found) for state in STATES}
    total = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return "\n".join(lines) + f"\n\n{len(found)} families: {total}.\n\n"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--write", action="store_true", help="refresh docs/models.md")
    args = p.parse_args(argv)
    text = markdown(rows())
    if not args.write:
        print(text)
        return 0
    before, _, rest = PAGE.read_text().partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    write_bytes(PAGE, (before + MARKERS[0] + text + MARKERS[1] + after).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
