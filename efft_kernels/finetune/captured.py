"""Forward, loss and backward of a step as one CUDA graph.

An eager step of an adapted model is hundreds of short kernels, and a host that launches them one by one may take longer
than the GPU computes. A replay of the graph costs the host one call.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

WARM_UP = 3  # eager steps before the capture, which make all that is made once


class CapturedStep:
    """What a step computes before the optimizer. The batch, the logits, the loss and the gradients stay in place.

    Dropout draws from the generator of the device as it stands at each replay.

    Args:
        compute: (images, labels) -> (logits, loss), with the backward done. It must not read numbers back to the host.
        trained: the parameters that get a gradient.
        buffers: what a step changes besides, as the statistics of a batch norm.
    """

    def __init__(self, compute: Callable, trained: list[torch.nn.Parameter], buffers: Iterable[Tensor] = ()):
        self.compute, self.trained, self.buffers, self.graph = compute, trained, list(buffers), None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The logits and the loss of a batch, valid until the next call; the parameters have its gradients.

        The first call captures the graph; batches of later calls have the shapes of the first.

        Raises:
            ValueError: something in the step cannot be captured. The process cannot go on computing on this GPU then.
        """
        if self.graph is None:
            self._capture(images, labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        for p, gradient in zip(self.trained, self.gradients):
            p.grad = gradient
        return self.y, self.loss

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.clone(), labels.clone()
        before, stream = [t.clone() for t in self.buffers], torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.compute(self.images, self.labels)
        torch.cuda.current_stream().wait_stream(stream)
        for t, value in zip(self.buffers, before):
            if not torch.equal(t, value):  # a constant may be expanded, and cannot be written
                t.copy_(value)
        for p in self.trained:
            p.grad = None  # so that the capture writes gradients rather than adding to those of the warm-up
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.y, self.loss = self.compute(self.images, self.labels)
        except RuntimeError as error:
            raise ValueError(f"cuda_graph must be False for this model and method: {error}") from error
        self.graph, self.gradients = graph, [p.grad for p in self.trained]
