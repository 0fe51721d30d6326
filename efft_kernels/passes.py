"""One forward of an injected model: how its Linears get their (down, up) from the groups that the model owns."""

import contextlib
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from .base_linears import computes_in
from .low_rank import Pair
from .ops import know
from .ops.dispatch import at_end_of_backward, graph_task
from .wrappers import module_at


class _Pass:
    """One forward of the model: its pairs, whose they are, and the Linears that ran in it without recording a graph."""

    def __init__(self, pairs: dict[str, Pair], recorded: bool, active: str | None):
        self.pairs, self.recorded, self.active = pairs, recorded, active
        self.unrecorded: set[str] = set()
        self.reached = False  # whether a backward has run one of those again, or gave a pair a gradient
        self.switches = 0  # of the active adapter, before a backward came here


class _Watched(dict):
    """The pairs of a forward, and which of them a Linear has asked for."""

    def __init__(self, pairs: dict[str, Pair]):
        super().__init__(pairs)
        self.asked: set[str] = set()

    def get(self, path: str) -> Pair | None:
        self.asked.add(path)
        return super().get(path)


class _Thread(threading.local):
    """The forward that this thread is in, of one model."""

    current: _Pass | None = None


# (id of a backward, id of a model's Passes) -> the forward that it recomputes, kept alive by the graph of its output
_replays: weakref.WeakValueDictionary[tuple[int, int], _Pass] = weakref.WeakValueDictionary()
_OTHER = "another adapter is active than in the forward, "


class Passes:
    """How the Linears of a model get their (down, up), by path.

    A hook before the model's forward computes the pairs of all groups at once and stores them here; each Linear looks
    up its own by path; a hook after the forward removes them, so no pair outlives the factors, dropout masks and grad
    mode it was made of. Every forward with gradients makes its own pairs, so accumulation, several forwards before a
    backward, and optimizer steps in between need no further care. A Linear that runs outside the model's forward
    (``forward_features``, one block) computes its own pair, with a separate graph.

    Backward may run Linears again, to recompute a checkpointed block: when a gradient reaches the output of a forward,
    its pairs are restored for the rest of that backward, so that the recomputation sees the same factors and masks. A
    gradient that reaches checkpointed blocks but not the output, as from a loss on features that a hook took out of
    them, restores nothing, and torch then reports that the recomputation differs from the forward.
    ``loss + 0 * output.sum()`` avoids this.

    The first forward of each mode is watched: a Linear that it did not call, because a wrapper or a patched forward
    bypasses it, would be adapted in name only.

    Nothing is cached from one forward to the next, because a factor may change without a trace. Several threads may
    run, and train, one model at the same time: each has its own forward.
    """

    backend: str | None
    active: str | None  # None: nothing is added anywhere
    switches = 0  # of the active adapter, so far
    watched: set  # modes of which a forward was watched, and sets of Linears about which a warning was given

    def groups(self) -> list[nn.Module]:
        """The groups whose pairs the model uses now."""
        raise NotImplementedError

    def _reset(self) -> None:
        self._thread = _Thread()
        # Dynamo cannot trace thread-locals; it compiles in one thread at a time, so an attribute is enough
        self._traced: _Pass | None = None

    @property
    def _pass(self) -> _Pass | None:
        """the forward under way"""
        return self._traced if torch.compiler.is_compiling() else self._thread.current

    def _enter(self, now: _Pass | None) -> None:
        if torch.compiler.is_compiling():
            self._traced = now
        else:
            self._thread.current = now

    @property
    def _replay(self) -> tuple[int, _Pass | None]:
        """(the backward under way, the forward that it recomputes)"""
        task = graph_task()
        return task, _replays.get((task, id(self)))

    def linear_at(self, model: nn.Module, path: str) -> nn.Linear:
        """The Linear of the model at this path.

        Raises:
            AttributeError: the model has none there any more.
        """
        return module_at(model, path)

    def dtype_for(self, linear: nn.Linear) -> torch.dtype | None:
        """The dtype in which this Linear takes its pair; None for that of the factors."""
        return computes_in(linear)

    def pair(self, path: str, linear: nn.Linear) -> Pair | None:
        """What the Linear at this path adds now, or None."""
        now = self._traced if torch.compiler.is_compiling() else self._thread.current
        if now is not None and now.recorded and torch.is_grad_enabled():
            return now.pairs.get(path)  # a training step: once for every Linear
        return self._other_pair(now, path, linear)

    def _other_pair(self, now: _Pass | None, path: str, linear: nn.Linear) -> Pair | None:
        """without gradients, in a recomputation, or outside of a forward of the model"""
        inside, tracing = now is not None, torch.compiler.is_compiling()
        if not inside and not tracing:
            now = self._replay[1]
        # a forward without gradients, in another thread or around an enable_grad(), has no pairs to train with
        if now is None or (inside and now.pairs and not now.recorded and self._recording()):
            return self._own_pair(path, linear)
        if now.recorded and not tracing:
            if inside and not torch.is_grad_enabled():
                now.unrecorded.add(path)
            elif not inside and path in now.unrecorded:
                # recorded only now, in backward: reentrant checkpointing, whose graph must not share the forward's
                if now.active != self.active:
                    raise RuntimeError(
                        f"{_OTHER}whose gradient reentrant checkpointing cannot compute: use use_reentrant=False"
                    )
                if any(group.drops for group in self.groups()):
                    raise RuntimeError(
                        "factor dropout cannot be reproduced under reentrant checkpointing: use use_reentrant=False, "
                        "or factor_dropout=0 and rank_dropout=0"
                    )
                now.reached = True
                return self._own_pair(path, linear)
        return now.pairs.get(path)

    def _own_pair(self, path: str, linear: nn.Linear) -> Pair | None:
        for group in self.groups():
            if path in group.slots:
                return group.low_rank_pairs(self.backend, path, self.dtype_for(linear))[path]
        return None

    def _recording(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for group in self.groups() for p in group.parameters())

    def begin(self, model: nn.Module) -> None:
        """Store the pair of every Linear of the active adapter, by path, for a forward of the model.

        They are in the dtype of the group's first Linear, so that no Linear casts its own.

        Raises:
            RuntimeError: the model is a replica of nn.DataParallel, or a backward recomputes a forward of all of it in
                which another adapter was active.
        """
        tracing = torch.compiler.is_compiling()
        again = None if tracing else self._replay[1]
        # also a forward that adds nothing may be recomputed
        self._enter(None if tracing else _Pass({}, False, self.active))
        # a program that switches adapters within the backward knows what it does
        other = again is not None and again.active != self.active and again.switches == self.switches
        if other and torch.is_grad_enabled():
            raise RuntimeError(
                f"{_OTHER}and a forward of the whole model within a backward is taken for its recomputation: "
                "checkpoint the blocks instead"
            )
        if groups := self.groups():
            if not tracing and "_is_replica" in vars(model):
                raise RuntimeError(
                    f"this {type(model).__name__} is a replica of nn.DataParallel, which does not give it the factors: "
                    "use DistributedDataParallel, or make one GPU visible"
                )
            if torch.is_grad_enabled() and not tracing:
                know(model)  # the norms whose results may be rebuilt in the backward
            pairs = {}
            for group in groups:
                pairs.update(group.low_rank_pairs(self.backend, dtype=self._dtype_of(group, model)))
            if not tracing and _mode(model) not in self.watched:
                pairs = _Watched(pairs)
            # a compiler would make a graph for each name that it reads
            self._enter(_Pass(pairs, self._recording(), None if tracing else self.active))

    def _dtype_of(self, group: nn.Module, model: nn.Module) -> torch.dtype | None:
        for path in group.slots:
            try:
                return self.dtype_for(self.linear_at(model, path))
            except AttributeError:  # the block was removed from the model
                continue
        return None

    def end(self, model: nn.Module, output) -> None:
        """Remove the pairs, and restore them when a gradient reaches the output, which is None after an error.

        Raises:
            RuntimeError: an adapted Linear was not called, because a forward set on the instance replaced its own.

        Warns:
            UserWarning: adapted Linears were not called, once for the same ones.
        """
        done = self._pass
        self._enter(None)
        if done is None or torch.compiler.is_compiling():
            return
        if isinstance(done.pairs, _Watched) and output is not None:
            self._check_called(model, done.pairs)
        if done.unrecorded and len(done.unrecorded) == len(done.pairs):
            for t in (t for pair in done.pairs.values() for t in pair[:2] if t.requires_grad):
                t.register_hook(partial(_reach, done))
        for t in _tensors(output):
            if t.grad_fn is not None:  # not a parameter or an input, which keeps its hooks
                t.register_hook(partial(self._restore, done))

    def _check_called(self, model: nn.Module, pairs: _Watched) -> None:
        left = [path for path in pairs if path not in pairs.asked]
        for path in left:
            with contextlib.suppress(AttributeError):
                if "forward" in vars(self.linear_at(model, path)):
                    raise RuntimeError(
                        f"the forward set on the instance {path} does not call the one that it replaced, so the "
                        "adapter has no effect there; remove it, or call that one"
                    )
        self.watched.add(_mode(model))
        if left and frozenset(left) not in self.watched:
            self.watched.add(frozenset(left))
            more = f" and {len(left) - 1} more adapted Linears" if len(left) > 1 else ""
            warnings.warn(
                f"the forward of this {type(model).__name__} did not call {left[0]}{more}, so their updates had no "
                "effect: something replaced or bypasses them",
                stacklevel=5,
            )

    def _restore(self, done: _Pass, grad: Tensor) -> None:
        task, replayed = self._replay
        if replayed is None:
            at_end_of_backward(self._end_of_backward)
        done.switches = self.switches
        _replays[task, id(self)] = done

    def _end_of_backward(self) -> None:
        done = _replays.pop((graph_task(), id(self)), None)
        if done is None or done.reached or not done.unrecorded or len(done.unrecorded) < len(done.pairs):
            return
        if "unrecorded" not in self.watched:
            self.watched.add("unrecorded")
            warnings.warn(
                "the factors got no gradient: all adapted Linears ran without a graph, and this backward did not run "
                "them again; reentrant checkpointing needs an input that requires grad, use_reentrant=False does not",
                stacklevel=2,
            )


class Adapters(Passes, nn.ModuleDict):
    """The adapters of one model, by name: each a ModuleDict of groups. Registered on the model, once, as ``efft``."""

    def __init__(self, backend: str | None = None, frozen_norms: tuple[nn.Module, ...] = ()):
        super().__init__()
        self.backend = backend
        self.active = None
        self.frozen_norms = frozen_norms  # batch norms that stay in eval mode; a tuple does not register them
        self.trained: tuple[str, ...] = ()  # paths of modules that are trained in full, beside the head
        self.requires_grad_before: dict[str, bool] = {}  # of the model's parameters, before it was injected
        self.hooks: tuple = ()  # on the model, around its forward
        self.watched = set()
        self.modules_before: dict[str, nn.Module] = {}  # path -> what is trained with the factors, as it was before
        self.told_before: dict[tuple[str, str], dict] = {}  # the number and names of the classes, where they are kept
        self.swapped = 0  # how many contexts have put these in place now
        self._late_hooks: dict[str, list] = {}  # of frozen adapters that outputs may still depend on
        self.left_at: dict[str, list[float]] = {}  # adapter -> sums of what all share, when another became active
        self._reset()

    def activate(self, name: str) -> None:
        """Make an adapter the active one, whose factors are trained, and freeze those of the others."""
        for other, groups in self.items():
            if other == name:
                for handle in self._late_hooks.pop(other, ()):
                    handle.remove()
            elif trained := [p for p in groups.parameters() if p.requires_grad]:
                self._late_hooks[other] = [handle for p in trained for handle in _take_late_gradients(p)]
            groups.requires_grad_(other == name)
        self.active = name

    def forward(self, x):
        """x itself: a model that is an nn.Sequential calls all its modules, this one too."""
        return x

    def train(self, mode: bool = True) -> "Adapters":
        super().train(mode)
        for module in self.frozen_norms:
            module.eval()
        return self

    def __getstate__(self) -> dict:
        # tensors with a graph, thread-locals and hooks can be neither copied nor pickled
        return {key: value for key, value in self.__dict__.items() if key not in ("_traced", "_thread", "_late_hooks")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({"told_before": {}} | state)  # which a pickle of an earlier version does not have
        self._late_hooks = {}
        self._reset()

    def groups(self) -> list[nn.Module]:
        """The groups of the active adapter."""
        return self._groups

    @property
    def active(self) -> str | None:
        """Name of the active adapter; None if none is."""
        return self._active

    @active.setter
    def active(self, name: str | None) -> None:
        # the groups, too: torch.compile would make a graph for each name that it reads, but not for equal groups
        self.switches += 1
        self._active, self._groups = name, [] if name is None else list(self[name].values())


def _take_late_gradients(p: nn.Parameter) -> tuple:
    """Let a parameter that is about to be frozen accumulate gradients of outputs that were computed before."""
    parameter = weakref.ref(p)

    def thaw(grad: Tensor) -> None:
        parameter().requires_grad_(True)  # autograd drops the gradient of a leaf that does not require it

    return p.register_hook(thaw), p.register_post_accumulate_grad_hook(lambda p: p.requires_grad_(False))


def _reach(done: _Pass, grad: Tensor) -> None:
    done.reached = True


def _mode(model: nn.Module) -> tuple[bool, bool]:
    return model.training, torch.is_grad_enabled()


def _tensors(tree, depth: int = 8) -> Iterator[Tensor]:
    """the tensors in an output, also in the attributes of objects, which may form circles"""
    if isinstance(tree, Tensor):
        yield tree
    elif depth and not isinstance(tree, nn.Module | type):
        inside = tree if isinstance(tree, Mapping | list | tuple) else getattr(tree, "__dict__", {})
        for branch in inside.values() if isinstance(inside, Mapping) else inside:
            yield from _tensors(branch, depth - 1)
