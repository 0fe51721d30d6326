"""Whole models and the methods of bench_train_step.py: ways to adapt the same frozen backbone.

Backbones are timm's with random weights; the frozen methods share one copy of these, so that all fit into memory.
Attention, norms and the rest of the forward are timm's for all methods, which differ in their Linears alone.
"""

import copy
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import efft_kernels
from baselines import ExternalLinear, onednn
from efft_kernels import EFFTConfig, FacTConfig, LoRAConfig
from efft_kernels.extras import timm

# name in timm, options of its constructor, what the side of an image must be a multiple of
MODELS = {
    "vit_b": ("vit_base_patch16_224", {}, 16),
    "vit_l": ("vit_large_patch16_224", {}, 16),
    "swin_t": ("swin_tiny_patch4_window7_224", {}, 32),
    "swin_b": ("swin_base_patch4_window7_224", {}, 32),
}
CLASSES = 100
DROPOUT = 0.1  # of factors in EFFT's code, of activations in FacT's


def backbone(model: str, image: int, dtype: torch.dtype, device: str) -> nn.Module:
    """A model of MODELS with random weights, all frozen, in train mode. No drop-path, which would only add noise."""
    name, options, _ = MODELS[model]
    torch.manual_seed(0)
    made = timm().create_model(name, img_size=image, num_classes=CLASSES, drop_path_rate=0.0, **options)
    return made.to(device, dtype).requires_grad_(False).train()


def share(base: nn.Module) -> nn.Module:
    """A copy of the model that shares its weights, except for the head, which is copied and trained."""
    own = {id(p) for p in base.head.parameters()}
    model = copy.deepcopy(base, {id(p): p for p in base.parameters() if id(p) not in own})
    model.head.requires_grad_(True)
    return model


def adapted(model: nn.Module) -> list[str]:
    """The paths of the Linears that EFFT2 adapts."""
    return [slot.site.path for spec in efft_kernels.plan(model, EFFTConfig()).groups for slot in spec.slots]


def quiet_merge(model: nn.Module, **options) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bfloat16 loses a part of the update, which is not measured here
        return efft_kernels.merge(model, **options)


def _in_plain_torch(base: nn.Module, config, group_of: Callable, linear_of: Callable) -> nn.Module:
    """Replace each Linear of a plan by linear_of(it, its group, slot, scale).

    group_of(spec, a weight) makes what the Linears of a group share.
    """
    model, groups = share(base), nn.ModuleList()
    for spec in efft_kernels.plan(model, config).groups:
        groups.append(group_of(spec, model.get_submodule(spec.slots[0].site.path).weight))
        for slot in spec.slots:
            linear = model.get_submodule(slot.site.path)
            model.set_submodule(slot.site.path, linear_of(linear, groups[-1], slot, config.scale))
    model.updates = groups
    return model


class DenseUpdates(nn.Module):
    """The factors of a group and its dense dW_s = u @ sigma_s @ v, formed in every call with new dropout masks.

    As in the released EFFT code, q, k, v and the output projection of a block share a mask; fc1 and fc2 have one each.
    """

    def __init__(self, spec, like: Tensor):
        super().__init__()
        P, Q = spec.rank
        self.u = nn.Parameter(nn.init.xavier_uniform_(like.new_empty(spec.K, P)))  # [K, P]
        self.sigma = nn.Parameter(like.new_empty(spec.cores, P, Q))  # [S, P, Q]
        self.v = nn.Parameter(like.new_zeros(Q, spec.N))  # [Q, N]
        for core in self.sigma.detach():
            nn.init.xavier_uniform_(core)
        self.calls = {}
        for slot in spec.slots:
            self.calls.setdefault(slot.call, []).append(slot)
        self.formed = {}  # {path: its dWs}, between the first and the last Linear of a call

    def take(self, slot) -> list[Tensor]:
        """The dWs [K, N] of one Linear, side by side."""
        if slot.site.path not in self.formed:
            self.formed = self._form(self.calls[slot.call])
        return self.formed.pop(slot.site.path)

    def _form(self, slots) -> dict[str, list[Tensor]]:
        needed = sorted({core for slot in slots for core in slot.cores})
        sigma = self.sigma if len(needed) > 1 else self.sigma[needed[0]]
        sigma, u, v = (F.dropout(t, DROPOUT, self.training) for t in (sigma, self.u, self.v))
        dw = {core: u @ (sigma[core] if len(needed) > 1 else sigma) @ v for core in needed}
        return {slot.site.path: [dw[part.core] for part in slot.parts] for slot in slots}


class DenseLinear(nn.Module):
    """y = x @ weight.T + bias, then y += scale * x @ dW by dense GEMMs; fc2 uses dW transposed."""

    def __init__(self, linear: nn.Linear, group: DenseUpdates, slot, scale: float):
        super().__init__()
        self.linear, self.slot, self.scale = linear, slot, scale
        self.group = (group,)  # in a tuple, so that it is not registered

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        added = [x @ (dw.t() if self.slot.transposed else dw) for dw in self.group[0].take(self.slot)]
        y += (added[0] if len(added) == 1 else torch.cat(added, -1)) * self.scale
        return y


def released_efft(base: nn.Module, o: "Options") -> nn.Module:
    return _in_plain_torch(base, EFFTConfig("efft2", rank=o.rank, cores="shared"), DenseUpdates, DenseLinear)


class FacTLinear(nn.Module):
    """y = x @ weight.T + bias, then y += scale * dropout(x @ u @ sigma_s) @ v for every d x d slice, as in FacT's code.

    q, k and v each compute x @ u. fc1's four slices are concatenated in one sigma [r, 4 r], fc2's in one [4 r, r].
    """

    def __init__(self, linear: nn.Linear, shared: nn.ParameterDict, slot, scale: float):
        super().__init__()
        self.linear, self.shared, self.slot, self.scale = linear, (shared,), slot, scale
        r, n = shared["v"].shape[0], len(slot.parts) // len(slot.site.parts)
        shape = (n * r, r) if slot.transposed else (r, n * r)
        self.sigma = nn.ParameterList(nn.init.xavier_uniform_(linear.weight.new_empty(shape)) for _ in slot.site.parts)

    def forward(self, x: Tensor) -> Tensor:
        (shared,) = self.shared
        u, v = shared["u"], shared["v"]  # [d, r], [r, d]
        y, r = self.linear(x), v.shape[0]
        if self.slot.transposed:
            p = (x.unflatten(-1, (-1, len(u))) @ u).flatten(-2)
            added = [F.dropout(p @ self.sigma[0], DROPOUT, self.training) @ v]
        else:
            p = (F.dropout(x @ u @ sigma, DROPOUT, self.training) for sigma in self.sigma)
            added = [(q.unflatten(-1, (-1, r)) @ v).flatten(-2) for q in p]
        y += (added[0] if len(added) == 1 else torch.cat(added, -1)) * self.scale
        return y


def fact_tt(base: nn.Module, o: "Options") -> nn.Module:
    def factors(spec, like: Tensor) -> nn.ParameterDict:
        u, v = like.new_empty(spec.K, spec.rank[0]), like.new_zeros(spec.rank[0], spec.N)
        return nn.ParameterDict({"u": nn.init.xavier_uniform_(u), "v": v})

    return _in_plain_torch(base, FacTConfig("tt", rank=o.rank), factors, FacTLinear)


def merged(base: nn.Module, o: "Options") -> nn.Module:
    model = share(base)
    # adapters in all blocks need the gradient of every block's input, so compute it here too, although nothing uses it
    model.patch_embed.register_forward_hook(
        lambda module, args, out: out.detach().requires_grad_() if torch.is_grad_enabled() else out
    )
    return model


class OneDNNLinear(nn.Module):
    """y = x @ weight.T + bias and dx = dy @ weight by oneDNN, even if torch would choose another library."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.transposed = linear, linear.weight.detach().t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        return ExternalLinear.apply(x, lambda x: onednn(x, weight, bias), lambda dy: onednn(dy, self.transposed, None))


def merged_onednn(base: nn.Module, o: "Options") -> nn.Module:
    model = merged(base, o)
    for path in adapted(model):
        model.set_submodule(path, OneDNNLinear(model.get_submodule(path)))
    return model


def full(base: nn.Module, o: "Options") -> nn.Module:
    return copy.deepcopy(base).requires_grad_(True)


def peft_lora(base: nn.Module, o: "Options") -> nn.Module:
    timm()  # before peft, which imports transformers and with it the same torchvision
    import peft

    model = share(base)
    # inject_adapter_in_model keeps factors in the model's dtype; get_peft_model makes them float32 and casts every x
    config = peft.LoraConfig(r=o.lora_rank, lora_alpha=o.lora_rank, target_modules=adapted(model))
    peft.inject_adapter_in_model(config, model)
    model.head.requires_grad_(True)
    return model


def accelerated(base: nn.Module, o: "Options") -> nn.Module:
    model = peft_lora(base, o)
    from efft_kernels.peft import accelerate_lora

    return accelerate_lora(model, backend=o.backend)


class Options(NamedTuple):
    rank: int = 16
    lora_rank: int = 8
    backend: str | None = None  # of efft_kernels


class Method(NamedTuple):
    name: str
    meaning: str
    build: Callable[[nn.Module, Options], nn.Module]  # of a backbone
    ours: bool = False


def _efft(config: Callable[[Options], object]):
    return lambda base, o: efft_kernels.inject(share(base), config(o), backend=o.backend)


def efft2_kept(base: nn.Module, o: Options) -> nn.Module:
    model = _efft(lambda o: EFFTConfig("efft2", rank=o.rank))(base, o)
    model.register_forward_pre_hook(lambda *_: efft_kernels.rebuild_inputs(False))
    model.register_forward_hook(lambda *_: efft_kernels.rebuild_inputs(None), always_call=True)
    return model


def methods(device: str) -> tuple[list[Method], dict[str, str]]:
    """All methods for a device, and {name: why} for those that cannot run on it."""
    found = [
        Method("merged", "frozen, head trained, gradient through all blocks: a lower bound for adapters", merged),
        Method("full", "every weight trained", full),
        Method("peft_lora", "LoRA on all Linears by the PEFT library, factors in the model's dtype", peft_lora),
        Method("accelerated", "peft_lora after efft_kernels.peft.accelerate_lora: the same layers and parameters",
               accelerated, True),
        Method("released_efft", f"EFFT2, shared cores, dW formed dense per call, factor dropout {DROPOUT}",
               released_efft),
        Method("fact_tt", f"FacT-TT in plain torch, slice by slice, activation dropout {DROPOUT}", fact_tt),
        Method("efft2", "efft_kernels, EFFT2 as configured by default: factor dropout 0.1",
               _efft(lambda o: EFFTConfig("efft2", rank=o.rank)), True),
        Method("efft2_p0", "efft_kernels, EFFT2 without dropout",
               _efft(lambda o: EFFTConfig("efft2", rank=o.rank, factor_dropout=0.0)), True),
        Method("efft1", "efft_kernels, EFFT1 as configured by default: factor dropout 0.1",
               _efft(lambda o: EFFTConfig("efft1", rank=o.rank)), True),
        Method("efft_lora", "efft_kernels, LoRA on all matrices, q, k and v separately",
               _efft(lambda o: LoRAConfig(rank=o.lora_rank, targets=("attn", "mlp"))), True),
        Method("efft_fact", "efft_kernels, FacT-TT without dropout",
               _efft(lambda o: FacTConfig("tt", rank=o.rank, activation_dropout=0.0)), True),
    ]  # fmt: skip
    left_out = {}
    if device == "cpu" and torch.backends.mkldnn.is_available():
        meaning = "as merged, the blocks' Linears by oneDNN instead of torch's default library"
        found.insert(1, Method("merged_onednn", meaning, merged_onednn))
    else:
        left_out["merged_onednn"] = f"there is no oneDNN on device {device}"
    if device == "cpu":
        found.append(Method("efft2_kept", "as efft2, inputs of Linears kept instead of rebuilt", efft2_kept, True))
    else:
        left_out["efft2_kept"] = f"inputs are kept by every method on device {device}"
    return found, left_out
