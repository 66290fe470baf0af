"""Megatron's TEDotProductAttention with a fake Transformer Engine release; ``run_release`` runs it on two ranks."""

import contextlib
import inspect
import multiprocessing
import os
import tempfile
from unittest import mock

HEADS, GROUPS, DIM, SEQ = 4, 2, 8, 24
DOCUMENTS = (0, 5, 6, 17, SEQ)
ALGORITHMS = ("ulysses_cp_algo", "megatron_cp_algo")
# Name -> (settings of TransformerConfig, arguments of the module, mask type, arguments of the reference's pairs).
CASES = {
    "causal": ({}, {}, "causal", {"causal": True}),
    "no mask": ({}, {}, "no_mask", {}),
    "bottom right": ({}, {}, "causal_bottom_right", {"causal": True}),
    "scale": ({}, {"softmax_scale": 0.7}, "causal", {"causal": True}),
    "head sizes": ({}, {"softmax_scale": 0.3, "k_channels": 12, "v_channels": DIM}, "causal", {"causal": True}),
    "window": ({"window_size": (7, 0)}, {}, "causal", {"causal": True, "window": (7, 0)}),
    "off-by-one": ({"softmax_type": "off-by-one"}, {}, "causal", {"causal": True}),
    "learnable": ({"softmax_type": "learnable"}, {}, "causal", {"causal": True}),
    "packed": ({}, {}, "padding_causal", {"causal": True, "cu_seqlens": DOCUMENTS}),
}
REFUSED = ("fp8_dot_product_attention", "fp8_multi_head_attention", "qk_clip", "log_max_attention_logit")


def run_release(release):
    """Results of both ranks for one release, in rank order; the process imports the fake and Megatron, then forks."""
    import fake_transformer_engine

    fake_transformer_engine.install(release)
    from mindspeed_cp import megatron_adaptor  # noqa: F401  once, for both ranks

    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.starmap_async(_run, [(rank, folder) for rank in range(2)], chunksize=1).get(100)


def _run(rank, folder):
    import torch
    import torch.distributed as dist
    from fake_transformer_engine import CALLS
    from megatron.core import parallel_state

    from mindspeed_cp import ContextParallelConfig, SequenceLayout, megatron_adaptor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {"differences": {}, "calls": {}}
    for algorithm in ALGORITHMS:
        config = ContextParallelConfig(context_parallel_size=2, algorithm=algorithm)
        megatron_adaptor.configure(config)
        initialize(2)
        layout = SequenceLayout.build(config, SEQ)
        for name in cases():
            found["differences"][f"{algorithm} {name}"] = _difference(layout, rank, name)
        found["refused"] = {name: _message(lambda name=name: module(2, {name: True})) for name in refusable()}
        found["layers"] = [_layer(latent) for latent in (False, True)]
        found["dropout"] = _dropout(layout, rank)
        found["calls"][algorithm] = [name for name, _ in CALLS]
        parallel_state.destroy_model_parallel()
    found["alone"] = _alone()
    with mock.patch.object(megatron_adaptor.state(), "sizes", {1: ()}):  # dynamic context parallelism
        found["refused"] |= {
            f"dynamic {name}": _message(lambda name=name: module(1, {name: True})) for name in refusable()
        }
    dist.barrier()
    return found


def initialize(cp_size):
    """Make Megatron's process groups."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    with open(os.devnull, "w") as nowhere, mock.patch("sys.stdout", nowhere):
        parallel_state.initialize_model_parallel(context_parallel_size=cp_size)
    model_parallel_cuda_manual_seed(5)


def module(cp_size, settings, mask_type="causal", **arguments):
    """Megatron's own class, built by its own code; the fake rejects arguments that the release does not have."""
    import torch
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    config = TransformerConfig(
        num_layers=2,
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        context_parallel_size=cp_size,
        **{"attention_dropout": 0.0, **settings},
    )
    # The only thing that Megatron needs from a device here is a CUDA stream.
    with mock.patch.object(torch.cuda, "Stream", object):
        return TEDotProductAttention(config, 1, AttnMaskType[mask_type], "self", **arguments)


def cases():
    """Names of the cases that this Megatron and this Transformer Engine support."""
    import transformer_engine as te
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    known = set(inspect.signature(TransformerConfig).parameters)
    if "softmax_type" not in inspect.signature(te.pytorch.DotProductAttention.__init__).parameters:
        known.discard("softmax_type")
    return [
        name
        for name, (settings, _, mask_type, _) in CASES.items()
        if known.issuperset(settings) and mask_type in AttnMaskType.__members__
    ]


def refusable():
    """The fields that this Megatron's configuration has."""
    from megatron.core.transformer import TransformerConfig

    return [name for name in REFUSED if name in inspect.signature(TransformerConfig).parameters]


def tensors(batch, key_dim=DIM):
    """Query, key, value and the gradient of the output for the whole sequence."""
    import torch

    generator = torch.Generator().manual_seed(11)
    sizes = ((HEADS, key_dim), (GROUPS, key_dim), (GROUPS, DIM), (HEADS, DIM))
    shapes = [(SEQ, batch, *size) for size in sizes]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _difference(layout, rank, name):
    """Largest difference of the output and of every gradient from dense attention over the whole sequence."""
    import reference
    import torch
    import torch.distributed as dist
    from megatron.core.transformer.enums import AttnMaskType

    settings, arguments, mask_type, pairs = CASES[name]
    packed = "cu_seqlens" in pairs
    attention = module(2, settings, mask_type, **arguments).double()
    whole = tensors(1 if packed else 2, arguments.get("k_channels", DIM))
    offset = attention.softmax_offset
    if name == "learnable":
        with torch.no_grad():
            offset.copy_(torch.linspace(-1, 2, HEADS))
    allowed, scale = reference.allowed_pairs(SEQ, **pairs), arguments.get("softmax_scale")
    expected = reference.attention_with_gradients(*whole, allowed, sinks=offset, softmax_scale=scale)
    shards = [layout.shard(tensor, rank) for tensor in whole]
    *qkv, grad_out = [tensor.squeeze(1) for tensor in shards] if packed else shards
    leaves = [tensor.clone().requires_grad_() for tensor in qkv]
    with _batch(pairs.get("cu_seqlens")) as packed_seq_params:
        out = attention(
            *leaves,
            None,
            attn_mask_type=AttnMaskType[mask_type],
            attention_bias=None,
            packed_seq_params=packed_seq_params,
            **_further(attention),
        )
    out.backward(grad_out.flatten(-2))
    parts = [(out, expected["out"].flatten(-2))]
    parts += [(leaf.grad, expected[key]) for leaf, key in zip(leaves, ("dq", "dk", "dv"))]
    parts = [(ours, layout.shard(theirs, rank)) for ours, theirs in parts]
    if name == "learnable":
        dist.all_reduce(offset.grad)
        parts.append((offset.grad, expected["d_offset"]))
    return max(float((ours - theirs.reshape(ours.shape)).detach().abs().max()) for ours, theirs in parts)


def _further(attention):
    """Further arguments of this Megatron's class."""
    return {"num_splits": 1} if "num_splits" in inspect.signature(attention.forward).parameters else {}


def _batch(documents):
    """Context manager in which a batch of SEQ tokens runs; yields its PackedSeqParams, or None without documents.

    If possible they contain the group with which Megatron's own class calls set_context_parallel_group.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.utils import get_batch_on_this_cp_rank

    from mindspeed_cp import megatron_adaptor

    @contextlib.contextmanager
    def running():
        state = megatron_adaptor.state()
        batch = get_batch_on_this_cp_rank({"tokens": torch.zeros(2, SEQ, dtype=torch.long)})
        params = None
        if documents is not None:
            ends = torch.tensor(documents, dtype=torch.int32)
            params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)
            if hasattr(params, "cp_group"):
                params.cp_group, params.local_cp_size = parallel_state.get_context_parallel_group(), 2
        with state.running(state.records.find(batch.values())):
            yield params

    return running()


def _layer(latent):
    """The class of core attention in a layer that Megatron builds with Transformer Engine, and whether the layer's own
    scale and dropout are used.
    """
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    config = (MLATransformerConfig if latent else TransformerConfig)(
        num_layers=2,
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        context_parallel_size=2,
        use_cpu_initialization=True,
        multi_latent_attention=latent,
    )
    with mock.patch.object(torch.cuda, "Stream", object):
        layer = build_module(
            get_gpt_layer_with_transformer_engine_spec(multi_latent_attention=latent), config=config, layer_number=2
        )
    if latent:
        assert type(layer.self_attention.linear_kv_up_proj).forward.holds_latents_back
    core, scale = layer.self_attention.core_attention, layer.self_attention.softmax_scale if latent else None
    return type(core).__name__, core.asked_softmax_scale == scale, core.asked_dropout == config.attention_dropout


def _dropout(layout, rank):
    """Whether dropout is applied: with the configuration's probability, with the layer's own, in evaluation."""
    from megatron.core.transformer.enums import AttnMaskType

    *qkv, _ = [layout.shard(tensor, rank) for tensor in tensors(2)]

    def run(attention):
        with _batch(None):
            return attention(*qkv, None, attn_mask_type=AttnMaskType.causal)

    plain = run(module(2, {}))
    dropping = module(2, {"attention_dropout": 0.5})
    outputs = [run(dropping), run(module(2, {"attention_dropout": 0.5}, attention_dropout=0.0)), run(dropping.eval())]
    return [bool((out != plain).any()) for out in outputs]


def _alone():
    """The call of Transformer Engine with context_parallel_size 1: (method, whether it got Megatron's own tensors, mask
    type, bias type).
    """
    from fake_transformer_engine import CALLS
    from megatron.core.transformer.enums import AttnMaskType

    from mindspeed_cp import ContextParallelConfig, megatron_adaptor

    megatron_adaptor.configure(ContextParallelConfig(context_parallel_size=1))
    initialize(1)
    CALLS.clear()
    query, key, value, _ = tensors(2)
    out = module(1, {})(query, key, value, None, attn_mask_type=AttnMaskType.causal, attention_bias=query)
    ((name, given),) = CALLS
    is_theirs = out.equal(query.flatten(-2)) and given["key_layer"] is key and given["core_attention_bias"] is query
    return name, is_theirs, given["attn_mask_type"], given["core_attention_bias_type"]


def _message(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""
