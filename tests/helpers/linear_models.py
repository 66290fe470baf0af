"""Models whose layers have a state or a sparse indexer: small ones like Qwen3-Next and DeepSeek-V3.2."""

import copy

import torch.nn.functional as F
from model_cases import PER_TOKEN, RECOMPUTE, Case

DELTA_NET = {
    "num_layers": 3,
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": [1, 1, 0],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_query_groups": 2,
    "activation_func": F.silu,
    "gated_linear_unit": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "layernorm_zero_centered_gamma": False,
}


def delta_net_block(config):
    """Layers of local modules, of which those in ``linear_attention_freq`` are gated delta nets."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    attention = get_gpt_layer_local_spec(normalization=config.normalization)
    norm = attention.submodules.input_layernorm
    linear = copy.deepcopy(attention)
    linear.submodules.self_attention = ModuleSpec(
        GatedDeltaNet, submodules=GatedDeltaNetSubmodules(ColumnParallelLinear, norm, RowParallelLinear)
    )
    layers = [linear if is_linear else attention for is_linear in config.linear_attention_freq]
    return TransformerBlockSubmodules(layers, norm)


LINEAR_CASES = {
    "delta nets": Case(DELTA_NET, block=delta_net_block, steps=2, since=(0, 16)),
    "delta nets, per-token loss": Case(DELTA_NET | PER_TOKEN, block=delta_net_block, since=(0, 16)),
    "delta nets, recomputed": Case(DELTA_NET | RECOMPUTE, block=delta_net_block, since=(0, 16)),
    "delta nets, deterministic": Case(DELTA_NET | {"deterministic_mode": True}, block=delta_net_block, since=(0, 16)),
}
