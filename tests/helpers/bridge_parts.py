"""Megatron's core attention, its inputs, masks and process groups: what bridge_runs compares."""

import contextlib
import io

SEQ, HEADS, GROUPS, DIM = 24, 4, 2, 8
DOCUMENTS = (0, 5, 6, 17, SEQ)
ALGORITHMS = ("ulysses_cp_algo", "megatron_cp_algo")


def tensors(batch=2, seq=SEQ):
    import torch

    generator = torch.Generator().manual_seed(11)
    return [torch.randn(seq, batch, heads, DIM, generator=generator) for heads in (HEADS, GROUPS, GROUPS, HEADS)]


def masks():
    """Name -> dense masks, True = masked out; every row sees itself."""
    import reference
    import torch

    pairs = {
        "causal": reference.allowed_pairs(SEQ, causal=True),
        "documents": reference.allowed_pairs(SEQ, causal=True, cu_seqlens=DOCUMENTS),
    }
    rows = [reference.allowed_pairs(SEQ, causal=True, cu_seqlens=ends) for ends in (DOCUMENTS, (0, 9, SEQ))]
    pairs["documents by row"] = torch.cat(rows)
    seen = torch.rand(2, SEQ, SEQ, generator=torch.Generator().manual_seed(2)) < 0.5
    pairs["neither"] = seen | torch.eye(SEQ, dtype=torch.bool)
    return {name: ~allowed[:, None] for name, allowed in pairs.items()}


def module(cp_size, **settings):
    """Megatron's DotProductAttention for the current process groups."""
    import torch
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    config = TransformerConfig(
        num_layers=2,
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        context_parallel_size=cp_size,
        masked_softmax_fusion=False,
        **{name: value for name, value in ({"attention_dropout": 0.0} | settings).items() if name != "layer_number"},
    )
    attention = DotProductAttention(config, settings.get("layer_number", 1), AttnMaskType.causal, "self")
    if getattr(attention, "softmax_offset", None) is not None:
        with torch.no_grad():
            attention.softmax_offset.copy_(torch.linspace(-1, 2, HEADS) * settings["softmax_type"].count("learnable"))
    return attention


def run(attention, inputs, mask, packed=None):
    """[out, dq, dk, dv] and the gradient of a learnable offset."""
    query, key, value, grad_out = inputs
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    out = attention(*leaves, mask, packed_seq_params=packed)
    out.backward(grad_out.flatten(-2))
    offset = [parameter.grad for parameter in attention.parameters()]
    return [out.detach(), *(leaf.grad for leaf in leaves)], offset


def cases(old):
    """Name -> (settings of TransformerConfig, mask)."""
    found = {name: ({}, mask) for name, mask in masks().items()}
    found |= {
        "no mask": ({}, None),
        "query-key scaling": ({"apply_query_key_layer_scaling": True, "layer_number": 2}, None),
    }
    if not old:
        for left, right in ((7, 0), (3, 2)):
            found[f"window {left} {right}"] = ({"window_size": (left, right)}, None)
        found["window left out"] = ({"window_size": (3, 0), "window_attn_skip_freq": 2, "layer_number": 2}, None)
        found["off-by-one"] = ({"softmax_type": "off-by-one"}, None)
        found["learnable"] = ({"softmax_type": "learnable"}, masks()["documents"])
    return found


def initialize(cp_size):
    """Make Megatron's process groups; returns what was printed."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    with contextlib.redirect_stdout(io.StringIO()) as said:
        parallel_state.initialize_model_parallel(context_parallel_size=cp_size)
    model_parallel_cuda_manual_seed(5)
    return said.getvalue()


def record_of(adaptor, seq_len):
    """The record of a batch of that length, split as in a training step."""
    import torch
    from megatron.core.utils import get_batch_on_this_cp_rank

    batch = get_batch_on_this_cp_rank({"tokens": torch.zeros(2, seq_len, dtype=torch.long)})
    return adaptor.state().records.find(batch.values())


def packed_params(boundaries, qkv_format="thd"):
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor(boundaries, dtype=torch.int32)
    return PackedSeqParams(qkv_format=qkv_format, cu_seqlens_q=ends, cu_seqlens_kv=ends)


def message_of(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""
