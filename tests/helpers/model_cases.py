"""Models, parameters and samples for the tests of whole models."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

import torch
from megatron_version import MINOR as VERSION
from model_shapes import SHAPES

from mindspeed_cp import pack_documents


def has(module):
    """Whether the installed Megatron has this module; checked without importing it, which takes seconds."""
    top, package, *inner = module.split(".")
    # Several versions may be on the path; the first one that has the package is imported.
    folders = (Path(folder, package) for folder in find_spec(top).submodule_search_locations)
    found = next((folder for folder in folders if folder.is_dir()), None)
    return found is not None and (not inner or found.joinpath(*inner).with_suffix(".py").exists())


ULYSSES, RING, HYBRID = "ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo"
BATCH, VOCABULARY, RATE = 2, 64, 0.1
MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 32,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "moe_token_dispatcher_type": "alltoall",
    "init_method_std": 0.1,
}
MTP = {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.5}
MLA = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "rope_type": "rope",
    "add_bias_linear": False,
}
MOE = {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 32,
    "moe_router_topk": 2,
    "moe_aux_loss_coeff": 0.0,
    "add_bias_linear": False,
}
AUX = MOE | {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.3, "moe_z_loss_coeff": 0.2}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PER_TOKEN = {"calculate_per_token_loss": True}
DEEPSEEK = (
    MLA
    | AUX
    | MTP
    | {
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.01,
    }
)


@dataclass(frozen=True)
class Case:
    """One model.

    Args:
        settings: settings of TransformerConfig besides MODEL.
        documents: boundaries of packed documents, None for whole sequences.
        padding: number of tokens at the end of each sequence that losses of experts must ignore.
        steps: number of steps; the second uses the weights that the first has updated.
        model: further keyword arguments of GPTModel.
        layer: keyword arguments of the layer's spec.
        block: config -> the spec of all layers, None if they are equal.
        targets: number of tokens per micro batch that have a loss, None for most of them.
        since: the first Megatron that supports it.
    """

    settings: dict = field(default_factory=dict)
    documents: tuple | None = None
    padding: int = 0
    steps: int = 1
    model: dict = field(default_factory=dict)
    layer: dict = field(default_factory=dict)
    block: Callable | None = None
    targets: int | None = None
    since: tuple = (0, 12)

    @property
    def multimodal(self):
        return self.model.get("position_embedding_type") == "mrope"


CASES = {
    "multi-token prediction": Case(MTP, steps=2),
    "multi-token prediction, per-token loss": Case(MTP | PER_TOKEN),
    "multi-token prediction, packed": Case(MTP, documents=(0, 5, 6, 23)),
    "multi-latent attention": Case(MLA),
    "multi-latent attention, yarn": Case(MLA | {"rope_type": "yarn", "rotary_scaling_factor": 4, "mscale": 0.7}),
    "multi-latent attention, packed": Case(MLA, documents=(0, 5, 6, 23)),
    "experts": Case(MOE),
    "experts, auxiliary losses": Case(AUX),
    "experts, auxiliary loss of each sequence": Case(AUX | {"moe_router_load_balancing_type": "seq_aux_loss"}),
    "experts, auxiliary losses, per-token loss": Case(AUX | PER_TOKEN),
    "experts, auxiliary losses without padding": Case(AUX | PER_TOKEN, padding=11),
    "all of them": Case(DEEPSEEK, steps=2),
    "all of them, recomputed": Case(DEEPSEEK | RECOMPUTE),
    # Without multi-token prediction, whose layers Megatron cannot recompute when sequences are packed.
    "latent attention and experts, packed, recomputed": Case(
        {name: value for name, value in DEEPSEEK.items() if name not in MTP} | RECOMPUTE, documents=(0, 3, 4, 25)
    ),
    "off-by-one softmax": Case({"softmax_type": "off-by-one"}),
    "learnable softmax": Case({"softmax_type": "learnable", "num_query_groups": 2}, steps=2),
}
CASES |= {name: Case(**values) for name, values in SHAPES.items()}
# Lengths of documents that are packed by length over four ranks of eight tokens; the first row is used.
LENGTHS = (3, 20, 5, 9, 4, 2, 11)
ROW = [LENGTHS[place] for place in pack_documents(LENGTHS, ranks=4, tokens=8)[0]]
BY_LENGTH = "all of them, packed by length"
CASES[BY_LENGTH] = Case(DEEPSEEK | PER_TOKEN, documents=(0, *accumulate(ROW)))
# The warnings, or the error, if experts are split over ranks with uneven lengths.
REMARKABLE = {
    "capacity": Case(MOE | {"moe_expert_capacity_factor": 1.0}),
    "sinkhorn": Case(MOE | {"moe_router_load_balancing_type": "sinkhorn"}),
    "allgather": Case(MOE | {"moe_token_dispatcher_type": "allgather"}),
    "nothing remarkable": Case(AUX),
}


def possible(named):
    """Those of the given cases that this version of megatron-core supports."""
    absent = {"packed", "padding"} if VERSION < (0, 16) else set()
    absent |= {"softmax"} if VERSION < (0, 15) else set()
    # Megatron itself raises a TypeError there, even without context parallelism: for multi-token prediction without
    # Transformer Engine from 0.20 on, and with full recomputation in 0.18.
    absent |= {"prediction", "all of them"} if VERSION >= (0, 20) else set()
    absent |= {"all of them, recomputed"} if VERSION == (0, 18) else set()
    return {
        name: case for name, case in named.items() if VERSION >= case.since and not any(word in name for word in absent)
    }


def cases():
    """The cases that this version of megatron-core supports."""
    return possible(CASES)


IN_BF16 = possible(
    {"dense, bf16": Case(), "multi-token prediction, bf16": Case(MTP), "multi-latent attention, bf16": Case(MLA)}
)


def picture_positions(seq_len, documents=None, row=0):
    """(3, seq_len) places in time, height and width, which begin again with each document: text, in the middle of which
    lies an image of 3 x (row + 2) parts, as Qwen-VL counts them.
    """
    ends = [0, *(documents or ())[1:], seq_len]
    found = []
    for length in (stop - start for start, stop in zip(ends, ends[1:])):
        text, columns = length // 3, row + 2
        image = [
            (text, text + part // columns, text + part % columns) for part in range(min(3 * columns, length - text))
        ]
        after = max([text - 1, *(max(place) for place in image)]) + 1
        found += [(place,) * 3 for place in range(text)] + image
        found += [(after + place,) * 3 for place in range(length - text - len(image))]
    return torch.tensor(found).T


def samples(seq_len, count, documents, targets=None, multimodal=False):
    """Whole micro batches; about a quarter of the tokens, mostly at the end, has no loss.

    Args:
        targets: number of tokens that have a loss, None for no limit.
        multimodal: position ids are (3, rows, seq_len).
    """
    generator = torch.Generator().manual_seed(3)
    rows = 1 if documents else BATCH
    for _ in range(count):
        tokens, labels = torch.randint(1, VOCABULARY, (2, rows, seq_len), generator=generator)
        counted = torch.rand(rows, seq_len, generator=generator) > torch.linspace(0, 0.5, seq_len)
        if targets is not None:
            counted = torch.zeros_like(counted)
            counted[0, 10 : 10 + targets] = True
        positions = torch.arange(seq_len).expand(rows, -1)
        if multimodal:
            positions = torch.stack([picture_positions(seq_len, documents, row) for row in range(rows)], dim=1)
        yield {"tokens": tokens, "labels": labels, "loss_mask": counted.float(), "position_ids": positions}


def build(case, cp_size, ep_size, bf16):
    """GPTModel of megatron-core's local specs in its data-parallel wrapper."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig
    from megatron.core.transformer.module import Float16Module

    latent = case.settings.get("multi_latent_attention", False)
    dtype = {"params_dtype": torch.bfloat16, "bf16": True} if bf16 else {}
    config = (MLATransformerConfig if latent else TransformerConfig)(
        **(MODEL | case.settings), **dtype, context_parallel_size=cp_size, expert_model_parallel_size=ep_size
    )
    if case.block is None:
        layer = get_gpt_layer_local_spec(config.num_moe_experts, False, multi_latent_attention=latent, **case.layer)
    else:
        layer = case.block(config)
    mtp = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False) if config.mtp_num_layers else None
    settings = {"position_embedding_type": "rope", "mtp_block_spec": mtp} | case.model
    model = GPTModel(config, layer, vocab_size=VOCABULARY, max_sequence_length=64, **settings)
    for name, parameter in model.named_parameters():
        if name.endswith("softmax_offset"):  # which 0.15 does not initialize
            torch.nn.init.normal_(parameter)
    model.cuda()
    model = Float16Module(config, model) if bf16 else model
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    config.finalize_model_grads_func = finalize_model_grads
    return config, model


def packed_params(documents, seq_len):
    from megatron.core.packed_seq_params import PackedSeqParams

    if documents is None:
        return None
    ends = torch.tensor([*documents, seq_len], dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=seq_len, max_seqlen_kv=seq_len
    )
