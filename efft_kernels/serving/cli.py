"""The command ``python -m efft_kernels.serving``: one option per setting, checked by the pydantic models."""

import argparse
import sys
import typing
from collections.abc import Sequence

PROG = "python -m efft_kernels.serving"
_EPILOG = f"""
examples:
  {PROG} --model vit_base_patch16_224 --weights base.safetensors --adapters adapters/
  {PROG} --model vit_base_patch16_224 --weights base.safetensors --adapters adapters/ \\
      --device cuda --dtype bfloat16 --max-batch 64
  curl --data-binary @cat.jpg 'http://127.0.0.1:8000/?adapter=pets'
      classify an image with adapters/pets.safetensors; without ?adapter=... the model answers without an adapter
  curl http://127.0.0.1:8000/
      list the adapters and the state of the service

Open http://127.0.0.1:8000/ in a browser to try it; /docs describes the requests.
Clients on other machines: --key-file, and a web server in front of the service (docs/serving.md).
SIGTERM and SIGINT stop it after the requests under way have been answered.
"""


def parser() -> argparse.ArgumentParser:
    from .settings import ServerSettings, Settings

    made = argparse.ArgumentParser(
        prog=PROG,
        usage=f"{PROG} --model MODEL --adapters FOLDER [--weights FILE] [--OPTION VALUE ...]",
        description="Serve image classification over HTTP with one backbone and any number of adapters (Ray Serve).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, model in (("application", Settings), ("server", ServerSettings)):
        group = made.add_argument_group(title)
        for name, field in model.model_fields.items():
            text = " ".join(field.description.split()).replace("%", "%%")
            if field.annotation is bool:
                group.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=text)
                continue
            choices = typing.get_args(field.annotation)  # of a Literal
            default = "" if field.is_required() or field.default == "" else f" (default: {field.default})"
            group.add_argument(
                f"--{name.replace('_', '-')}",
                required=field.is_required(),
                choices=choices or None,
                metavar=None if choices else "N" if field.annotation in (int, float) else name.upper(),
                default=argparse.SUPPRESS,
                help=text + default,
            )
    return made


def settings(argv: Sequence[str]) -> tuple:
    """(Settings, ServerSettings) of the arguments. Exits with status 2 and a sentence if they cannot be used."""
    from pydantic import ValidationError

    from .settings import ServerSettings, Settings

    made = parser()
    given = vars(made.parse_args([_dashed(arg) for arg in argv]))
    models = Settings, ServerSettings
    try:
        return tuple(model(**{name: given[name] for name in model.model_fields if name in given}) for model in models)
    except ValidationError as error:
        # "Input should be greater than 0" as "--port must be greater than 0, got '-1'"
        sentences = [
            f"--{e['loc'][0].replace('_', '-')} must {e['msg'].partition(' should ')[2]}, got {e['input']!r}"
            for e in error.errors()
        ]
        made.error("; ".join(sentences))


def _dashed(arg: str) -> str:
    """--max_batch=64 as --max-batch=64"""
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else arg


def main(argv: Sequence[str] | None = None) -> None:
    try:
        application, server = settings(sys.argv[1:] if argv is None else argv)
        from .server import StartError, run  # imports torch, which takes seconds
    except ImportError as error:
        raise SystemExit(f"{PROG}: {error}") from error
    try:
        run(application, server)
    except (ImportError, StartError) as error:
        raise SystemExit(f"{PROG}: {error}") from error
