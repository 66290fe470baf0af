"""Small models like Qwen3-Next and DeepSeek-V3.2, whose layers have a recurrent state or a sparse indexer."""

import copy

import torch
import torch.nn.functional as F
from kept_groups import megatron_groups
from model_cases import MLA, MODEL, PER_TOKEN, RECOMPUTE, Case
from model_runs import Trainer, compare, groups, said

DELTA_NET = {
    "num_layers": 3,
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": [1, 1, 0],
    "cp_comm_type": "p2p",  # as in Megatron's own arguments, for every layer
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
    """Layers of local modules; those in ``linear_attention_freq`` are gated delta nets."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    attention = get_gpt_layer_local_spec(
        config.num_moe_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
        multi_latent_attention=config.multi_latent_attention,
    )
    norm = attention.submodules.input_layernorm
    linear = copy.deepcopy(attention)
    linear.submodules.self_attention = ModuleSpec(
        GatedDeltaNet, submodules=GatedDeltaNetSubmodules(ColumnParallelLinear, norm, RowParallelLinear)
    )
    layers = [linear if is_linear else attention for is_linear in config.linear_attention_freq]
    return TransformerBlockSubmodules(layers, norm)


class Duplicated(torch.nn.Linear):
    """A substitute for Transformer Engine's linear layer with parallel_mode "duplicated"."""

    def __init__(
        self,
        input_size,
        output_size,
        *,
        config,
        init_method,
        bias,
        skip_bias_add,
        skip_weight_param_allocation,
        parallel_mode,
        **named,
    ):
        assert parallel_mode == "duplicated" and not (bias or skip_bias_add or skip_weight_param_allocation)
        super().__init__(input_size, output_size, bias=False)
        init_method(self.weight)

    def forward(self, rows):
        return super().forward(rows), None


SPARSE = MLA | {
    "experimental_attention_variant": "dsa",
    "dsa_indexer_n_heads": 2,
    "dsa_indexer_head_dim": 8,
    "dsa_indexer_topk": 6,
    "dsa_indexer_loss_coeff": 0.7,
    "dsa_indexer_rotate_activation": False,
}


def sparse_block(config):
    """Layers of local modules with sparse latent attention."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.experimental_attention_variant import absorbed_mla, dsa
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    layer = get_gpt_layer_local_spec(config.num_moe_experts, multi_latent_attention=True)
    indexer = ModuleSpec(
        dsa.DSAIndexer, submodules=dsa.DSAIndexerSubmodules(Duplicated, Duplicated, WrappedTorchNorm, Duplicated)
    )
    names = "linear_q_proj linear_q_down_proj linear_q_up_proj linear_kv_down_proj linear_kv_up_proj".split()
    layer.submodules.self_attention = ModuleSpec(
        absorbed_mla.AbsorbedMLASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=absorbed_mla.AbsorbedMLASelfAttentionSubmodules(
            **dict.fromkeys(names, ColumnParallelLinear),
            core_attention=ModuleSpec(dsa.DSAttention, submodules=dsa.DSAttentionSubmodules(indexer=indexer)),
            linear_proj=RowParallelLinear,
            q_layernorm=IdentityOp,
            kv_layernorm=IdentityOp,
        ),
    )
    return TransformerBlockSubmodules([layer] * config.num_layers, layer.submodules.input_layernorm)


def _delta(settings=None, since=(0, 16), **further):
    return Case(DELTA_NET | (settings or {}), block=delta_net_block, since=since, **further)


def _sparse(settings=None, **further):
    return Case(SPARSE | (settings or {}), block=sparse_block, since=(0, 19), **further)


def sparse_bytes(rank, seq_len):
    """[bytes by purpose that this rank sends forward, and backward] of two layers of sparse attention."""
    import trainer.quiet  # noqa: F401

    from mindspeed_cp import megatron_adaptor  # noqa: F401
    from mindspeed_cp.comm import count_bytes

    with groups({"context_parallel_size": 2, "algorithm": "kvallgather_cp_algo"}):
        runner = Trainer(Case(SPARSE, block=sparse_block), 2, seq_len)
        local = runner.split(runner.mine[0][1])
        with count_bytes() as forward:
            losses = runner.model(local["tokens"], local["position_ids"], None, labels=local["labels"])
        with count_bytes() as backward:
            losses.sum().backward()
    return [{purpose: sent for purpose, sent in each.bytes.items() if sent} for each in (forward, backward)]


PACKED = (0, 5, 6, 23)
LINEAR_CASES = {
    "delta nets": _delta(steps=2),
    "delta nets, per-token loss": _delta(PER_TOKEN),
    "delta nets, recomputed": _delta(RECOMPUTE),
    "delta nets, deterministic": _delta({"deterministic_mode": True}),
    "delta nets, one head": _delta({"linear_num_key_heads": 1, "linear_num_value_heads": 1}),
    "delta nets, packed": _delta(since=(0, 18), documents=(0, 5, 6, 23)),
    "sparse attention": _sparse(steps=2),
    "sparse attention, sparse loss, per token": _sparse({"dsa_indexer_use_sparse_loss": True} | PER_TOKEN),
    "sparse attention, recomputed": _sparse(RECOMPUTE),
    "sparse attention, shared indexes": _sparse({"dsa_indexer_topk_freq": 2}),
    "sparse attention, packed": _sparse(documents=PACKED),
}


LENGTH, WAYS = 24, ((1, "heads"), (2, "heads"), (2, "state"))
MIXER = {"mamba_state_dim": 4, "mamba_head_dim": 8, "mamba_num_groups": 4, "mamba_num_heads": 8}


def mixer_layer(config):
    """The spec of a Mamba mixer of local modules."""
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec

    return ModuleSpec(
        MambaMixer,
        params={"d_model": config.hidden_size},
        submodules=MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear),
    )


# Kind of layer -> (settings of TransformerConfig, config -> the layer's spec).
LAYERS = {
    "delta net": (DELTA_NET, lambda config: delta_net_block(config).layer_specs[0].submodules.self_attention),
    "mixer": (MIXER, mixer_layer),
}


def tensor_parallel(rank):
    """(kind of layer, way) -> largest difference of a layer on two tensor-parallel x two context-parallel ranks from
    the same layer on two tensor-parallel ranks: outputs, gradients of inputs and of weights. Sequence parallelism is
    on, and norms of delta nets are recomputed, which Megatron does only with Transformer Engine. Mixers are skipped
    where they cannot be built, because most versions import Triton for them.
    """
    import trainer.quiet  # noqa: F401

    from mindspeed_cp import ContextParallelConfig, megatron_adaptor
    from mindspeed_cp.patches.state_space import no_mixer

    found, kinds = {}, [kind for kind in LAYERS if kind != "mixer" or not no_mixer()]
    for cp_size, way in WAYS:
        config = ContextParallelConfig(context_parallel_size=cp_size, algorithm="megatron_cp_algo", linear_exchange=way)
        megatron_adaptor.configure(config)
        with megatron_groups(tensor_model_parallel_size=2, context_parallel_size=cp_size):
            for kind in kinds:
                found[kind, cp_size, way] = _layer_alone(cp_size, *LAYERS[kind])
    return {
        (kind, way): max(
            float((mine[name] - value).abs().max() / value.abs().max())
            for name, value in found[kind, 1, "heads"].items()
        )
        for (kind, cp_size, way), mine in found.items()
        if cp_size > 1
    }


def _layer_alone(cp_size, settings, spec):
    """name -> whole output, gradient of the whole input, gradients of this tensor-parallel rank's weights."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module

    from mindspeed_cp import megatron_adaptor
    from mindspeed_cp.megatron.records import MicroBatch

    model_parallel_cuda_manual_seed(3)
    sizes = {"context_parallel_size": cp_size, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    config = TransformerConfig(**(MODEL | settings), **sizes)
    module = build_module(
        spec(config), config=config, layer_number=1, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    module.recompute_norm_out = cp_size > 1
    tp_rank, state = parallel_state.get_tensor_model_parallel_rank(), megatron_adaptor.state()
    generator = torch.Generator().manual_seed(5)
    hidden, grad = (torch.randn(LENGTH, 2, config.hidden_size, generator=generator) for _ in range(2))
    with torch.no_grad():
        for name, weight in module.named_parameters():
            own = torch.Generator().manual_seed(len(name) + 100 * tp_rank * hasattr(weight, "tensor_model_parallel"))
            weight.copy_(torch.randn(weight.shape, generator=own) * 0.3)
    layout = state.layout(LENGTH)
    rows = layout.positions(state.cp_rank).chunk(2)[tp_rank]
    mine = hidden[rows].requires_grad_()
    with state.running(MicroBatch(layout) if cp_size > 1 else None):
        out = module(mine, None)[0]
    out.backward(grad[rows])
    found = {"out": torch.zeros_like(hidden), "hidden": torch.zeros_like(hidden)}
    found["out"][rows], found["hidden"][rows] = out.detach(), mine.grad
    for tensor in found.values():
        dist.all_reduce(tensor, group=parallel_state.get_tensor_and_context_parallel_group())
    for name, weight in module.named_parameters():
        found[name] = weight.grad
        dist.all_reduce(found[name], group=parallel_state.get_context_parallel_group())
    return found


def compare_all(rank, lengths, cases, refused):
    """(name of the run -> name of the case -> difference, name of a case -> message).

    Args:
        lengths: length -> runs as in ``compare``.
        refused: (name of a case, length, settings) that must be rejected.
    """
    found = {}
    for length, parallel in lengths.items():
        found |= compare(rank, length, parallel, cases)
    messages = {}
    for name, length, settings in refused:
        with groups(settings):
            messages[name] = said(cases[name], settings["context_parallel_size"], length)
    return found, messages
