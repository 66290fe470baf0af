"""``--spec mamba_stack stack``: a hybrid model of local layers; Megatron's own specs use Transformer Engine's."""

import importlib

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

ADD = get_bias_dropout_add


def _layers():
    mixer = ModuleSpec(MambaMixer, submodules=MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear))
    parts = SelfAttentionSubmodules(ColumnParallelLinear, DotProductAttention, RowParallelLinear)
    attention = ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, parts)
    mlp = ModuleSpec(MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear))
    norm = WrappedTorchNorm
    with_attention = TransformerLayerSubmodules(input_layernorm=norm, self_attention=attention, self_attn_bda=ADD)
    with_mlp = TransformerLayerSubmodules(pre_mlp_layernorm=norm, mlp=mlp, mlp_bda=ADD)
    return {
        "mamba_layer": ModuleSpec(MambaLayer, submodules=MambaLayerSubmodules(norm, mixer, ADD)),
        "attention_layer": ModuleSpec(TransformerLayer, submodules=with_attention),
        "mlp_layer": ModuleSpec(MLPLayer, submodules=with_mlp),
    }


def _stack():
    try:
        found, name = importlib.import_module("megatron.core.models.hybrid.hybrid_block"), "HybridStack"
    except ModuleNotFoundError:  # before 0.18
        found, name = importlib.import_module("megatron.core.ssm.mamba_block"), "MambaStack"
    found.TENorm = WrappedTorchNorm  # the stack's final norm
    return ModuleSpec(getattr(found, name), submodules=getattr(found, f"{name}Submodules")(**_layers()))


stack = _stack()
