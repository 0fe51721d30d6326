"""The import arrows of the package, and what importing it may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import efft_kernels

PACKAGE = Path(efft_kernels.__file__).parent
KERNELS = {"kernels", "kernels.reference", "kernels.cpu", "kernels.triton", "kernels.cuda"}
FINETUNE = {f"finetune.{p.stem}" for p in (PACKAGE / "finetune").glob("*.py")} | {"finetune"}
SERVING = {f"serving.{p.stem}" for p in (PACKAGE / "serving").glob("*.py")} | {"serving"}
ALLOWED = {
    "kernels.__init__": set(),
    "kernels.reference": set(),
    "kernels.cpu": {"kernels.reference"},
    "kernels.triton": {"kernels.tuning.table"},
    "kernels.cuda": {"kernels.tuning.table"},
    "kernels.tuning.table": set(),
    "kernels.tuning.tune": {"kernels.reference", "kernels.tuning.table", "kernels.tuning.triton", "kernels.tuning.cuda"},
    "kernels.tuning.triton": {"kernels.triton", "kernels.reference", "kernels.tuning.table"},
    "kernels.tuning.cuda": {"kernels.cuda", "kernels.tuning.table"},
    "ops": KERNELS,
    "factors": {"ops"},
    "base_linears": set(),
    "linear": {"ops", "base_linears"},
    "adapted": {"ops", "factors", "base_linears"},
    "inject": {"adapted", "factors", "ops", "base_linears"},
    "files": {"inject", "adapted", "factors", "ops"},
    "analysis": {"inject", "factors"},
    "finetune": {"inject", "files", "factors"} | FINETUNE,
    "peft": {"inject", "files", "adapted", "factors", "linear", "ops"},
    "serving": {"inject", "files", "adapted", "factors", "linear", "ops", "base_linears"} | SERVING,
    "deploy": {"serving.app"},
    "__init__": {"ops", "factors", "linear", "inject", "files", "analysis"},
}
HEAVY = ["triton", "timm", "transformers", "peft", "safetensors", "torchvision", "matplotlib", "torch._dynamo", "ray", "PIL"]


def module_name(path: Path) -> str:
    """kernels.cpu for kernels/cpu.py; of a folder's __init__.py, the folder's, but for the two outermost"""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name if name in ("__init__", "kernels.__init__") else name.removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """names of this package's modules that a file imports, anywhere in it, relative to the package"""
    inside = list(path.relative_to(PACKAGE).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = inside[: len(inside) - node.level + 1] + (node.module.split(".") if node.module else [])
            candidates = [base] if base else [[alias.name] for alias in node.names]
            for parts in candidates:
                deeper = [".".join([*parts, alias.name]) for alias in node.names]
                files = [d for d in deeper if _is_module(d)]
                names.update(files or [".".join(parts)])
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            full = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            names.update(n.removeprefix("efft_kernels.") for n in full if n.split(".")[0] == "efft_kernels")
    return names


def _is_module(name: str) -> bool:
    path = PACKAGE / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_arrows(path):
    name = module_name(path)
    room = name.split(".")[0]
    allowed = ALLOWED[name if room == "kernels" else room]
    found = imported(path)
    assert found <= allowed, f"{name} may import {sorted(allowed)}, but imports {sorted(found - allowed)}"


def test_arrow_walk_sees_an_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", PACKAGE)
    assert "kernels.reference" not in imported(PACKAGE / "linear.py")
    assert "ops" in imported(PACKAGE / "linear.py")
    assert {"ops", "linear"} <= imported(PACKAGE / "__init__.py")


def test_import_is_light():
    code = f"import sys, torch; before = set(sys.modules); import efft_kernels; print([m for m in {HEAVY} if m in set(sys.modules) - before])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_of_the_class_as_a_module():
    code = "import efft_kernels.EFFTLinear; print(efft_kernels.EFFTLinear.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "EFFTLinear"
