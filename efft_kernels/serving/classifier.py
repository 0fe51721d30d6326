"""Classifier: one backbone and its adapters, from uploads to answers. It knows nothing of HTTP and Ray."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..extras import timm
from ..layouts import classifiers_of, input_size
from ..preparation import Preparation
from .bank import AdapterBank
from .folder import AdapterFolder, DoesNotFit, TooLarge
from .loading import Unreadable
from .settings import Settings
from .uploads import Refused, Upload, decode

log = logging.getLogger("efft_kernels.serving")


@dataclass(frozen=True, eq=False)
class Prepared:
    """An upload that is ready for the model."""

    upload: Upload
    image: Tensor  # [3, H, W]
    key: str | None  # of the adapter in the bank, by which a file that is replaced meanwhile is told
    labels: Sequence[str]


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

    def prepare(self, upload: Upload) -> Prepared:
        """Load the upload's adapter, which is cheaper to refuse than its image, then decode the image and prepare it as
        the adapter's file says, or as timm evaluates the model if it says nothing.

        Raises:
            Refused: as :meth:`classify` and :func:`decode`.
        """
        with self._checked(upload.adapter) as (key, preparation, labels):
            image = preparation.transform()(decode(upload.image, max_pixels=self.settings.max_pixels))
            return Prepared(upload, image, key, labels)

    def check(self, adapter: str | None) -> None:
        """Load an adapter, or raise Refused as :meth:`prepare`, after its reason has been logged."""
        with self._checked(adapter):
            pass

    @contextlib.contextmanager
    def _checked(self, adapter: str | None) -> Iterator[tuple[str | None, Preparation, Sequence[str]]]:
        if adapter is None and not self.classes:
            raise Refused(400, f"adapter must be given: {self.settings.model} has no classes without an adapter")
        with self._hold(adapter) as key:
            preparation = (None if key is None else self.bank.preparation(key)) or self.preparation
            if preparation.size != (input_size(self.model) or preparation.size):
                log.warning("adapter %r needs images of %s pixels", adapter, preparation.size)
                raise Refused(422, f"adapter {adapter!r} needs images of another size than the model takes")
            yield key, preparation, self.own_labels if key is None else self._labels(adapter, key)

    def classify(self, images: Sequence[Prepared]) -> list[Tensor | Refused]:  # each [classes]
        """Probabilities of each image under its adapter, from a forward of the model for each size of image and kind of
        adapter.

        The adapters stay in the bank during the forwards. An image that cannot be classified gets a :class:`Refused` in
        place of probabilities: 404 if there is no file of its adapter any more, 422 if the model does not take its
        size, 503 if there is no room for its adapter or the file was replaced, 500 for other errors.
        """
        with contextlib.ExitStack() as stack:
            held: dict[str | None, str | Refused | None] = {}
            for one in images:
                if one.key not in held:
                    try:
                        held[one.key] = stack.enter_context(self._hold(one.upload.adapter, one.key))
                    except Refused as error:
                        held[one.key] = error
            kinds = {key: self.bank.kind(key) for key in held.values() if isinstance(key, str)}
            usual = next(iter(kinds.values()), None)  # images without an adapter share a forward with this kind
            results, groups = [held[one.key] for one in images], {}
            for i, key in enumerate(results):
                if not isinstance(key, Refused):
                    groups.setdefault((images[i].image.shape, kinds.get(key, usual)), []).append(i)
            for rows in groups.values():
                for i, found in zip(rows, self._forward([images[i] for i in rows])):
                    results[i] = found
        return results

    def _forward(self, images: Sequence[Prepared]) -> list[Tensor | Refused]:
        """The results for images of one size and kind of adapter."""
        try:
            x = torch.stack([one.image for one in images]).to(self.settings.device, self.dtype)
            with torch.inference_mode(), self.bank.use([one.key for one in images]):
                return [self._scores(one.key, row) for one, row in zip(images, self.model(x).float().cpu())]
        except Exception as error:  # models raise errors of many types for a size that they do not take
            size = tuple(images[0].image.shape[1:])
            log.warning("a forward for images of %s pixels failed", size, exc_info=True)
            if size == self.preparation.size or isinstance(error, torch.OutOfMemoryError):
                refused = Refused(500, "internal error")
            else:
                refused = Refused(422, f"the model does not take images of {size[0]} x {size[1]}, the adapter's size")
            return [refused] * len(images)

    def _scores(self, key: str | None, logits: Tensor) -> Tensor:
        several, logits = key is not None and self.bank.multilabel(key), logits[: self.bank.classes(key)]
        return logits.sigmoid() if several else logits.softmax(0)

    @contextlib.contextmanager
    def _hold(self, adapter: str | None, expected: str | None = None) -> Iterator[str | None]:
        """Hold an adapter in the bank; the context is its name there. Errors are what the client is told."""
        with contextlib.ExitStack() as stack:
            try:
                key = None if adapter is None else stack.enter_context(self.folder.hold(adapter))
            except FileNotFoundError as error:
                raise Refused(404, f"there is no adapter {adapter!r}") from error
            except DoesNotFit as error:
                raise Refused(503, str(error)) from error
            except (ValueError, OSError) as error:  # its message has the path, which clients must not see
                why = str(error).removesuffix("; strict=False loads it with a warning")  # no option of the service
                log.warning("adapter %r cannot be served: %s", adapter, why)
                kinds = {(Unreadable, OSError): "cannot be read", TooLarge: "takes more memory than adapters may"}
                what = next((said for kind, said in kinds.items() if isinstance(error, kind)), "does not fit the model")
                raise Refused(422, f"adapter {adapter!r} cannot be served: its file {what}") from error
            if expected not in (None, key):
                raise Refused(503, f"the file of adapter {adapter!r} was replaced while the request was under way")
            yield key

    def answer(self, prepared: Prepared, scores: Tensor) -> dict:
        """The answer to a request as data for JSON: the best class, and the best ``upload.top`` of them.

        Raises:
            Refused: 422 for scores that are not finite: the adapter diverged in training, or overflowed for this image.
        """
        upload, labels = prepared.upload, prepared.labels
        if not scores.isfinite().all():
            raise Refused(422, f"adapter {upload.adapter!r} gives scores for this image that are not finite")
        best = scores.topk(min(upload.top, len(scores)))
        found = [
            {"label": labels[index] if labels else str(index), "index": index, "score": score}
            for score, index in zip(best.values.tolist(), best.indices.tolist())
        ]
        return {"adapter": upload.adapter, **found[0], "scores": found}

    def _labels(self, adapter: str, key: str) -> Sequence[str]:
        """The labels of an adapter: of NAME.labels.txt, else of its file; empty if neither has any.

        Raises:
            Refused: 422 for labels that cannot be read, or that are not as many as the classes.
        """
        path, classes = self.folder.path / f"{adapter}.labels.txt", self.bank.classes(key)
        try:
            labels = read_labels(path)
        except FileNotFoundError:
            labels = self.bank.labels(key) or ()
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
        ValueError: the weights do not fit the model, or it is none of timm.
    """
    library, of_timm = timm("serve"), "the service takes models of timm, and AdapterBank in Python also transformers'"
    if settings.model.startswith("hf:"):
        raise ValueError(of_timm)
    options = {"num_classes": settings.num_classes} if settings.num_classes else {}
    if settings.image_size:
        options["img_size"] = settings.image_size
    torch.manual_seed(0)  # without a checkpoint all replicas get the same random weights
    try:
        model = library.create_model(settings.model, **options)
    except KeyError as error:  # timm does not check the config.json of a folder
        raise ValueError(f"timm finds no {error} in its config.json; {of_timm}") from error
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
