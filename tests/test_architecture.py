"""The import arrows of the package, and what importing it may cost."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import efft_kernels

PACKAGE = Path(efft_kernels.__file__).parent
# as docs/architecture.md has them, from the ground up: a module imports from lower floors and from its own folder
FLOORS = [
    "storage extras", "hub attention", "kernels preparation tensor_file", "precision wrappers",
    "ops configs base_linears tune", "roles", "layouts columns frozen_weights", "dora", "low_rank", "per_matrix",
    "groups linear", "passes", "adapted_linear", "calls", "plans", "inject adapter_file", "card",
    "files merge analysis peft", "averaging", "export", "__init__", "finetune serving",
]  # fmt: skip
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor.split()}
# backends stand side by side: each may import the reference, the tables and the checks of memory, none another backend
KERNELS = {
    "kernels": set(),
    "kernels.memory": set(),
    "kernels.processor": set(),
    "kernels.reference": {"kernels.memory", "kernels.processor"},
    "kernels.build": {"storage"},
    "kernels.cpu": {"kernels", "kernels.build", "kernels.cpu_rules", "kernels.memory", "kernels.tuning.table"},
    "kernels.cpu_rules": {"kernels", "kernels.processor"},
    "kernels.triton": {"kernels.build", "kernels.memory", "kernels.tuning.table"},
    "kernels.cuda": {"kernels.build", "kernels.memory", "kernels.tuning.table"},
    "kernels.tuning": {"kernels.tuning.run"},
    "kernels.tuning.table": {"kernels", "storage"},
    "kernels.tuning.shapes": {"extras"},
    "kernels.tuning.children": set(),
    "kernels.tuning.plans": {"kernels.tuning.table"},
    "kernels.tuning.prove": {"kernels.reference", "kernels.tuning.plans", "kernels.tuning.table"},
    "kernels.tuning.timing": {"kernels.reference", *(f"kernels.tuning.{name}" for name in ("plans", "prove", "table"))},
    "kernels.tuning.worker": {f"kernels.tuning.{name}" for name in ("plans", "prove", "table", "timing")},
    "kernels.tuning.run": {f"kernels.tuning.{name}" for name in ("children", "plans", "table")},
}
HEAVY = "triton timm transformers peft safetensors torchvision matplotlib torch._dynamo ray PIL".split()


def imported(path: Path) -> set[str]:
    """names of this package's modules that a file imports, anywhere in it, relative to the package"""
    inside, names = list(path.relative_to(PACKAGE).parent.parts), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = inside[: len(inside) - node.level + 1] + (node.module.split(".") if node.module else [])
            candidates = [base] if base else [[alias.name] for alias in node.names]
            for parts in candidates:
                deeper = [".".join([*parts, alias.name]) for alias in node.names]
                files = [d for d in deeper if d in MODULES]
                names.update(files or [".".join(parts)])
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            full = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            names.update(n.removeprefix("efft_kernels.") for n in full if n.split(".")[0] == "efft_kernels")
    return names


# kernels.cpu for kernels/cpu.py; the folder's name for its __init__.py, and __init__ for the package's own
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def room(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_floors(name):
    above = {n for n in imported(MODULES[name]) if room(n) != room(name) and FLOOR[room(n)] >= FLOOR[room(name)]}
    assert not above, f"{name} is on floor {FLOOR[room(name)]} and must not import {sorted(above)}"
    owner = "kernels.triton" if name.startswith("kernels.triton.") else name
    if owner in KERNELS:
        beside = {n for n in imported(MODULES[name]) if not n.startswith(f"{owner}.")}
        assert beside <= KERNELS[owner]


def test_no_import_circle():
    """not even one that an import inside a function would hide"""
    left = {name: {n for n in imported(path) if n in MODULES and n != name} for name, path in MODULES.items()}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, (
        f"these import one another: { ({name: sorted(needs & left.keys()) for name, needs in left.items()}) }"
    )


def test_private_names_of_torch_stand_in_one_place():
    private = re.compile(r"torch\.(?!ops\.|_foreach)(?:\w+\.)*_[a-z]|(?:from|import) torch.*\b_[a-z]")
    lines = {name for name, path in MODULES.items() if private.search(path.read_text())}
    assert lines == {"ops.dispatch", "kernels.tuning.table", "serving.batch_dims"}


def test_arrow_walk_sees_an_import():
    assert "kernels.reference" not in imported(PACKAGE / "linear.py")
    assert "ops.efft_linear" in imported(PACKAGE / "linear.py")
    assert {"ops.group_update", "linear"} <= imported(PACKAGE / "__init__.py")


def test_import_is_light_and_the_class_can_be_imported_as_a_module():
    code = (
        "import sys, torch; before = set(sys.modules); import efft_kernels.EFFTLinear; "
        f"print([m for m in {HEAVY} if m in set(sys.modules) - before], efft_kernels.EFFTLinear.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] EFFTLinear"
