"""The options of EFFT as a method of PEFT, and its name among those of PEFT's methods."""

from dataclasses import InitVar, dataclass, field, fields

from peft import PeftConfig
from peft.utils import PeftType

from ..configs import EFFTConfig


def _register_type(name: str) -> None:
    """Add a member to PeftType, an enum that cannot be extended by subclassing."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_, member._value_, member._sort_order_ = name, name, len(PeftType)
    member.__objclass__ = PeftType
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member


_register_type("EFFT")


@dataclass
class EFFTPeftConfig(PeftConfig):
    """EFFT (arXiv 2311.06749) for PEFT: dW_s = scale * U @ Sigma_s @ V, with U and V shared by a group of matrices.

    Linears whose role in a block is known to :func:`efft_kernels.inject` form the groups of the paper, as there. Those
    of other models, or of shapes that do not fit the paper's groups (grouped-query attention), form one group per
    shape and role, attention or not ("efft1": per shape). A matrix and one of the transposed shape share a group.

    Args:
        variant, rank, scale, cores, factor_dropout, zero_init, targets, blocks, trainable_scale, ffn_rank, init,
            rank_dropout, rank_weights, channel_scale, rank_stabilized: as :class:`efft_kernels.EFFTConfig`. ``targets``
            and ``blocks`` choose among the Linears that are known by name, and ``targets`` among the parts of a fused
            projection; all other Linears in ``target_modules`` are adapted.
        target_modules: names of the Linears, or a regular expression, or "all-linear", as for other methods of PEFT.
            None for what ``targets`` names, or, in a model without known Linears, for PEFT's default for LoRA.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as for other methods of PEFT.
        init_weights: True for factors whose update is zero at the start; False draws all of them at random, for tests.

    Raises:
        ValueError: an option outside its range.
    """

    variant: str = "efft2"
    rank: int | list[int] = 16
    scale: float = 10.0
    cores: str = "per_block"
    factor_dropout: float = 0.1
    zero_init: str = "v"
    targets: list[str] = field(default_factory=lambda: ["attn", "mlp"])
    blocks: list[int] | None = None
    trainable_scale: bool = False
    ffn_rank: int | list[int] | None = None
    init: str = "xavier"
    rank_dropout: float = 0.0
    rank_weights: bool = False
    channel_scale: bool = False
    rank_stabilized: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_weights: bool = True
    dora: InitVar[bool] = False

    def __post_init__(self, dora: bool):
        super().__post_init__()
        if dora:
            raise ValueError(f"dora must be False here, EFFTConfig and inject have it, got {dora!r}")
        self.peft_type = PeftType.EFFT
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list | tuple):
                setattr(self, name, set(value))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, got None")
        method = self.method()
        for name in ("scale", "factor_dropout", "rank_dropout"):  # as numbers that JSON can hold
            setattr(self, name, getattr(method, name))

    def method(self) -> EFFTConfig:
        """The same options as a config of this library."""
        return EFFTConfig(
            **{option.name: getattr(self, option.name) for option in fields(EFFTConfig) if hasattr(self, option.name)}
        )
