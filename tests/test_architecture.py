"""The import arrows of the package, and what importing it may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import efft_kernels

PACKAGE = Path(efft_kernels.__file__).parent
KERNELS = {f"kernels.{p.stem}" for p in (PACKAGE / "kernels").glob("*.py")} | {"kernels"}
FINETUNE = {f"finetune.{p.stem}" for p in (PACKAGE / "finetune").glob("*.py")} | {"finetune"}
ALLOWED = {
    "kernels.__init__": set(),
    "kernels.reference": set(),
    "kernels.measured": set(),
    "kernels.native": {"kernels.reference"},
    "kernels.triton_kernels": {"kernels.measured"},
    "kernels.cuda": {"kernels.measured"},
    "kernels.tune": {"kernels.reference", "kernels.measured", "kernels.tune_triton", "kernels.tune_cuda"},
    "kernels.tune_triton": {"kernels.triton_kernels", "kernels.reference", "kernels.measured"},
    "kernels.tune_cuda": {"kernels.cuda", "kernels.measured"},
    "ops": KERNELS,
    "factors": {"ops"},
    "quantized": set(),
    "linear": {"ops", "quantized"},
    "adapted": {"ops", "factors", "quantized"},
    "inject": {"adapted", "factors", "ops", "quantized"},
    "adapter": {"inject", "adapted", "factors", "ops"},
    "analysis": {"inject", "factors"},
    "finetune": {"inject", "adapter", "factors"} | FINETUNE,
    "peft": {"inject", "adapter", "adapted", "factors", "linear", "ops"},
    "serving": {"inject", "adapter", "adapted", "factors", "linear", "ops", "quantized"},
    "deploy_uploads": set(),
    "deploy_folder": set(),
    "deploy": {"serving", "inject", "adapter", "deploy_folder", "deploy_uploads"},
    "__init__": {"ops", "factors", "linear", "inject", "adapter", "analysis"},
}
HEAVY = ["triton", "timm", "transformers", "peft", "safetensors", "torchvision", "matplotlib", "torch._dynamo", "ray", "PIL"]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """names of this package's modules that a file imports, anywhere in it, relative to the package"""
    inside = module_name(path).split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = inside[: len(inside) - node.level + 1] + (node.module.split(".") if node.module else [])
            candidates = [base] if base else [[alias.name] for alias in node.names]
            for parts in candidates:
                deeper = [".".join([*parts, alias.name]) for alias in node.names]
                files = [d for d in deeper if (PACKAGE / (d.replace(".", "/") + ".py")).exists()]
                names.update(files or [".".join(parts)])
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            full = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            names.update(n.removeprefix("efft_kernels.") for n in full if n.split(".")[0] == "efft_kernels")
    return names


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
