"""Tensor-train adapters of vision transformers, fused: y = x W + b + scale * x U Sigma V without forming the update."""

import sys

from .adapter_file import AdapterFile, read_adapter
from .analysis import Cost, cost, subspace_map, subspace_similarity, updates
from .averaging import average_adapters
from .configs import EFFTConfig, FacTConfig, LoRAConfig, LoRAXSConfig, VeRAConfig
from .export import export_lora
from .files import add_adapter, delete_adapter, disable_adapter, load_adapter, save_adapter, set_adapter
from .inject import Plan, adapter_parameter_groups, adapter_parameters, inject, plan
from .layouts import LeftOut
from .linear import EFFTLinear
from .merge import merge, unmerge
from .ops import Backend, backends, efft_linear, group_update, lowrank_linear, merge_, mixed_linear, rebuild_inputs
from .preparation import Preparation

__version__ = "0.1.0"
__all__ = [
    *("Backend", "EFFTLinear", "backends", "efft_linear", "group_update", "lowrank_linear", "merge_", "mixed_linear"),
    "rebuild_inputs",
    *("EFFTConfig", "FacTConfig", "LoRAConfig", "LoRAXSConfig", "VeRAConfig"),
    *("add_adapter", "average_adapters", "delete_adapter", "disable_adapter"),
    *("export_lora", "load_adapter", "save_adapter", "set_adapter"),
    *("AdapterFile", "Preparation", "read_adapter"),
    *("Cost", "cost", "subspace_map", "subspace_similarity", "updates"),
    *("LeftOut", "Plan", "adapter_parameter_groups", "adapter_parameters", "inject", "merge", "plan", "unmerge"),
]

# makes the statement `import efft_kernels.EFFTLinear` work as well
sys.modules[f"{__name__}.EFFTLinear"] = EFFTLinear
