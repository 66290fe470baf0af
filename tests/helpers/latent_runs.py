"""Models with Megatron's multi-latent attention in float64 that exchange latents; ``compare`` runs on each rank.

The expected results are those of the same model and tensor parallelism without context parallelism, with Megatron's own
up-projection: the last hidden states, and the gradients of all parameters, including the up-projection's.
"""

import contextlib
import zlib
from dataclasses import dataclass, field
from unittest import mock

import model_runs
import torch
import torch.distributed as dist
from batch_runs import RECOMPUTE, batch_of, split
from kept_groups import megatron_groups
from megatron_version import MINOR as VERSION
from model_cases import HYBRID, MLA, MODEL, RING, ULYSSES, VOCABULARY, packed_params

ROWS = 2
TRAVELS = MLA["kv_lora_rank"] + MLA["qk_pos_emb_head_dim"]  # elements per token
OF_HEADS = MODEL["num_attention_heads"] * (MLA["qk_head_dim"] + MLA["qk_pos_emb_head_dim"] + MLA["v_head_dim"])
UP_PROJECTION = {"recompute_granularity": "selective", "recompute_modules": ["mla_up_proj"]}
CORE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
YARN = {"rope_type": "yarn", "rotary_scaling_factor": 4, "mscale": 0.7, "q_lora_rank": None}
LATENT = {"mla_exchange": "latent"}


@dataclass(frozen=True)
class Run:
    """One setting.

    Args:
        parallel: settings of ContextParallelConfig. settings: settings of the model besides MLA. documents: if packed.
        fused: whether the up-projection accumulates its gradient in main_grad.
        elements: elements of keys and values that a rank's forward pass sends per token and layer; None if another test
            checks it.
    """

    parallel: dict
    settings: dict = field(default_factory=dict)
    documents: tuple | None = None
    seq_len: int = 24
    fused: bool = False
    elements: float | None = None


RUNS = {
    "ring": Run({"algorithm": RING}, elements=TRAVELS),
    "ring of heads": Run({"algorithm": RING, "mla_exchange": "heads"}, elements=OF_HEADS),
    "mesh, yarn, whole queries": Run(
        {"algorithm": RING, "kv_exchange": "mesh", "in_flight": 2, **LATENT}, YARN, seq_len=25
    ),
    "up-projection recomputed": Run({"algorithm": RING, "kv_exchange": "direct"}, UP_PROJECTION, seq_len=27),
    "core attention recomputed": Run({"algorithm": ULYSSES, **LATENT}, CORE, elements=TRAVELS),
    "layers recomputed, attention kept": Run(
        {"algorithm": RING, "keep_attention": True, "kv_cache_policy": "half"}, RECOMPUTE
    ),
    "gradient accumulation fused": Run({"algorithm": ULYSSES, "ulysses_chunks": 2, **LATENT}, fused=True),
    "packed": Run({"algorithm": RING, "batch_layout": "balanced"}, documents=(0, 5, 6, 17), seq_len=23),
}
# On two tensor-parallel ranks; with sequence parallelism each has a part of the latent.
SPLIT = {
    "tensor parallelism": Run({"algorithm": RING, **LATENT}, {"tensor_model_parallel_size": 2}, elements=TRAVELS),
    "sequence parallelism": Run(
        {"algorithm": RING, **LATENT},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True} | UP_PROJECTION,
        elements=TRAVELS,
    ),
    "sequence parallelism, heads split": Run(
        {"algorithm": ULYSSES, **LATENT}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    ),
    "hybrid": Run({"algorithm": HYBRID, "ulysses_degree": 2, **LATENT}, seq_len=26),
}


def runs(named):
    """The runs that this version supports: Megatron's local layers take packed sequences from 0.16 on, and 0.14 calls
    YaRN's constructor with its arguments in the wrong order.
    """
    absent = {"packed": VERSION < (0, 16), "yarn": VERSION == (0, 14)}
    return {name: run for name, run in named.items() if not any(absent[word] and word in name for word in absent)}


def build(cp_size, run):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.parallel_state import get_tensor_model_parallel_rank
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    model_parallel_cuda_manual_seed(3)
    settings = MODEL | MLA | run.settings
    normed = settings["q_lora_rank"] is not None
    config = MLATransformerConfig(
        **settings, qk_layernorm=normed, params_dtype=torch.float64, context_parallel_size=cp_size
    )
    spec = get_gpt_layer_local_spec(multi_latent_attention=True, qk_layernorm=normed)
    model = GPTModel(config, spec, VOCABULARY, 64, post_process=False, position_embedding_type="rope").double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            place = get_tensor_model_parallel_rank() if getattr(parameter, "tensor_model_parallel", False) else 0
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {place}".encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return model


def passed(model, local, run, weights):
    """(last hidden states of a rank's tokens, name -> gradient, traffic of the forward pass).

    Args:
        weights: the gradient of the hidden states.
    """
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    from mindspeed_cp.comm import count_bytes

    # Megatron's own fused gradients need CUDA.
    fused = run.fused and model.config.context_parallel_size > 1
    ups = [layer.self_attention.linear_kv_up_proj for layer in model.decoder.layers] if fused else []
    for up in ups:
        up.gradient_accumulation_fusion, up.weight.grad_added_to_main_grad = True, False
        up.weight.main_grad = torch.zeros_like(up.weight)
    with count_bytes() as sent:
        packed = packed_params(run.documents, run.seq_len)
        hidden = model(local["tokens"], local["position_ids"], None, packed_seq_params=packed)
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    hidden.backward(weights)
    for up in ups:
        assert up.weight.grad_added_to_main_grad
        up.weight.grad = up.weight.main_grad
    return hidden.detach(), {name: summed(parameter) for name, parameter in model.named_parameters()}, sent


def summed(parameter):
    from megatron.core import parallel_state

    gradient = parameter.grad.clone()
    dist.all_reduce(gradient, group=parallel_state.get_context_parallel_group())
    if getattr(parameter, "sequence_parallel", False):
        dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
    return gradient


@contextlib.contextmanager
def groups(run, cp_size):
    from mindspeed_cp import ContextParallelConfig, megatron_adaptor

    parallel = run.parallel if cp_size > 1 else {}
    megatron_adaptor.configure(ContextParallelConfig(context_parallel_size=cp_size, **parallel))
    tp_size = run.settings.get("tensor_model_parallel_size", 1)
    with megatron_groups(context_parallel_size=cp_size, tensor_model_parallel_size=tp_size):
        yield megatron_adaptor.state()


def compare(rank, named, cp_size=2):
    """Name -> (largest difference of hidden states and gradients, bytes of keys and values / expected bytes)."""
    import trainer.quiet  # noqa: F401

    import mindspeed_cp.megatron.bridge
    from mindspeed_cp import megatron_adaptor  # noqa: F401

    found = {}
    for name, run in named.items():
        batch = batch_of(((0, run.seq_len),) * (1 if run.documents else ROWS), seq=run.seq_len)
        weights = torch.randn(
            run.seq_len, len(batch["tokens"]), MODEL["hidden_size"], generator=torch.Generator().manual_seed(1)
        ).double()
        with (
            groups(run, 1),
            mock.patch.object(mindspeed_cp.megatron.bridge, "context_parallel_attention", model_runs.dense_attention),
        ):
            whole, gradients, _ = passed(build(1, run), batch, run, weights)
        size = cp_size if run.parallel["algorithm"] != HYBRID else 4
        with groups(run, size) as state:
            local = (
                state.shard_batch(batch, cu_seqlens=(*run.documents, run.seq_len)) if run.documents else split(batch)
            )
            held = state.records.find(local.values()).layout.positions(state.cp_rank)
            own, own_gradients, sent = passed(build(size, run), local, run, weights[held])
        worst = float((own - whole[held]).abs().max())
        for parameter, gradient in gradients.items():
            worst = max(worst, float((own_gradients[parameter] - gradient).abs().max()))
        expected = MODEL["num_layers"] * len(held) * ROWS * (run.elements or 0) * 8 * (size - 1)
        found[name] = worst, sent.bytes["kv"], expected
    return found
