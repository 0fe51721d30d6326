"""nn.MultiheadAttention whose projections are Linears that it calls, so that they can be adapted.

torch keeps the weight of its input projection as a parameter of the attention, and hands that of its output projection
to a function: it calls no Linear. Here each projection is seen as a Linear, by a path that does not exist as a module
(``attn.in_proj``), and an attention in which one is adapted gets a class whose forward calls them. Parameters and their
names stay where they are.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OutputProjection = nn.modules.linear.NonDynamicallyQuantizableLinear  # the class of out_proj
_PARTS = {"in_proj": ("q", "k", "v"), "q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",)}
_KEPT = "_efft_projections"  # attribute of an attention: name -> Projection, of those that are adapted


class Projection(nn.Linear):
    """An input projection of an nn.MultiheadAttention as a Linear. It owns nothing: its weight and bias are those of
    the attention. ``in_proj`` holds q, k and v side by side; with kdim or vdim there are ``q_proj``, ``k_proj`` and
    ``v_proj``.
    """

    def __init__(self, attention: nn.MultiheadAttention, name: str):
        nn.Module.__init__(self)
        self.attention, self.name = (attention,), name  # a tuple, which registers nothing
        self.out_features, self.in_features = self.weight.shape
        self.training = attention.training

    @property
    def parts(self) -> tuple[str, ...]:
        """The matrices that it holds side by side."""
        return _PARTS[self.name]

    @property
    def weight(self) -> nn.Parameter:  # [N, K]
        return getattr(self.attention[0], f"{self.name}_weight")

    @property
    def bias(self) -> Tensor | None:  # [N]
        (attention,) = self.attention
        bias = attention.in_proj_bias
        if bias is None or self.name == "in_proj":
            return bias
        return bias.view(3, -1)["qkv".index(self.name[0])]

    def keep(self) -> None:
        """Be the one that the attention calls, from now on."""
        self.attention[0].__dict__.setdefault(_KEPT, {})[self.name] = self

    def drop(self) -> None:
        """Undo :meth:`keep`."""
        self.attention[0].__dict__.get(_KEPT, {}).pop(self.name, None)


def projections(module: nn.Module) -> dict[str, Projection]:
    """name -> input projection of a module that is an nn.MultiheadAttention; empty for any other, and for a subclass,
    which may compute something else."""
    if type(module) not in (nn.MultiheadAttention, CallingAttention):
        return {}
    kept = module.__dict__.get(_KEPT, {})
    names = ("in_proj",) if module._qkv_same_embed_dim else ("q_proj", "k_proj", "v_proj")
    return {name: kept.get(name) or Projection(module, name) for name in names}


def with_projections(named: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """These (path, module), and behind each attention its input projections."""
    for path, module in named:
        yield path, module
        for name, projection in projections(module).items():
            yield f"{path}.{name}" if path else name, projection


class CallingAttention(nn.MultiheadAttention):
    """An nn.MultiheadAttention that calls its projections: the same arguments, results and parameters.

    Made by changing the class of one. None of torch's fast paths, which read the weights, is taken.
    """

    def train(self, mode: bool = True) -> "CallingAttention":
        for projection in self.__dict__.get(_KEPT, {}).values():
            projection.training = mode
        return super().train(mode)

    def forward(
        self,
        query: Tensor,  # [B, L, E] with batch_first, [L, B, E] without, [L, E] without a batch
        key: Tensor,  # [B, S, kdim] and so on
        value: Tensor,  # [B, S, vdim] and so on
        key_padding_mask: Tensor | None = None,  # [B, S]
        need_weights: bool = True,
        attn_mask: Tensor | None = None,  # [L, S] or [B * heads, L, S]
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if any(t.is_nested for t in (query, key, value)):
            raise ValueError(
                "query, key and value must not be nested tensors: torch takes those in a fast path alone, which calls "
                "no adapted layer; pass padded ones with key_padding_mask"
            )
        if is_causal and attn_mask is None:
            raise ValueError("is_causal says that attn_mask is causal, so it needs attn_mask")
        q, k, v = self._project(query, key, value)
        if not (batched := query.dim() == 3):
            q, k, v = (t.unsqueeze(0) for t in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        B, L, E = q.shape
        # as torch, which then hides the keys that add_bias_kv and add_zero_attn put behind the others
        causal = is_causal and key_padding_mask is None and not need_weights
        more = 0  # keys behind those of the sequence
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(B, 1, E)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(B, 1, E)], 1)
            more += 1
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            more += 1
        mask = None if causal else self._mask(q, k.shape[2] - more, more, attn_mask, key_padding_mask)
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.mT
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout, self.training)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        mixed = mixed.transpose(1, 2).flatten(2)
        if not batched:
            mixed = mixed.squeeze(0)
        elif not self.batch_first:
            mixed = mixed.transpose(0, 1)
        return self.out_proj(mixed), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        E = self.embed_dim
        if not self._qkv_same_embed_dim:
            given = {"q_proj": query, "k_proj": key, "v_proj": value}
            return tuple(self._call(name, x, i * E, E) for i, (name, x) in enumerate(given.items()))
        if query is key and key is value:
            return self._call("in_proj", query, 0, 3 * E).chunk(3, -1)
        if key is value:
            return self._call("in_proj", query, 0, E), *self._call("in_proj", key, E, 2 * E).chunk(2, -1)
        return tuple(self._call("in_proj", x, i * E, E) for i, x in enumerate((query, key, value)))

    def _call(self, name: str, x: Tensor, start: int, count: int) -> Tensor:
        """the outputs start to start + count of q, k and v side by side"""
        weight, bias = getattr(self, f"{name}_weight"), self.in_proj_bias
        columns = None
        if name == "in_proj" and count < len(weight):
            columns = slice(start, start + count)
            weight = weight[columns]
        bias = bias if bias is None or count == len(bias) else bias[start : start + count]
        projection = self.__dict__.get(_KEPT, {}).get(name)
        return F.linear(x, weight, bias) if projection is None else projection.add_to(x, weight, bias, columns)

    def _mask(self, q: Tensor, S: int, more: int, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """what is added to the scores [B, heads, L, S + more], in a shape that broadcasts to it"""
        B, H, L, _ = q.shape
        masks = []
        if mask is not None:
            mask = _added("attn_mask", mask, ((L, S), (B * H, L, S)), q.dtype)
            masks.append(mask.view(B, H, L, S) if mask.dim() == 3 else mask)
        if padding is not None:
            masks.append(_added("key_padding_mask", padding, ((B, S),), q.dtype)[:, None, None])
        return F.pad(sum(masks[1:], masks[0]), (0, more)) if masks else None


def _added(name: str, mask: Tensor, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> Tensor:
    """a mask as what is added to scores; True in one of bools keeps a position out"""
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name} must be {' or '.join(str(list(shape)) for shape in shapes)}, got {list(mask.shape)}")
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        raise TypeError(f"{name} must be a bool or floating-point tensor, got {mask.dtype}")
    return mask.to(dtype)
