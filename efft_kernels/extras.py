"""Optional packages, imported where they are used: an error names the extra that brings a missing one."""

import importlib
import sys

import torch

_declared = []  # a torch.library.Library is undone when it is collected


def need(package: str, extra: str | None = "finetune"):
    """Import a package of an extra; None for one that is installed by its own name.

    Raises:
        ImportError: the package is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        command = f"pip install 'efft_kernels[{extra}]'" if extra else f"pip install {package}"
        raise ImportError(f"{package} is missing: {command}", name=package) from error


def timm(extra: str = "finetune"):
    """Import timm, after :func:`torchvision_on_cpu`."""
    torchvision_on_cpu()
    return need("timm", extra)


def torchvision_on_cpu() -> None:
    """Import torchvision if it is installed, so that packages which import it can be imported, too.

    torchvision from PyPI fails to import next to a CPU build of torch unless two of its operators are declared first,
    which this does.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        for op in ("nms", "qnms"):
            _declared[-1].define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except ImportError:
        pass  # who needs it says so
