"""The Linears of an injected model, and how each gets its (down, up) from the groups that the model owns."""

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .factors import Pair
from .ops import lowrank_linear


class _Pass:
    """One forward of the model: its pairs, and the layers that ran in it without recording a graph."""

    def __init__(self, pairs: dict[str, Pair], recorded: bool):
        self.pairs, self.recorded = pairs, recorded
        self.unrecorded: set[str] = set()


class Adapters(nn.ModuleDict):
    """The adapters of one model, by name: each a ModuleDict of groups. Registered on the model, once, as ``efft``.

    How a layer gets its (down, up). A hook before the model's forward computes the pairs of all groups at once and
    lays them out here; the AdaptedLinears pick theirs up by path; a hook after the forward takes them away, so nothing
    outlives the factors, dropout masks and grad mode it was made of. Every forward with gradients makes its own pairs:
    accumulation, several forwards before a backward, and optimizer steps in between need no further care. A layer that
    runs outside the model's forward (``forward_features``, one block) computes its own pair, with a graph of its own.
    Backward may run layers again, to recompute a checkpointed block: when a gradient reaches the output of a forward,
    its pairs are laid out for the rest of that backward, so that the recomputation sees the same factors and masks.
    Without gradients and dropout the pairs are kept until a factor is another tensor or has another version. Writes
    through ``.data`` and fused optimizers leave no trace in the version: so ``train()`` and ``eval()`` forget pairs,
    and none are kept from a forward with gradients to the next of these calls, or while a factor has a ``.grad``.
    """

    def __init__(self, backend: str | None = None, still: tuple[nn.Module, ...] = ()):
        super().__init__()
        self.backend = backend
        self.active: str | None = None
        self.still = still  # modules that stay in eval mode: frozen batch norms; a tuple does not register them
        self.flags: dict[str, bool] = {}  # which parameters of the model were trained before it was injected
        self.hooks: tuple = ()  # on the model, around its forward
        self._forget()

    def _forget(self) -> None:
        self._pass = None  # of the forward under way
        self._replay = (-1, None)  # (backward, the forward that it recomputes)
        self._kept = None  # (what they depend on, pairs)
        self._settled = True  # no forward with gradients since the last train() or eval()

    def train(self, mode: bool = True) -> "Adapters":
        super().train(mode)
        self._kept, self._settled = None, True
        for module in self.still:
            module.eval()
        return self

    def __getstate__(self) -> dict:
        # tensors with a graph can be neither copied nor pickled
        return {**self.__dict__, "_pass": None, "_replay": (-1, None), "_kept": None}

    def groups(self) -> list[nn.Module]:
        """of the active adapter"""
        return [] if self.active is None else list(self[self.active].values())

    def pair(self, path: str) -> Pair | None:
        """What the Linear at this path adds now, or None."""
        now = self._pass
        if now is None and self.active is not None and not torch.compiler.is_compiling():
            task, replayed = self._replay
            now = replayed if task != -1 and task == torch._C._current_graph_task_id() else None
        if now is None:
            return self._alone(path)
        if now.recorded and not torch.compiler.is_compiling():
            if self._pass is not None and not torch.is_grad_enabled():
                now.unrecorded.add(path)
            elif self._pass is None and path in now.unrecorded:
                # recorded only now, in backward: reentrant checkpointing, whose graph must not share the forward's
                if any(group.drops for group in self.groups()):
                    raise RuntimeError(
                        "factor dropout cannot be reproduced under reentrant checkpointing: use use_reentrant=False, "
                        "or factor_dropout=0"
                    )
                return self._alone(path)
        return now.pairs.get(path)

    def _alone(self, path: str) -> Pair | None:
        for group in self.groups():
            if path in group.slots:
                if self._constant():
                    return self.pairs()[path]
                self._settled = False
                return group.hand_out([group.slots[path]], self.backend)[path]
        return None

    def _constant(self) -> bool:
        """whether the pairs are a function of the factors alone, and no graph is needed"""
        return not any(group.drops for group in self.groups()) and not self._recording()

    def _recording(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for group in self.groups() for p in group.parameters())

    def pairs(self, keep: bool = True) -> dict[str, Pair]:
        """path -> pair of every Linear of the active adapter, kept for the next call where they cannot have changed."""
        groups = self.groups()
        if not self._constant():
            self._settled = False
        keep = keep and not torch.compiler.is_compiling() and self._settled
        factors = [t for group in groups for t in (*group.parameters(), *group.buffers())] if keep else []
        # a CUDA graph must contain the update, and an inference tensor has no version
        if not factors or any(t.is_inference() or t.grad is not None for t in factors) or _capturing():
            return {path: pair for g in groups for path, pair in g.hand_out(g.slots.values(), self.backend).items()}
        device = factors[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        mode = self.active, autocast, torch.is_inference_mode_enabled()
        stamp = [(t, t.data_ptr(), t._version) for t in factors]
        if self._kept is not None:
            old_mode, old_stamp, _, pairs = self._kept
            if mode == old_mode and all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(stamp, old_stamp)):
                return pairs
        pairs = {path: pair for g in groups for path, pair in g.hand_out(g.slots.values(), self.backend).items()}
        # the third entry keeps the old memory, so that no new factor can come to lie at the same address
        self._kept = mode, stamp, [t.detach() for t in factors], pairs
        return pairs

    def begin(self, keep: bool) -> None:
        """Lay out the pairs for a forward of the model. keep: whether versions can be trusted."""
        self._replay = (-1, None)
        if self.active is not None:
            self._pass = _Pass(self.pairs(keep), self._recording())

    def end(self, output) -> None:
        """Take them away, and bring them back when a gradient reaches the output."""
        done, self._pass = self._pass, None
        if done is not None and done.recorded and not torch.compiler.is_compiling():
            for t in _tensors(output):
                if t.requires_grad:
                    t.register_hook(partial(self._bring_back, done))

    def _bring_back(self, done: _Pass, grad: Tensor) -> None:
        self._replay = (torch._C._current_graph_task_id(), done)


class AdaptedLinear(nn.Linear):
    """A Linear of an injected model: y = x @ weight.T + bias + (x @ down) @ up, where its model's Adapters say.

    Made by changing the class of an nn.Linear: its parameters, names, hooks and whoever refers to it stay as they are.
    """

    @staticmethod
    def adopt(linear: nn.Linear, path: str, adapters: Adapters) -> None:
        linear.__class__ = AdaptedLinear
        linear.efft = (adapters, path)  # a tuple, which registers nothing

    def release(self) -> None:
        """Back to the nn.Linear it was."""
        del self.efft
        self.__class__ = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        adapters, path = self.efft
        pair = adapters.pair(path)
        if pair is None:
            return F.linear(x, self.weight, self.bias)
        down, up, dropout = pair
        if down.dtype != self.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            down, up = down.to(self.weight.dtype), up.to(self.weight.dtype)
        if dropout and self.training:
            return F.linear(x, self.weight, self.bias) + F.dropout(x @ down, dropout) @ up
        return lowrank_linear(x, self.weight, self.bias, down, up, backend=adapters.backend)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, adapted={self.efft[0].active!r}"


def _tensors(tree):
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for branch in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _tensors(branch)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
