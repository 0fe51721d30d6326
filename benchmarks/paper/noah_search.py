"""NOAH's search (arXiv 2206.04673): sizes of Adapter, LoRA and prompts for every block of a model and a data set.

    python benchmarks/paper/noah_search.py             # on CIFAR-10 from a package registry, as vtab1k.py --offline
    python benchmarks/paper/noah_search.py --data DIR --checkpoint ViT-B_16.npz --datasets svhn dtd --out FOLDER

A supernet with the largest sizes is trained on 800 images, in each step with random sizes; a smaller module is the
first part of the largest. An evolutionary search finds the sizes within a budget of parameters with which it is best on
the 200 validation images. Models with these sizes are trained from their start and tested. What is there is not
repeated.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import ablation  # puts benchmarks/ on the path
from efft_kernels.finetune import methods
from efft_kernels.finetune.baselines import Bottleneck, Prompt, QVUpdate
from efft_kernels.finetune.data import open_data
from efft_kernels.finetune.models import logits, make_model, normalisation
from efft_kernels.finetune.settings import Settings
from linear_probe import DEVICE
from record import prepare_folder
from runs import Places, Run, Store, command, complete, images_named, opened, recorded

SIZES = (1, 5, 10)  # those of the released configurations
LARGEST = max(SIZES)
KINDS = ("bottleneck", "lora_rank", "tokens")
Sizes = tuple[int, ...]  # for each block in turn, one of each of KINDS


class First(nn.Module):
    """The first ``size`` entries of a dimension of a parameter that holds ``parts`` such ranges side by side."""

    def __init__(self, dim: int, parts: int = 1):
        super().__init__()
        self.dim, self.parts, self.size = dim, parts, LARGEST

    def forward(self, whole: Tensor) -> Tensor:
        pieces = whole.unflatten(self.dim, (self.parts, LARGEST))
        return pieces.narrow(self.dim + 1, 0, self.size).flatten(self.dim, self.dim + 1)


class Supernet:
    """A model with NOAH's modules in their largest sizes, of which smaller ones can be chosen."""

    def __init__(self, model: nn.Module):
        self.model = methods.apply("noah", model, dict.fromkeys(KINDS, LARGEST))
        self.blocks = [module for module in model.modules() if isinstance(getattr(module, "prompt", None), Prompt)]
        self.cuts: list[list[First]] = []  # in the order of Sizes
        self.each: list[int] = []  # parameters for a size of 1
        for block in self.blocks:
            found = list(_ranges(block))
            for kind in KINDS:
                own = [(owner, name, cut) for of, owner, name, cut in found if of == kind]
                self.cuts.append([cut for *_, cut in own])
                self.each.append(sum(getattr(owner, name).numel() for owner, name, _ in own) // LARGEST)
                for owner, name, cut in own:
                    parametrize.register_parametrization(owner, name, cut)
        self.fixed = methods.count(model) - LARGEST * sum(self.each)  # parameters whatever the sizes

    def count(self, sizes: Sizes) -> int:
        """The number of trained parameters without the head."""
        return self.fixed + sum(size * each for size, each in zip(sizes, self.each, strict=True))

    def choose(self, sizes: Sizes) -> None:
        """Let the model compute what one with these sizes would."""
        for size, cuts in zip(sizes, self.cuts, strict=True):
            for cut in cuts:
                cut.size = size
        tokens = sizes[KINDS.index("tokens") :: len(KINDS)]
        for block, before in zip(self.blocks, (0, *tokens)):
            block.replaced = before
        self.blocks[-1].appended = tokens[-1]


def _ranges(block: nn.Module) -> Iterator[tuple[str, nn.Module, str, First]]:
    """(kind, module, name, range) of each parameter of a block whose shape depends on a size."""
    for module in block.modules():
        if isinstance(module, Bottleneck):
            yield "bottleneck", module.down, "weight", First(0)
            yield "bottleneck", module.down, "bias", First(0)
            yield "bottleneck", module.up, "weight", First(1)
        elif isinstance(module, QVUpdate):
            yield "lora_rank", module, "a", First(1, len(module.chosen))
            yield "lora_rank", module, "b", First(1)
        elif isinstance(module, Prompt):
            yield "tokens", module, "tokens", First(0)


def evolve(
    score: Callable[[Sizes], float], n: int, fits: Callable[[Sizes], bool], chance: random.Random, population: int,
    generations: int,
) -> tuple[Sizes, float]:  # fmt: skip
    """The best n sizes of an evolutionary search, and their score. No sizes are measured twice.

    The best of all that were measured, a fifth of the population, are the parents of the next: one half mutations, with
    one size in five drawn anew, the other half with each size from one of two parents.

    Raises:
        ValueError: no sizes were found that fit.
    """
    seen: dict[Sizes, float] = {}
    parent = lambda: chance.choice(sorted(seen, key=seen.get)[-max(2, population // 5) :])
    makers = [lambda: tuple(chance.choices(SIZES, k=n))]
    for _ in range(generations + 1):
        for maker in makers:
            wanted = len(seen) + population // len(makers)
            for _try in range(100 * population):
                if len(seen) < wanted and (made := maker()) not in seen and fits(made):
                    seen[made] = score(made)
        if not seen:
            raise ValueError("--budget must allow some of the sizes")
        makers = [
            lambda: tuple(chance.choice(SIZES) if chance.random() < 0.2 else size for size in parent()),
            lambda: tuple(chance.choice(pair) for pair in zip(parent(), parent())),
        ]
    return max(seen.items(), key=lambda found: found[1])


def search(run: Run, places: Places) -> dict:
    """Train the supernet and search: the record of a run on validation images, with the sizes that were found."""
    began, spent, settings = time.perf_counter(), time.process_time(), dict(run.settings)
    population, generations, budget = (settings.pop(key) for key in ("population", "generations", "budget"))
    name = opened(run, places, settings.pop("test_images", None))
    settings.pop("images", None)
    s = Settings(**settings, data=name, out="none", seed=run.seed, device=places.device)
    device = DEVICE if s.device == "auto" else s.device
    data, chance, _ = open_data(name, s.image_size), random.Random(run.seed), torch.manual_seed(run.seed)
    checkpoint = "random" if s.checkpoint == "random" else places.checkpoint
    model = make_model(s.model, len(data.classes), s.image_size, checkpoint, s.drop_path).to(device)
    net = Supernet(model)
    n = len(net.each)
    most = 1e6 * budget if budget else net.count((LARGEST,) * n) / 2
    if most < (least := net.count((min(SIZES),) * n)):
        raise ValueError(f"--budget must allow the smallest sizes, {least / 1e6:.3f} million parameters, got {budget}")
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in normalisation(model, s.normalize))
    answer = lambda x: logits(model, (x.float() / 255 - mean) / std)
    (x, labels), (val_x, val_labels) = (
        (torch.stack([pixels for pixels, _ in part]).to(device), torch.tensor(part.labels, device=device))
        for part in (data.train, data.test)  # which are the validation images here
    )
    optimizer = torch.optim.AdamW(methods.trainable_parameters(model), s.lr, weight_decay=s.weight_decay)
    steps = max(1, len(x) // s.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.epochs * steps)
    model.train()
    for _ in range(s.epochs):
        for rows in torch.randperm(len(x)).split(s.batch_size)[:steps]:
            net.choose(tuple(chance.choices(SIZES, k=n)))
            F.cross_entropy(answer(x[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()

    @torch.no_grad()
    def top1(sizes: Sizes) -> float:
        net.choose(sizes)
        right = torch.cat([answer(part).argmax(1) for part in val_x.split(s.batch_size)]) == val_labels
        return 100 * right.double().mean().item()

    best, value = evolve(top1, n, lambda sizes: net.count(sizes) <= most, chance, population, generations)
    found = {"top1": value, "parameters": net.count(best), "sizes": list(best)}
    return recorded(run, found, time.perf_counter() - began, time.process_time() - spent)


def work(args: argparse.Namespace) -> dict[str, str]:
    """Search and test for each data set; returns why runs failed."""
    failures = {}
    prepare_folder(args.out)
    settings, places, _ = ablation.base(args)
    settings = {k: v for k, v in settings.items() if k not in ("rank", "scale", "factor_dropout")}
    settings |= {"method": "noah", "lr": args.lr or 1e-3}
    how = {"population": args.population, "generations": args.generations, "budget": args.budget}
    how["epochs"] = args.supernet_epochs or 5 * settings.get("epochs", 100)
    store = Store(args.out)
    for data in ablation.data_sets(args):
        own = settings | images_named(data, places)
        run = Run(data, "noah, search", 0, "val", own | how)
        record = store.get(run) or store.put(run, search(run, places))
        sizes = {kind: record["sizes"][i :: len(KINDS)] for i, kind in enumerate(KINDS)}
        runs = [Run(data, "noah, searched", seed, "test", own | sizes) for seed in range(args.seeds)]
        done, failed = complete(runs, store, places, args.workers, data)
        failures |= failed
        print(f"{data}: {', '.join(str(r['top1']) for r in done)} % with {record['parameters']} parameters: {sizes}")
    return failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--population", type=int, default=50)
    add("--generations", type=int, default=20)
    add("--budget", type=float, help="millions of parameters without the head; default half of the largest sizes")
    add("--supernet-epochs", type=int, help="default five times those of a run, as the authors'")
    add("--seeds", type=int, default=3, help="of the runs on test images; the search has seed 0")
    add("--out", type=Path, default=Path("runs", "noah_search"), help="default %(default)s")
    ablation.add_shared(parser, factors=False)
    args = parser.parse_args(arguments)
    ablation.check(parser, args)
    return command("noah_search", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
