"""One forward of an injected model: how its Linears get their (down, up) from the groups that the model owns."""

import threading
from collections.abc import Mapping
from functools import partial
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn

from .groups import Pair


class _Pass:
    """One forward of the model: its pairs, and the layers that ran in it without recording a graph."""

    def __init__(self, pairs: dict[str, Pair], recorded: bool):
        self.pairs, self.recorded = pairs, recorded
        self.unrecorded: set[str] = set()


class _Here(threading.local):
    """Of each thread: the forward that it is in, by model."""

    def __init__(self):
        self.passes: WeakKeyDictionary[Passes, _Pass] = WeakKeyDictionary()


_here = _Here()
# (backward, id of a model's Passes) -> the forward that it recomputes; the graph of that one's output keeps it
_replays: WeakValueDictionary[tuple[int, int], _Pass] = WeakValueDictionary()


class Passes:
    """How the layers of a model get their (down, up), by path.

    A hook before the model's forward computes the pairs of all groups at once and lays them out here; the layers pick
    theirs up by path; a hook after the forward takes them away, so nothing outlives the factors, dropout masks and grad
    mode it was made of. Every forward with gradients makes its own pairs: accumulation, several forwards before a
    backward, and optimizer steps in between need no further care. A layer that runs outside the model's forward
    (``forward_features``, one block) computes its own pair, with a graph of its own. Backward may run layers again, to
    recompute a checkpointed block: when a gradient reaches the output of a forward, its pairs are laid out for the rest
    of that backward, so that the recomputation sees the same factors and masks. A gradient that reaches checkpointed
    blocks and not the output, as of a loss on features that a hook took out of them, brings nothing back: torch then
    says that the recomputation differs from the forward. ``loss + 0 * output.sum()`` is the way round.
    Nothing is kept from one forward to the next: a factor may change in ways that leave no trace. Several threads may
    run, and train, one model at the same time: each has a forward of its own.
    """

    backend: str | None
    active: str | None  # None: nothing is added anywhere

    def groups(self) -> list[nn.Module]:
        """what hands out pairs now"""
        raise NotImplementedError

    def _forget(self) -> None:
        self._traced: _Pass | None = None

    @property
    def _pass(self) -> _Pass | None:
        """of the forward under way"""
        # the compiler knows attributes, but no threads; it traces in one of them at a time
        return self._traced if torch.compiler.is_compiling() else _here.passes.get(self)

    def _enter(self, now: _Pass | None) -> None:
        if torch.compiler.is_compiling():
            self._traced = now
        elif now is None:
            _here.passes.pop(self, None)
        else:
            _here.passes[self] = now

    @property
    def _replay(self) -> tuple[int, _Pass | None]:
        """(the backward under way, the forward that it recomputes)"""
        task = torch._C._current_graph_task_id()
        return task, _replays.get((task, id(self)))

    def pair(self, path: str) -> Pair | None:
        """What the Linear at this path adds now, or None."""
        now = self._pass
        if now is None and self.active is not None and not torch.compiler.is_compiling():
            now = self._replay[1]
        # a forward without gradients, in another thread or around an enable_grad(), has no pairs to train with
        if now is None or not now.recorded and self._recording():
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
                return group.low_rank_pairs([group.slots[path]], self.backend)[path]
        return None

    def _recording(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for group in self.groups() for p in group.parameters())

    def begin(self) -> None:
        """Lay out path -> pair of every Linear of the active adapter for a forward of the model."""
        self._enter(None)
        if self.active is not None:
            pairs = {
                path: pair for g in self.groups() for path, pair in g.low_rank_pairs(g.slots.values(), self.backend).items()
            }
            self._enter(_Pass(pairs, self._recording()))

    def end(self, output) -> None:
        """Take them away, and bring them back when a gradient reaches the output."""
        done = self._pass
        self._enter(None)
        if done is not None and done.recorded and not torch.compiler.is_compiling():
            for t in _tensors(output):
                if t.requires_grad:
                    t.register_hook(partial(self._bring_back, done))

    def _bring_back(self, done: _Pass, grad: Tensor) -> None:
        task, replayed = self._replay
        if replayed is None:
            torch.autograd.Variable._execution_engine.queue_callback(self._let_go)
        _replays[task, id(self)] = done

    def _let_go(self) -> None:
        """at the end of a backward"""
        _replays.pop((torch._C._current_graph_task_id(), id(self)), None)


class Adapters(Passes, nn.ModuleDict):
    """The adapters of one model, by name: each a ModuleDict of groups. Registered on the model, once, as ``efft``."""

    def __init__(self, backend: str | None = None, still: tuple[nn.Module, ...] = ()):
        super().__init__()
        self.backend = backend
        self.active: str | None = None
        self.still = still  # modules that stay in eval mode: frozen batch norms; a tuple does not register them
        self.flags: dict[str, bool] = {}  # which parameters of the model were trained before it was injected
        self.hooks: tuple = ()  # on the model, around its forward
        self._forget()

    def train(self, mode: bool = True) -> "Adapters":
        super().train(mode)
        for module in self.still:
            module.eval()
        return self

    def __getstate__(self) -> dict:
        # tensors with a graph can be neither copied nor pickled
        return {**self.__dict__, "_traced": None}

    def groups(self) -> list[nn.Module]:
        """of the active adapter"""
        return [] if self.active is None else list(self[self.active].values())


def _tensors(tree):
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for branch in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _tensors(branch)
