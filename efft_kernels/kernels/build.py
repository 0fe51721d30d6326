"""The digest of a backend's sources, by which a compiled library and a proof are known to belong to them.

setup.py compiles a digest into each library and runs this file by its path before torch is there: it imports the
standard library only.
"""

import ast
import functools
import hashlib
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
MARK = b"EFFT-SOURCES:"
_COMMENT = re.compile(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', re.S)


def csrc() -> Path | None:
    """The C++ sources: inside an installed package, beside the package in a checkout."""
    return next((d for d in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if (d / "cpu").is_dir()), None)


def files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix in (".cpp", ".cu", ".h", ".inl"))


def digest(folder: Path) -> str:
    """Of the C++ files in a folder, without their comments and the width of their white space."""
    found = hashlib.sha256()
    for file in files(folder):
        text = _COMMENT.sub(lambda match: match.group(1) or " ", file.read_text())
        found.update(f"{file.name}\n{' '.join(text.split())}\n".encode())
    return found.hexdigest()[:32]


def python_digest(paths: list[Path]) -> str:
    """Of what Python files define, whatever file that is in: without comments, docstrings and imports."""
    definitions = []
    for path in paths:
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.Import | ast.ImportFrom) and not _is_text(node):
                definitions.append(repr(_meaning(node)))
    return hashlib.sha256("\n".join(sorted(definitions)).encode()).hexdigest()[:32]


def _meaning(node):
    """a syntax tree as lists and strings, the same in every version of Python"""
    if isinstance(node, list):
        return [_meaning(part) for part in node if not _is_text(part)]
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if name not in ("kind", "type_comment")]
        return [type(node).__name__, *([name, _meaning(v)] for name, v in fields if v is not None and v != [])]
    return repr(node)


def _is_text(node) -> bool:
    """a docstring, or another string that stands for itself"""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def mark(folder: Path) -> str:
    """A C++ file that puts the digest of a folder into a library."""
    text = MARK.decode() + digest(folder)
    return f'extern "C" __attribute__((used, visibility("default"))) const char efft_sources[] = "{text}";\n'


@functools.cache
def carried(library: Path) -> str | None:
    """The digest that a library was compiled with, or None."""
    found = re.search(re.escape(MARK) + rb"([0-9a-f]{32})", library.read_bytes())
    return found.group(1).decode() if found else None


def belongs(library: Path, part: str) -> bool:
    """Whether a library was compiled from csrc/cpu or csrc/cuda as they are here; true where these are not there."""
    folder = csrc()
    return folder is None or not (folder / part).is_dir() or carried(library) == digest(folder / part)
