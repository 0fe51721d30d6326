"""The matrix of a block that a Linear holds, worked out from names and shapes where layouts.py does not know the model.

A block is an entry of a numbered container. In it, a Linear is a q, k, v or output projection by the words of its name,
or one of the two or three matrices of a feed-forward network by its shape.
"""

import re
from collections.abc import Iterable

from torch import nn

_NUMBERED = re.compile(r"(?:\w*_)?\d+")  # blocks.0, and torchvision's encoder_layer_0
_ENTRY = re.compile(rf"((?:.*?\.)??)(?:{_NUMBERED.pattern}(?:\.|$))+")
_WORDS = {
    **dict.fromkeys(("q", "query", "queries", "wq"), "q"),
    **dict.fromkeys(("k", "key", "keys", "wk"), "k"),
    **dict.fromkeys(("v", "value", "values", "wv"), "v"),
    **{"qkv": "qkv", "wqkv": "qkv", "kv": "kv", "qk": "qk"},
}
_OUTPUTS = frozenset(
    "proj out_proj o_proj output_proj c_proj projection projection_out dense to_out out o wo final "
    "out_vision_proj out_text_proj".split()
)
_ATTENTION = re.compile(r"att(?:n|en|_|$)|mhsa|token_mixer", re.IGNORECASE)
_FFN = re.compile(r"mlp|ffn|ff\b|feed_?forward|intermediate", re.IGNORECASE)
_POSITION = re.compile(r"(?:^|[._])(?:pos|position|cpb|rel_pos|meta)(?:[._]|$)", re.IGNORECASE)
SMALLEST = 8  # sides below this leave nothing for a low rank to save

UNKNOWN = "its role in the block is not known"
TOO_SMALL = f"a side of less than {SMALLEST} is too small for a low-rank update"
UNEQUAL = "its q, k and v differ in width"
POSITION = "computes position biases, not tokens"


def block_of(path: str) -> str | None:
    """The path of the innermost numbered module around this one; None outside of numbered containers."""
    names = path.split(".")
    for n in range(len(names) - 1, 0, -1):
        if _NUMBERED.fullmatch(names[n - 1]):
            return ".".join(names[:n])
    return None


def list_of(path: str) -> str | None:
    """The path, and a dot, of the lists in which this module is an entry; None if its name is no number."""
    match = _ENTRY.fullmatch(path)
    return match and match[1]


def roles(linears: dict[str, nn.Linear], taken: Iterable[str] = ()) -> dict[str, tuple[str, ...] | str]:
    """The matrices that the Linears of one block hold, or for each of the others the reason why it has no role.

    Args:
        linears: path inside the block -> Linear, in the order of the model, without those that are known by name.
        taken: paths inside the block of the attention Linears that are known.

    Returns:
        path -> parts, such as ("q",), ("k", "v") or ("fc1",); or path -> a sentence for :class:`LeftOut`.
    """
    found = {}
    rest = {}
    for path, linear in linears.items():
        if _POSITION.search(path):
            found[path] = POSITION
        elif parts := _projection(path):
            found[path] = parts
        else:
            rest[path] = linear
    sources = {_parent(path) for path in (*taken, *(path for path, role in found.items() if role != POSITION))}
    outputs = {path for path in rest if _is_output(path, sources)}
    found |= dict.fromkeys(outputs, ("proj",))
    rest = {path: linear for path, linear in rest.items() if path not in outputs}
    found |= _feed_forward(rest)
    for path, linear in linears.items():
        role = found.setdefault(path, UNKNOWN)
        if isinstance(role, str):
            continue
        if len(role) > 1 and role[0] in "qk" and not _equal_parts(path, len(role), linears, found):
            found[path] = UNEQUAL
        elif min(linear.in_features, linear.out_features // len(role)) < SMALLEST:
            found[path] = TOO_SMALL
    return found


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _name(path: str) -> str:
    """the last name that is not a number: to_out for to_out.0"""
    return next((name for name in reversed(path.split(".")) if not name.isdigit()), "").lower()


def _projection(path: str) -> tuple[str, ...]:
    """the input projections of an attention that the words of the name stand for"""
    parts = dict.fromkeys("".join(_WORDS.get(word, "") for word in _name(path).split("_")))
    return tuple(part for part in ("q", "k", "v") if part in parts)


def _is_output(path: str, sources: set[str]) -> bool:
    """whether it is the output projection of one of the attentions whose inputs are at ``sources``"""
    if _name(path) not in _OUTPUTS or not sources:
        return False
    parent = _parent(path)
    if parent.rpartition(".")[2].isdigit() or _name(path) == "to_out":
        parent = _parent(path if not path.endswith(".0") else _parent(path))
    if parent in sources:
        return True
    # attention.self.query beside attention.output.dense
    attention = [name for name in path.split(".")[:-1] if _ATTENTION.search(name)]
    return bool(attention) and any(source.startswith(path.split(attention[0])[0] + attention[0]) for source in sources)


def _feed_forward(linears: dict[str, nn.Linear]) -> dict[str, tuple[str, ...]]:
    """two or three matrices of a feed-forward network: those of one module first, then what is left in the block"""
    found = {}
    modules = {}
    for path in linears:
        modules.setdefault(_parent(path), []).append(path)
    for parent, paths in modules.items():
        if parent and any(part.isdigit() for part in parent.split(".")) and not _FFN.search(parent):
            continue
        found |= _matched(linears, paths, bool(_FFN.search(parent)))
    rest = [path for path in linears if path not in found]
    for size in (3, 2):
        for i in range(len(rest) - size + 1):
            if not found.keys() & set(rest[i : i + size]):
                found |= _matched(linears, rest[i : i + size], False)
    return found


def _matched(linears: dict[str, nn.Linear], paths: list[str], named: bool) -> dict[str, tuple[str, ...]]:
    shapes = [(linears[path].in_features, linears[path].out_features) for path in paths]
    if len(paths) not in (2, 3):
        return {}
    *before, (H, N) = shapes
    last = paths[-1]
    if len(paths) == 3 and shapes[1] == shapes[0][::-1] and shapes[0] == shapes[2]:  # registered as w1, w2, w3
        before, (H, N), last = [shapes[0], shapes[2]], shapes[1], paths[1]
    first = [path for path in paths if path != last]
    K = before[0][0]
    wider = H > K or (named and H == K)
    if not (wider and N == K and len(set(before)) == 1) and not (named and N == K and len(before) == 1):
        return {}
    if before[0][1] == H:
        if len(first) == 1:
            return {first[0]: ("fc1",), last: ("fc2",)}
        gate = next((path for path in first if re.search(r"gate|_g$", path)), first[0])
        return {path: ("gate",) if path == gate else ("fc1",) for path in first} | {last: ("fc2",)}
    if len(before) == 1 and before[0][1] == 2 * H:
        return {first[0]: ("gate", "fc1"), last: ("fc2",)}
    return {}


def _equal_parts(path: str, n: int, linears: dict[str, nn.Linear], found: dict) -> bool:
    """whether a fused projection holds n matrices of one width, as the output projection beside it tells"""
    N = linears[path].out_features
    if N % n:
        return False
    beside = [p for p, role in found.items() if role == ("proj",) and _parent(p) == _parent(path) and p in linears]
    return not beside or linears[beside[0]].in_features * n == N
