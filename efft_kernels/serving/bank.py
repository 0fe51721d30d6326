"""AdapterBank: many adapters of one base model, a different one for each sample of a batch, in one pass."""

import contextlib
import functools
import itertools
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapted_linear import AdaptedLinear, adapted_class
from ..adapter_file import write
from ..attention import Projection, with_projections
from ..base_linears import change_class
from ..calls import call_linear, uncall_linear
from ..dora import gain, scaled
from ..inject import check_bare
from ..layouts import classifiers_of, head_state
from ..low_rank import Pair, stack
from ..ops import check_backend, lowrank_linear, mixed_linear
from ..ops.dispatch import graph_task
from ..passes import Passes
from ..precision import check_factor_dtype
from ..preparation import Preparation
from ..wrappers import check_module, module_at, named_modules, named_parameters, unwrapped
from .batch_dims import Trial, batch_dim, markable
from .loading import Adapter, check_plain, load

# the uses that this thread or asyncio task has entered and not left, innermost last
_trial = threading.Lock()
_uses: ContextVar[tuple["_Use | Trial", ...]] = ContextVar("efft_kernels_uses", default=())


class AdapterBank:
    """Any number of adapters of one model, for batches in which each sample has its own adapter.

    >>> bank = AdapterBank(model)
    >>> bank.add("birds", "birds.safetensors")
    >>> bank.add("cars", "cars.safetensors")
    >>> with torch.no_grad(), bank.use(["birds", None, "cars"]):
    ...     logits = model(images)  # three images: two with an adapter, one without

    The Linears of the model compute y = x W + b + (x @ down) @ up with the pair of each sample's adapter
    (:func:`efft_kernels.mixed_linear`): one forward for the whole batch, however many adapters are in it. Outside of
    :meth:`use` the model computes what it did before.

    Adapters of one batch are of one :meth:`kind`; rank, scale and number of classes may differ. Logits of a batch have
    the largest number of classes among its samples; classes that a sample does not have are -inf. A sample whose
    adapter brought no head gets the model's.

    Adapters may be added and removed while other threads compute: a use keeps the adapters it started with. Threads and
    asyncio tasks may each have their own use of the model at the same time.

    Gradients reach the factors and heads of all adapters in a batch; pass :meth:`parameters` to an optimizer. The model
    itself is frozen. Moving the model to another device or dtype does not move the bank's adapters: add them
    afterwards. Under torch.compile the graph breaks at every adapted Linear, with the same results; fullgraph=True does
    not work.

    Args:
        model: a plain model, as for :func:`efft_kernels.inject`. It is changed in place: its parameters are frozen, and
            it computes mixed batches. :meth:`release` undoes both.
        backend: a name from :func:`efft_kernels.backends`, or None for the fastest proven one.
        factor_dtype: of the factors of every adapter, as for :func:`efft_kernels.inject`. The dtype of the weights
            takes less memory and casts nothing in a forward, which suits adapters that are not trained.

    Raises:
        TypeError: model is no nn.Module, or factor_dtype no floating-point dtype that factors can have.
        ValueError: the model is injected, merged, or belongs to another bank; an unknown backend.
    """

    def __init__(self, model: nn.Module, *, backend: str | None = None, factor_dtype: torch.dtype = torch.float32):
        check_backend(backend)
        check_factor_dtype(factor_dtype)
        check_module(model)
        model = unwrapped(model)
        check_bare(model)
        self.model, self.backend, self.factor_dtype = model, backend, factor_dtype
        self._adapters: dict[str, Adapter] = {}
        self._changed: list[AdaptedLinear] = []  # Linears whose class was changed
        self.watched: set = set()  # as for Passes
        self._batch_dims: dict[str, int | None] | None = {}  # of a Linear's input, by path
        self._tried = 0  # Linears that there were when these were found
        self._replays = weakref.WeakValueDictionary()  # id of a backward -> the use whose forward it recomputes
        self._lock = threading.Lock()
        self._requires_grad_before = {key: p.requires_grad for key, p in named_parameters(model)}
        model.requires_grad_(False)
        for path, linear in classifiers_of(model):
            if type(linear) is nn.Linear:
                self._adopt(linear, path, _Head)
        self._hooks = (
            model.register_forward_pre_hook(_before, with_kwargs=True),
            model.register_forward_hook(_after, always_call=True),
        )
        model.efft = self  # the bank is not a Module, so nothing is registered

    def __getstate__(self) -> dict:
        return {key: None if key in ("_lock", "_replays") else v for key, v in vars(self).items() if key != "_plain"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _replays=weakref.WeakValueDictionary())

    @functools.cached_property
    def _plain(self) -> "_Use":
        """Of forwards outside of every use, which a backward within one may recompute."""
        return _Use(self, [], [])

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def __repr__(self) -> str:
        return f"AdapterBank({type(self.model).__name__}, {len(self)} adapters, {self.bytes():,} bytes)"

    @property
    def names(self) -> list[str]:
        """Names of the adapters in the order in which they were added."""
        with self._lock:
            return list(self._adapters)

    def read(self, source: str | PathLike | nn.Module, *, strict: bool = False) -> Adapter:
        """An adapter for :meth:`add`, which is not yet in the bank; ``bytes()`` says how much memory it takes."""
        with torch.inference_mode(False), torch.no_grad():
            return load(self.model, source, self.factor_dtype, strict)

    def add(self, name: str, source: str | PathLike | nn.Module | Adapter, *, strict: bool = False) -> None:
        """Add an adapter to the bank, with its head if it has one.

        Args:
            name: the name for :meth:`use`.
            source: a file of :func:`efft_kernels.save_adapter`, what :meth:`read` gave, or an injected model. The
                active adapter of a model is copied, with its head if the head is trained.
            strict: as for :func:`efft_kernels.load_adapter`.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError: source or name has another type.
            ValueError: the name is taken; the file is not an adapter file; the adapter or its head does not fit the
                model or, if strict, was trained on other weights or images; or a Linear of the model is quantized,
                parametrized or weight-normed. The bank is unchanged then.
            RuntimeError: the bank has released its model.
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {type(name).__name__}")
        if not name:
            raise ValueError("name must not be empty")
        self._check_not_released()
        self._check_name_free(name)
        adapter = source if isinstance(source, Adapter) else self.read(source, strict=strict)
        if adapter.model is not self.model:
            what = type(adapter.model).__name__
            raise ValueError(f"source must be an adapter that a bank of this model has read, got one of another {what}")
        paths = [path for group in adapter.groups.values() for path in group.slots]
        for path in paths:
            check_plain(module_at(self.model, path), path, repr(name))
        with self._lock:
            self._check_name_free(name)
            for path in paths:
                linear = module_at(self.model, path)
                if not isinstance(linear, AdaptedLinear):
                    self._adopt(linear, path, _Linear)
                    call_linear(self.model, path)
            self._adapters[name] = adapter

    def remove(self, name: str) -> None:
        """Remove an adapter. A use that has started keeps it; its memory is freed when the last one has ended.

        Raises:
            ValueError: there is no adapter of this name.
        """
        with self._lock:
            self._find(name)
            del self._adapters[name]

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The trained factors of an adapter and its head, always the same objects; errors as :meth:`classes`."""
        return self._find(name).parameters()

    def classes(self, name: str | None) -> int | None:
        """Number of classes of an adapter, or for None of the model; None for a model without a head.

        Raises:
            ValueError: there is no adapter of this name.
        """
        heads = {} if name is None else self._find(name).heads
        heads = heads or dict(classifiers_of(self.model))
        return next((linear.out_features for linear in heads.values()), None)

    def kind(self, name: str) -> str:
        """A digest of what adapters of one batch have in common, method and Linears; errors as :meth:`classes`."""
        return self._find(name).kind

    def preparation(self, name: str) -> Preparation | None:
        """How an adapter's file says that images are to be prepared; None if it does not; errors as :meth:`classes`."""
        return self._find(name).groups.preparation

    def multilabel(self, name: str) -> bool:
        """Whether an adapter's file says that an image may have several classes; errors as :meth:`classes`."""
        return self._find(name).groups.multilabel

    def labels(self, name: str) -> tuple[str, ...] | None:
        """Names of an adapter's classes as its file states them; None if it does not; errors as :meth:`classes`."""
        return self._find(name).groups.classes

    def bytes(self, name: str | None = None) -> int:
        """Bytes of an adapter, or of all: factors and heads, without gradients and without the model.

        Raises:
            ValueError: there is no adapter of this name.
        """
        if name is not None:
            return self._find(name).bytes()
        with self._lock:
            return sum(adapter.bytes() for adapter in self._adapters.values())

    def save(self, name: str, path: str | PathLike) -> None:
        """Write an adapter to a file, atomically, for :func:`efft_kernels.load_adapter` and :meth:`add`.

        Raises:
            ValueError: there is no adapter of this name.
            OSError: the file cannot be written. An existing one is unchanged then.
        """
        adapter = self._find(name)
        head = head_state(self.model) if adapter.heads else {}
        for key, linear in adapter.heads.items():
            head |= {f"{key}.{part}": t for part, t in linear.state_dict().items()}
        said = {key: getattr(adapter.groups, key) for key in ("preparation", "classes", "multilabel")}
        write(path, self.model, adapter.groups, head, adapter.base_model, **said)

    @contextlib.contextmanager
    def use(self, ids: Sequence[str | None]) -> Iterator["AdapterBank"]:
        """Within this context, the model applies to each sample its own adapter, in this thread or asyncio task.

        Args:
            ids: for each sample of the batch, the name of an adapter, or None for no adapter.

        Raises:
            TypeError: ids is a string or not a sequence.
            ValueError: a name is not in the bank, or the adapters are of more than one :meth:`kind`. The model's
                forward raises it too, before it computes anything, for a batch of another size; and a Linear, by its
                name, for an input that has the samples neither along its first dimension (also as windows or tokens of
                each) nor along its second (sequence first). The first forward of a mixed batch computes twice, to find
                where each Linear has them; calls that bypass it (``forward_features``, one block) may follow it. Where
                that shows nothing, as with inputs that are all integers, the first dimension is taken, with a
                UserWarning where the second might hold them too.
            RuntimeError: the bank has released its model.
        """
        with _entered(self._start(ids)):
            yield self

    def release(self) -> None:
        """Restore the model: plain Linears, and ``requires_grad`` of its parameters as before.

        The adapters can still be saved; :meth:`add` and :meth:`use` raise a RuntimeError from then on.
        """
        if not self._hooks:
            return
        there = dict(with_projections(named_modules(self.model)))
        for linear in self._changed:  # also one that was replaced in the model, or removed from it
            if not isinstance(linear, _Head) and linear.efft[1] in there:
                uncall_linear(self.model, linear.efft[1])
            linear.release()
        for hook in self._hooks:
            hook.remove()
        for key, p in named_parameters(self.model):
            p.requires_grad_(self._requires_grad_before.get(key, p.requires_grad))
        del self.model.efft
        vars(self).pop("_plain", None)  # which holds the bank
        self._changed, self._hooks = [], ()

    def _adopt(self, linear: nn.Linear, path: str, kind: type) -> None:
        # before the class changes, because other threads run the model; a tuple, so that nothing is registered
        linear.efft = self, path
        change_class(linear, adapted_class(linear, kind))
        if isinstance(linear, Projection):
            linear.keep()
        self._changed.append(linear)

    def _find_batch(self, use: "_Use", args: tuple, kwargs: dict) -> None:
        linears = len(self._changed)
        if not use.mixed or self._tried == linears:
            return
        with _trial:  # it changes the mode of the model
            if self._tried == linears or not markable((args, kwargs), len(use.index)):
                self._batch_dims = self._batch_dims or None  # a later forward may have inputs that show more
                return
            with _entered(trial := Trial(self, len(use.index))):
                self._batch_dims = trial.run(args, kwargs)
            self._tried = linears

    def _current_use(self) -> "_Use | Trial | None":
        """The use that a layer running now belongs to: of the forward that backward recomputes, or the innermost."""
        replayed = self._replays.get(graph_task()) if self._replays else None
        # a use that was entered within the backward of a forward outside of every use is not part of that
        if replayed and (replayed is not self._plain or self._plain.outer.get(graph_task()) == _uses.get()):
            return replayed
        return next((use for use in reversed(_uses.get()) if use.bank is self), None)

    def _start(self, ids: Sequence[str | None]) -> "_Use":
        if isinstance(ids, str) or not isinstance(ids, Sequence):
            raise TypeError(f"ids must be a sequence with a name or None for each sample, got {type(ids).__name__}")
        self._check_not_released()
        with self._lock:
            held = {name: self._find(name) for name in ids if name is not None}
        if len(kinds := {adapter.kind: name for name, adapter in held.items()}) > 1:
            names = ", ".join(map(repr, kinds.values()))
            raise ValueError(f"ids must name adapters of one method, for the same Linears, got {names}, which differ")
        position = {name: i for i, name in enumerate(held)}
        return _Use(self, list(held.values()), [position.get(name, -1) for name in ids])

    def _find(self, name: str) -> Adapter:
        try:
            return self._adapters[name]
        except (KeyError, TypeError):
            known = ", ".join(map(repr, list(self._adapters)[:10])) + ", ..." * (len(self._adapters) > 10)
            known = known or "of which there are none"
            raise ValueError(f"name must be one of the bank's adapters, {known}, got {name!r}") from None

    def _check_not_released(self) -> None:
        if not self._hooks:
            raise RuntimeError("the bank has released its model; make a new one")

    def _check_name_free(self, name: str) -> None:
        if name in self._adapters:
            raise ValueError(f"name must be new, but the bank already has an adapter {name!r}")


@contextlib.contextmanager
def _entered(use: "_Use | Trial") -> Iterator[None]:
    _uses.set((*_uses.get(), use))
    try:
        yield
    finally:
        # not ContextVar.reset: generators may exit in another order, or be closed by another task
        _uses.set(tuple(other for other in _uses.get() if other is not use))


def _before(model: nn.Module, args: tuple, kwargs: dict) -> None:
    bank = model.efft
    use = bank._current_use() or bank._plain
    if use is not bank._plain:
        use.check_batch(next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), None))
        bank._find_batch(use, args, kwargs)
    use.begin(model)


def _after(model: nn.Module, args, output) -> None:
    (model.efft._current_use() or model.efft._plain).end(model, output)


class _Use(Passes):
    """The adapters of one batch, looked up when ``use`` was entered: later changes of the bank do not affect it."""

    active = "mixed"

    def __init__(self, bank: AdapterBank, held: list[Adapter], index: list[int]):
        self.bank, self.backend, self.held, self.index = bank, bank.backend, held, index
        self.single = len(held) == 1 and -1 not in index
        self.mixed = len(set(index)) > 1
        # samples of one adapter that follow each other are one run of rows, with one product
        self.run = math.gcd(*(len(list(run)) for _, run in itertools.groupby(index)))
        self._ids: dict[torch.device, Tensor] = {}
        self.outer: dict[int, tuple] = {}  # backward -> the uses that were entered when it came here
        self.watched = bank.watched
        self._reset()
        for option in ("factor_dropout", "activation_dropout", "rank_dropout"):
            found = {getattr(adapter.groups.plan.config, option, 0.0) for adapter in held}
            if bank.model.training and len(found) > 1:
                raise ValueError(f"adapters of one training batch must have the same {option}, got {sorted(found)}")

    def groups(self) -> list[nn.Module]:
        return [self._stack(key) for key in (self.held[0].groups if self.held else ())]

    def _stack(self, key: str) -> nn.Module:
        made = stack([adapter.groups[key] for adapter in self.held])
        made.training = self.bank.model.training
        return made

    def _own_pair(self, path: str, linear: nn.Linear) -> Pair | None:
        for key, group in self.held[0].groups.items() if self.held else ():
            if path in group.slots:
                return self._stack(key).low_rank_pairs(self.backend, path, self.dtype_for(linear))[path]
        return None

    def _recording(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for held in self.held for p in held.parameters())

    def _restore(self, done, grad: Tensor) -> None:
        super()._restore(done, grad)
        self.bank._replays[self._replay[0]], self.outer[self._replay[0]] = self, _uses.get()

    def _end_of_backward(self) -> None:
        self.bank._replays.pop(self._replay[0], None)
        self.outer.pop(self._replay[0], None)
        super()._end_of_backward()

    def ids(self, device: torch.device) -> Tensor:
        if device not in self._ids:
            with torch.inference_mode(False):  # a later forward may save the tensor for its backward
                self._ids[device] = torch.tensor(self.index[:: self.run or 1], dtype=torch.int64, device=device)
        return self._ids[device]

    def check_batch(self, x: Tensor | None) -> None:
        if x is not None and (x.dim() == 0 or x.shape[0] != len(self.index)):
            batch = len(x) if x.dim() else 0
            raise ValueError(f"ids must name an adapter for each of the {batch} samples, got {len(self.index)}")

    def batch_dim(self, path: str, x: Tensor) -> int:
        return batch_dim(self.bank._batch_dims, path, x, len(self.index)) if self.mixed else 0

    def linear(
        self,
        layer: nn.Linear,
        path: str,
        x: Tensor,  # [B, ..., K] or [L, B, ..., K]
        weight: Tensor,  # [N, K], or the rows of it that columns names
        bias: Tensor | None,
        columns: slice | None = None,
    ) -> Tensor:  # [B, ..., N] or [L, B, ..., N]
        pair = self.pair(path, layer)
        if pair is None:
            return F.linear(x, weight, bias)
        if dim := self.batch_dim(path, x):
            x = x.transpose(0, dim)
        pair = pair if columns is None else pair.of(columns)
        down, up, dropout, magnitude = pair
        if down.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            down, up = down.to(weight.dtype), up.to(weight.dtype)
        if dropout and layer.training:
            ids = self.ids(x.device)
            at, none = ids.clamp(min=0), (ids < 0)[:, None, None]
            low = F.dropout(x.reshape(len(ids), -1, x.shape[-1]) @ down[at], dropout) @ up[at]
            y = F.linear(x, weight, bias) + low.masked_fill(none, 0).view(*x.shape[:-1], -1)
        elif self.single:
            y = lowrank_linear(x, weight, bias, down[0], up[0], backend=self.backend)
        else:
            y = mixed_linear(x, weight, bias, down, up, self.ids(x.device), backend=self.backend)
        if magnitude is not None:
            # the row behind those of the adapters, which the id -1 finds, is of no adapter
            gains = F.pad(gain(weight, down, up, magnitude), (0, 0, 0, 1))[self.ids(x.device)]
            y = scaled(y.reshape(len(gains), -1, y.shape[-1]), bias, gains.unsqueeze(1)).view(y.shape)
        return y.transpose(0, dim).contiguous() if dim else y

    def head(self, layer: nn.Linear, path: str, x: Tensor) -> Tensor:  # [B, ..., K] -> [B, ..., classes]
        heads = [adapter.heads.get(path, layer) for adapter in self.held] + [layer]  # the last one for no adapter
        chosen = [heads[i] for i in self.index]
        if len(used := list(dict.fromkeys(chosen))) <= 1:
            only = used[0] if used else layer
            return F.linear(x, only.weight, only.bias)
        if dim := self.batch_dim(path, x):
            x = x.transpose(0, dim)
        width = max(head.out_features for head in used)
        samples = x.unflatten(0, (len(self.index), -1))
        # heads differ in size, and a sample must not be affected by another's head (NaN): one small matmul per head
        logits, order = [], []
        for head in used:
            rows = [i for i, other in enumerate(chosen) if other is head]
            # a slice needs neither a copy nor an index on the device
            mine = slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] + 1 == len(rows) else rows
            part = F.linear(samples[mine], head.weight, head.bias)
            logits.append(F.pad(part, (0, width - head.out_features), value=float("-inf")))
            order += rows
        y = torch.cat(logits)
        if order != sorted(order):
            y = y[sorted(range(len(order)), key=order.__getitem__)]
        return y.flatten(0, 1).transpose(0, dim)


class _Linear(AdaptedLinear):
    """An adapted Linear of a bank's model."""

    def forward(self, x: Tensor) -> Tensor:
        bank, path = self.efft
        use = bank._current_use()
        weight, bias = self.weight, self.bias
        return F.linear(x, weight, bias) if use is None else use.linear(self, path, x, weight, bias)

    def add_to(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, columns: slice | None = None) -> Tensor:
        bank, path = self.efft
        use = bank._current_use()
        return F.linear(x, weight, bias) if use is None else use.linear(self, path, x, weight, bias, columns)

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, adapters={len(self.efft[0])}"


class _Head(_Linear):
    """The classifier of a bank's model."""

    def forward(self, x: Tensor) -> Tensor:
        bank, path = self.efft
        use = bank._current_use()
        return F.linear(x, self.weight, self.bias) if use is None else use.head(self, path, x)
