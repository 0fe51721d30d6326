"""The head as a short linear probe of the untouched model, so that the first steps of a run move it in a useful way."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layouts import classifiers_of
from .data import reading
from .models import logits
from .prepared import Prepared

log = logging.getLogger("efft_kernels.finetune")


@dataclass(frozen=True)
class Probe:
    """The recipe of a probe: AdamW with a cosine schedule to zero, on features scaled to mean 0 and deviation 1."""

    epochs: int = 8
    lr: float = 1e-3
    weight_decay: float = 1e-4
    batch_size: int = 64


RECIPE = Probe()


def probe_head(run: Prepared, recipe: Probe = RECIPE) -> float:
    """Train the classifier of every head on the features that the model has before its first step.

    The model must not be wrapped yet. All processes compute a share of the features; every classifier is then the same
    on all of them. The adapters start at zero, so these are the features of the pre-trained model. A head of several
    layers keeps all but its last one as they are; a model with two heads gets a probe for each.

    Returns:
        The accuracy of the probe on the training images, in %: the mean over the heads.

    Raises:
        ValueError: a head without a Linear that gives the classes, or one whose input is not [B, d].
    """
    heads = dict(classifiers_of(run.model))
    if not heads:
        raise ValueError(
            f"head_init='probe' needs a head that ends in an nn.Linear, but that of {type(run.model).__name__} does not"
        )
    labels = torch.tensor(run.data.train.labels, device=run.accelerator.device)
    right = []
    for head, x in zip(heads.values(), _features(run, heads)):
        weight, bias = fitted(x, labels, head, recipe, run.settings.seed)
        with torch.no_grad():
            head.weight.copy_(weight)
            if head.bias is not None:
                head.bias.copy_(bias)
            for p in head.parameters() if run.accelerator.num_processes > 1 else ():
                torch.distributed.broadcast(p.data, 0)  # features may differ by rounding between devices
            right.append((F.linear(x, weight, bias).argmax(1) == labels).double().mean().item())
    found = 100 * sum(right) / len(right)
    if run.main:
        log.info(f"the head starts as a linear probe: top-1 {found:.2f} % of the training images")
    return found


@torch.no_grad()
def _features(run: Prepared, heads: dict[str, nn.Linear]) -> list[Tensor]:
    """The inputs [N, d] of these Linears for all training images, float32, or float64 for such a model."""
    accelerator = run.accelerator
    rank, world, n = accelerator.process_index, accelerator.num_processes, len(run.data.train)
    seen = {path: [] for path in heads}

    def keep(path: str):
        def hook(module: nn.Module, args) -> None:
            seen[path].append(args[0] if args[0].dtype == torch.float64 else args[0].float())

        return hook

    hooks = [head.register_forward_pre_hook(keep(path)) for path, head in heads.items()]
    training = run.model.training
    run.model.eval()
    try:
        for batch in _batches(run, [min(i, n - 1) for i in range(rank, -(-n // world) * world, world)]):
            with accelerator.autocast():
                logits(run.model, run.normalise(batch))
    finally:
        for hook in hooks:
            hook.remove()
        run.model.train(training)
    found = []
    for path, parts in seen.items():
        if not parts or any(part.dim() != 2 for part in parts):
            shape = list(parts[0].shape) if parts else "nothing"
            raise ValueError(f"head_init='probe' needs a head whose {path} gets features [B, d], got {shape}")
        x = torch.cat(parts)
        # of each process the images rank, rank + world, ...; back in their order
        x = accelerator.gather(x).unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[:n]
        if len(x) != n:
            raise ValueError(f"head_init='probe' needs a head that calls {path} once, got {len(x)} features of {n}")
        found.append(x)
    return found


def _batches(run: Prepared, order: list[int]) -> Iterator[Tensor]:
    size = run.settings.batch_size // (run.settings.accumulate * run.accelerator.num_processes)
    sampler = [order[at : at + size] for at in range(0, len(order), size)]
    workers = 0 if run.data.train.kept is not None else run.settings.workers
    for images, _ in torch.utils.data.DataLoader(run.data.train, batch_sampler=sampler, **reading(workers)):
        yield images


def fitted(x: Tensor, labels: Tensor, head: nn.Linear, recipe: Probe, seed: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a probe for the classes of this head, with the scaling of the features folded in."""
    mean = x.mean(0) if head.bias is not None else torch.zeros_like(x[0])  # without a bias nothing can be shifted
    deviation = x.std(0, correction=0) + 1e-6
    scaled = (x - mean) / deviation
    probe = nn.Linear(x.shape[1], head.out_features, head.bias is not None, device=x.device, dtype=x.dtype)
    for p in probe.parameters():
        nn.init.zeros_(p)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    size = min(recipe.batch_size, len(x))
    steps = len(x) // size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(recipe.epochs):
            for rows in torch.randperm(len(x), generator=generator).split(size)[:steps]:
                rows = rows.to(x.device)
                F.cross_entropy(probe(scaled[rows]), labels[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    with torch.no_grad():
        weight = probe.weight / deviation
        return weight, None if probe.bias is None else probe.bias - weight @ mean
