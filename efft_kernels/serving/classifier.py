"""Classifier: one backbone and its adapters, from uploads to answers. It knows nothing of HTTP and Ray."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..extras import timm
from ..layouts import classifiers_of, input_size
from ..preparation import Preparation
from .bank import AdapterBank
from .folder import AdapterFolder, DoesNotFit
from .settings import Settings
from .uploads import Refused, Upload, decode

log = logging.getLogger("efft_kernels.serving")


class Classifier:
    """A model whose adapters are loaded from a folder when requests ask for them.

    :meth:`prepare` and :meth:`answer` may run in several threads next to one that runs :meth:`classify`.
    """

    def __init__(self, settings: Settings):
        torch.set_num_threads(settings.threads)
        self.settings, self.dtype = settings, getattr(torch, settings.dtype)
        self.model = base_model(settings)
        self.preparation = default_preparation(self.model)
        self.bank = AdapterBank(self.model, backend=settings.backend or None, factor_dtype=self.dtype)
        self.folder = AdapterFolder(self.bank, settings.adapters, settings.adapter_bytes)
        self._stated_labels: dict[str, Sequence[str]] = {}  # adapter -> labels in its file
        # of the model without an adapter
        self.classes = (
            0 if any(c.weight.isnan().all() for _, c in classifiers_of(self.model)) else self.bank.classes(None)
        )
        self.own_labels = read_labels(settings.labels) if settings.labels else []
        if self.own_labels and len(self.own_labels) != self.classes:
            raise ValueError(
                f"{settings.labels} must have a line for each of the {self.classes} classes of {settings.model}, got "
                f"{len(self.own_labels)}"
            )

    def prepare(self, upload: Upload) -> Tensor:  # [3, H, W]
        """Load the upload's adapter, which is cheaper to refuse than its image, then decode the image and prepare it as
        the adapter's file says, or as timm evaluates the model if it says nothing.

        Raises:
            Refused: as :meth:`classify` and :func:`decode`.
        """
        with self._checked(upload.adapter) as preparation:
            return preparation.transform()(decode(upload.image, max_pixels=self.settings.max_pixels))

    def check(self, adapter: str | None) -> None:
        """Load an adapter, or raise Refused as :meth:`prepare`, after its reason has been logged."""
        with self._checked(adapter):
            pass

    @contextlib.contextmanager
    def _checked(self, adapter: str | None) -> Iterator[Preparation]:
        if adapter is None and not self.classes:
            raise Refused(400, f"adapter must be given: {self.settings.model} has no classes without an adapter")
        with self._hold(adapter) as key:
            preparation = (None if key is None else self.bank.preparation(key)) or self.preparation
            if preparation.size != (input_size(self.model) or preparation.size):
                log.warning("adapter %r needs images of %s pixels", adapter, preparation.size)
                raise Refused(422, f"adapter {adapter!r} needs images of another size than the model takes")
            if key is not None:
                self._stated_labels[adapter] = self.bank.labels(key) or ()
                self._labels(adapter, self.bank.classes(key))
            yield preparation

    def classify(
        self,
        images: Sequence[Tensor],  # each [3, H, W]
        adapters: Sequence[str | None],
    ) -> list[Tensor | Refused]:  # each [classes]
        """Probabilities of each image under its adapter, from one forward of the model for each size of image.

        The adapters stay in the bank during the forward. An image whose adapter cannot be loaded gets a
        :class:`Refused` in place of probabilities: 404 if there is no such file, 422 if the file does not fit the
        model, 503 if there is no room for it next to the adapters in use.
        """
        with contextlib.ExitStack() as stack:
            held: dict[str | None, str | Refused | None] = {}
            for adapter in dict.fromkeys(adapters):
                try:
                    held[adapter] = stack.enter_context(self._hold(adapter))
                except Refused as error:
                    held[adapter] = error
            results = [held[adapter] for adapter in adapters]
            sizes: dict[torch.Size, list[int]] = {}  # adapters may want several, if the model takes them
            for i, key in enumerate(results):
                if not isinstance(key, Refused):
                    sizes.setdefault(images[i].shape, []).append(i)
            for rows in sizes.values():
                keys = [results[i] for i in rows]
                x = torch.stack([images[i] for i in rows]).to(self.settings.device, self.dtype)
                with torch.inference_mode(), self.bank.use(keys):
                    logits = self.model(x).float().cpu()
                    for i, key, row in zip(rows, keys, logits):
                        results[i] = row[: self.bank.classes(key)].softmax(0)
        return results

    @contextlib.contextmanager
    def _hold(self, adapter: str | None) -> Iterator[str | None]:
        """Hold an adapter in the bank; the context is its name there. Errors are what the client is told."""
        with contextlib.ExitStack() as stack:
            try:
                key = None if adapter is None else stack.enter_context(self.folder.hold(adapter))
            except FileNotFoundError as error:
                raise Refused(404, f"there is no adapter {adapter!r}") from error
            except DoesNotFit as error:
                raise Refused(503, str(error)) from error
            except (ValueError, OSError) as error:  # its message has the path, which clients must not see
                log.warning("adapter %r cannot be served: %s", adapter, error)
                raise Refused(422, f"adapter {adapter!r} cannot be served: its file does not fit the model") from error
            yield key

    def answer(self, upload: Upload, scores: Tensor) -> dict:
        """The answer to a request as data for JSON: the best class, and the best ``upload.top`` of them.

        Raises:
            Refused: 422 for scores that are not finite: the adapter diverged in training, or overflowed for this image.
        """
        if not scores.isfinite().all():
            raise Refused(422, f"adapter {upload.adapter!r} gives scores for this image that are not finite")
        labels = self._labels(upload.adapter, len(scores))
        best = scores.topk(min(upload.top, len(scores)))
        found = [
            {"label": labels[index] if labels else str(index), "index": index, "score": score}
            for score, index in zip(best.values.tolist(), best.indices.tolist())
        ]
        return {"adapter": upload.adapter, **found[0], "scores": found}

    def _labels(self, adapter: str | None, classes: int) -> Sequence[str]:
        """The labels of an adapter or of the model: of NAME.labels.txt, else of the adapter's file; empty if neither
        has any.

        Raises:
            Refused: 422 for labels that cannot be read, or that are not as many as the classes.
        """
        if adapter is None:
            return self.own_labels
        path = self.folder.path / f"{adapter}.labels.txt"
        try:
            labels = read_labels(path)
        except FileNotFoundError:
            labels = self._stated_labels.get(adapter, ())
        except (OSError, ValueError) as error:
            log.warning("adapter %r cannot be served: its labels cannot be read: %s", adapter, error)
            raise Refused(422, f"adapter {adapter!r} cannot be served: its labels cannot be read") from error
        if labels and len(labels) != classes:
            log.warning("adapter %r cannot be served: %d labels for %d classes", adapter, len(labels), classes)
            raise Refused(422, f"adapter {adapter!r} cannot be served: its labels are not as many as its classes")
        return labels


def base_model(settings: Settings) -> nn.Module:
    """The model in eval mode, without adapters. A classifier that its weights do not have, because they were trained
    without labels or for other classes, is NaN: adapters bring their own.

    Raises:
        ValueError: the weights do not fit the model.
    """
    library = timm("serve")
    options = {"num_classes": settings.num_classes} if settings.num_classes else {}
    if settings.image_size:
        options["img_size"] = settings.image_size
    torch.manual_seed(0)  # without a checkpoint all replicas get the same random weights
    model = library.create_model(settings.model, **options)
    if alone := not list(classifiers_of(model)):
        model.reset_classifier(1)
    if settings.weights or alone:
        for _, linear in classifiers_of(model):
            nn.init.constant_(linear.weight, float("nan"))
    if settings.weights:
        # with it, tables of positions are interpolated to the size of the images
        adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        keys = library.models.load_checkpoint(model, settings.weights, strict=False, filter_fn=adapt)
        own = {f"{path}.{name}" for path, _ in classifiers_of(model) for name in ("weight", "bias")}
        if keys and (wrong := {*keys.unexpected_keys, *keys.missing_keys} - own):  # None for files of NumPy
            what = "lack" if wrong & {*keys.missing_keys} else "have"
            raise ValueError(f"the weights in {settings.weights} {what} {min(wrong)}, unlike {settings.model}")
    return model.to(settings.device, getattr(torch, settings.dtype)).eval()


def default_preparation(model: nn.Module) -> Preparation:
    """How images are prepared for no adapter, or for one whose file states nothing: as timm evaluates the model."""
    made = Preparation.of_model(model)
    return replace(made, size=input_size(model) or made.size)


def read_labels(path: str | os.PathLike) -> list[str]:
    """The lines of a labels file in UTF-8, without blank ones."""
    with open(path, encoding="utf-8-sig") as file:  # Windows' editors write the mark
        return [line.strip() for line in file if line.strip()]
