"""Training steps of a whole model: run stage by stage, compiled, or captured in a CUDA graph; and what a step costs
besides time: operations and saved bytes.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import harness
from timing import Stages

BATCHES = 2  # of images and labels, used in turn
WARM_UP = 3  # eager steps before a capture


class Step:
    """Training steps of one adapted model on batches of images [B, 3, S, S] and labels [B], as stages for timing.py.

    What requires a gradient is trained. compile: run the model through torch.compile. capturable: keep AdamW's step
    count on the GPU, as a CUDA graph needs. autocast: run the forward under autocast to bfloat16.
    """

    def __init__(self, model: nn.Module, batches: list, *, compile=False, capturable=False, autocast=False):
        self.model, self.batches, self.autocast = model, batches, autocast
        self.predict = compiled(model) if compile else model
        self.trained = [p for p in model.parameters() if p.requires_grad]
        # a rate so small that random labels cannot make full fine-tuning diverge within a run
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=1e-4, capturable=capturable)
        self.loss = None  # of the last step

    def stages(self, batch: int = 0) -> Stages:
        """Forward with the loss, backward, and AdamW with the gradients cleared."""

        def backward(loss: Tensor) -> None:
            loss.backward()
            self.loss = loss.detach()

        def update(_) -> None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        return lambda _: self._loss(*self.batches[batch]), backward, update

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            return F.cross_entropy(self.predict(images), labels)

    def capture(self, pool, stream: torch.cuda.Stream) -> list[Stages]:
        """Capture the whole step in a CUDA graph, after a few eager steps on the stream of the capture.

        The pool is memory for the graphs of all methods. They can share it because only one of them runs at a time, and
        the tensors that outlive a replay (loss, gradients, weights) are allocated outside of it.

        Returns:
            For each batch one stage, which copies the batch to where the graph reads it and replays the graph.

        Raises:
            RuntimeError: an operation of the step cannot be captured; the pool must not be used again.
        """
        images, labels = (t.clone() for t in self.batches[0])
        self.loss = torch.zeros((), device=images.device)

        def step() -> None:
            loss = self._loss(images, labels)
            loss.backward()
            self.loss.copy_(loss.detach())
            self.optimizer.step()
            # in place: the graph adds to the gradients at fixed addresses
            self.optimizer.zero_grad(set_to_none=False)

        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                step()
        except RuntimeError as error:
            # a failed capture leaves its stream current, and the random generator in capture mode, where the dropout of
            # other methods would fail
            torch.cuda.set_stream(current)
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(torch.Generator("cuda").manual_seed(0))
            # ending a failed capture raises as well, which hides the first error
            raise RuntimeError(f"cannot be captured in a CUDA graph: {reason(error.__context__ or error)}") from error

        def replay(batch: tuple[Tensor, Tensor]) -> Callable:
            def stage(_) -> None:
                images.copy_(batch[0])
                labels.copy_(batch[1])
                graph.replay()

            return stage

        return [(replay(batch),) for batch in self.batches]

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        states = self.optimizer.state.values()
        return sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor))


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model through torch.compile in its default mode, for inputs of fixed shape."""

    def predict(images: Tensor) -> Tensor:
        return model(images)

    # Dynamo keeps what it compiled per code object and gives up after eight, so every model gets a separate one
    predict.__code__ = predict.__code__.replace(co_name=f"predict_{id(model)}")
    return torch.compile(predict, dynamic=False)


def reason(error: BaseException) -> str:
    """The first line of an error's message; the first two where the first only announces the other."""
    first, _, rest = str(error).strip().partition("\n")
    return f"{first} {rest.strip().partition(chr(10))[0]}" if first.endswith(":") and rest else first


def make_batches(args, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Random images [B, 3, S, S] and labels [B]."""
    g = torch.Generator(args.device).manual_seed(0)
    shape, made = (args.batch, 3, args.image, args.image), dict(generator=g, device=args.device)
    images = lambda: torch.randn(shape, **made).to(dtype)
    labels = lambda: torch.randint(harness.CLASSES, shape[:1], **made)
    return [(images(), labels()) for _ in range(BATCHES)]


class Ops(TorchDispatchMode):
    """Counts the operations that torch runs, views excluded: on a GPU each launches at least one kernel."""

    FREE = {"aten::_unsafe_view", "aten::empty_like"}  # copy nothing, but are not marked as views

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += not (op.is_view or op._schema.name in self.FREE)
        return op(*args, **(kwargs or {}))


def count_ops(stages: Stages) -> list[int]:
    """The number of operations of each stage."""
    counts, value = [], None
    for stage in stages:
        with Ops() as ops:
            value = stage(value)
        counts.append(ops.count)
    return counts


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts what forwards save for the backward: each storage once, the model's parameters and buffers excluded."""

    def __init__(self, model: nn.Module):
        super().__init__(self._pack, lambda t: t)
        self.own = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
        self.sizes = {}  # address -> bytes; a saved tensor lives until the backward, so addresses are not reused

    def _pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes()
        return t

    @property
    def bytes(self) -> int:
        return sum(size for address, size in self.sizes.items() if address not in self.own)
