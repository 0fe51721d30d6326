"""The model card of an adapter file on a hub: what it adapts, how it was trained and measured, how to load it."""

from collections.abc import Mapping
from dataclasses import asdict

from .adapter_file import AdapterFile
from .extras import need
from .hub import PREFIX

_MOST = 200  # names of classes that are listed


def card(file: AdapterFile, repo: str, metrics: Mapping[str, float] | None = None) -> str:
    """The text of README.md for the repository that has this file.

    Args:
        file: the adapter.
        repo: OWNER/NAME.
        metrics: name -> value; what was measured with the adapter.
    """
    library = need("huggingface_hub", "hub")
    kind = type(file.config).__name__.removesuffix("Config")
    base = file.base_model.removeprefix("hf:").removeprefix(PREFIX)
    about = {"library_name": "efft_kernels", "tags": ["efft_kernels", "adapter", kind.lower()]}
    if file.classes or file.head:
        about["pipeline_tag"] = "image-classification"
    if base.count("/") == 1:  # a repository; names of timm's architectures are none
        about |= {"base_model": base, "base_model_relation": "adapter"}
    data = library.ModelCardData(**about)
    blocks = [
        f"# {repo}",
        f"An adapter of {_code(file.trained_on)}, written by efft_kernels {file.version}.",
        _table(("what", "value"), _facts(file, kind)),
    ]
    if metrics:
        rows = [(name, f"{value:.4g}") for name, value in metrics.items()]
        blocks += ["## Results", _table(("metric", "value"), rows)]
    if file.classes:
        names = ", ".join(_code(name) for name in file.classes[:_MOST])
        blocks += ["## Classes", f"In the order of the outputs: {names}" + ", ..." * (len(file.classes) > _MOST)]
    blocks += ["## Use", f"```python\n{_example(file, repo)}\n```"]
    return library.ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(blocks) + "\n").content


def _facts(file: AdapterFile, kind: str) -> list[tuple[str, str]]:
    options = ", ".join(f"{key}={value}" for key, value in asdict(file.config).items())
    head = sum(t.numel() for t in file.head.values())
    facts = [
        ("base model", f"{_code(file.trained_on)} ({file.model})"),
        ("method", f"{kind}: {_code(options)}"),
        ("numbers in the factors", f"{sum(t.numel() for t in file.factors.values()):,}"),
    ]
    if head:
        modules = ", ".join(("head", *file.trained))
        facts.append(("numbers in modules trained in full", f"{head:,} ({_code(modules)})"))
    if file.preparation is not None:
        facts.append(("preparation of images", _code(file.preparation)))
    if file.classes is not None:
        facts.append(("classes", f"{len(file.classes)}"))
    if file.frozen is not None:
        facts.append(("base weights", "sampled in the file; another base is noticed when the adapter is loaded"))
    return facts


def _example(file: AdapterFile, repo: str) -> str:
    name = file.base_model
    if name.startswith("hf:") or ("/" in name and not name.startswith(PREFIX)):
        first = "from transformers import AutoModelForImageClassification"
        make = f"AutoModelForImageClassification.from_pretrained({name.removeprefix('hf:')!r})"
    elif name:
        first, make = "import timm", f"timm.create_model({name!r}, pretrained=True)"
    else:
        first, make = "", f"...  # the {file.model} that the adapter was trained on"
    load = f'load_adapter(model, "{PREFIX}{repo}")'
    lines = [first, "from efft_kernels import load_adapter", "", f"model = {make}", load]
    if file.preparation is not None:
        lines.append('prepare = model.efft["default"].preparation.transform()  # from a PIL image to a tensor')
    return "\n".join(lines).strip()


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [header, ("---", "---"), *rows]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)


def _code(text: object) -> str:
    """as code on one line, whatever is in it"""
    return "`" + " ".join(str(text).replace("`", "'").replace("|", "/").split()) + "`"
