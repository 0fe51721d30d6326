"""The Linears of vision transformers, and the work that an adapted Linear needs."""

from typing import NamedTuple


class Layer(NamedTuple):
    """One kind of Linear in a model: x [M, K] -> y [M, N] with M = images * tokens."""

    name: str  # qkv, proj, fc1, fc2; in Swin with its stage: stage1.qkv
    K: int
    N: int
    slices: int  # S: adapters side by side, 3 in a fused qkv
    tokens: int  # rows of x per image
    count: int  # how many such Linears the model has

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]


KINDS = ("qkv", "proj", "fc1", "fc2")
# images of 224 x 224: width, depth, tokens (patches and class token)
_VIT = {"vit_b": (768, 12, 197), "vit_l": (1024, 24, 197), "vit_h": (1280, 32, 257)}
# width of stage 1, blocks per stage; 56 * 56 patches in stage 1, in whole windows of 7 * 7, then a quarter per stage
_SWIN = {"swin_t": (96, (2, 2, 6, 2)), "swin_b": (128, (2, 2, 18, 2)), "swin_l": (192, (2, 2, 18, 2))}
MODELS = (*_VIT, *_SWIN)


def _block(prefix: str, width: int, tokens: int, count: int) -> list[Layer]:
    sizes = (width, 3 * width, 3), (width, width, 1), (width, 4 * width, 1), (4 * width, width, 1)
    return [Layer(prefix + kind, *size, tokens, count) for kind, size in zip(KINDS, sizes)]


def layers(model: str) -> list[Layer]:
    """The kinds of Linears of a model, in the order of a block; for Swin stage by stage."""
    if model in _VIT:
        width, depth, tokens = _VIT[model]
        return _block("", width, tokens, depth)
    width, depths = _SWIN[model]
    return [
        layer for s, depth in enumerate(depths) for layer in _block(f"stage{s + 1}.", width << s, (56 >> s) ** 2, depth)
    ]


def work(M: int, K: int, N: int, R: int, itemsize: int) -> dict[str, tuple[int, int]]:
    """{pass: (FLOPs, bytes)} that a fused adapted Linear needs if every matrix moves once.

    forward            p = x down;  y = x w.T + b + p up                                reads x, w, b, down, up
    backward           dp = dy up.T, dup = p.T dy, dx = dy w + dp down.T, ddown = x.T dp  reads dy, x, p, w, down, up

    The forward of a training step also writes the p that its backward reads.
    """
    factors = R * (K + N)
    forward = 2 * M * (K * N + factors), itemsize * (M * (K + N) + K * N + N + factors)
    backward = 2 * M * (K * N + 2 * factors), itemsize * (M * (N + 2 * K + R) + K * N + 2 * factors)
    both = forward[0] + backward[0], forward[1] + backward[1] + itemsize * M * R
    return {"forward": forward, "backward": backward, "forward+backward": both}
