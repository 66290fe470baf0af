"""Models for the tests of prove: small models of each kind, whole batches, and a framework's forward step, divided into
the parts that faults replace.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import vision_runs
from linear_models import DELTA_NET, SPARSE, delta_net_block, sparse_block
from megatron_version import MINOR as VERSION
from model_cases import (
    AUX,
    DEEPSEEK,
    MLA,
    MODEL,
    MOE,
    MTP,
    PER_TOKEN,
    RECOMPUTE,
    VOCABULARY,
    packed_params,
    samples,
)
from model_shapes import NORMED, SHAPES

SEQ = 32
DOCUMENTS = (0, 5, 6, 23)


@dataclass(frozen=True)
class Model:
    """One model and its batches.

    Args:
        settings: settings of TransformerConfig besides MODEL.
        positions: "rope" or "learned_absolute".
        documents: boundaries of packed documents, None for whole sequences.
        parallel: settings of ContextParallelConfig.
        seq_len: tokens of a sequence.
        block: config -> the spec of all layers, None if they are equal.
        since: the first Megatron that supports it.
        layer, model: keywords of the layer's spec and of GPTModel.
        sees_images: it is that of docs/vision-language.md.
        turned: its latent attention has rotary positions.
    """

    settings: dict = field(default_factory=dict)
    positions: str = "rope"
    documents: tuple | None = None
    parallel: dict = field(default_factory=lambda: {"algorithm": "megatron_cp_algo"})
    seq_len: int = SEQ
    block: Callable | None = None
    since: tuple = (0, 12)
    layer: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    sees_images: bool = False
    turned: bool = True


def of_shape(name, **more):
    """A model of tests/helpers/model_shapes.py."""
    return Model(**SHAPES[name] | more)


STATE = {"algorithm": "megatron_cp_algo", "linear_exchange": "state"}
ULYSSES = {"algorithm": "ulysses_cp_algo"}
MODELS = {
    "dense": Model(),
    "learned positions": Model(positions="learned_absolute"),
    "grouped queries": Model({"num_query_groups": 2, "num_attention_heads": 8, "kv_channels": 8}, parallel=ULYSSES),
    "packed": Model(documents=DOCUMENTS),
    "window": Model({"window_size": (6, 0)}),
    "sinks": Model({"softmax_type": "learnable"}),
    "latents": Model(MLA),
    "DeepSeek-V3": Model(DEEPSEEK),
    "Gemma 3": of_shape("Gemma 3"),
    "Qwen3-VL": Model(sees_images=True, seq_len=31),
    "experts": Model(AUX),
    "multi-token prediction": Model(MTP),
    "per-token loss": Model(PER_TOKEN),
    "uneven": Model(seq_len=31),
    "recomputed, kept": Model(
        RECOMPUTE, parallel={"algorithm": "megatron_cp_algo", "keep_attention": True, "kv_exchange": "direct"}
    ),
    "all-gather": Model(parallel={"algorithm": "kvallgather_cp_algo"}),
    "Qwen3-Next": Model(
        DELTA_NET | MOE | NORMED | {"attention_output_gate": True},
        block=delta_net_block,
        parallel=ULYSSES,
        since=(0, 16),
    ),
    "Kimi-Linear": Model(
        DELTA_NET | MLA | MOE | {"num_layers": 4, "linear_attention_freq": [1, 1, 1, 0], "num_query_groups": 4},
        block=delta_net_block,
        parallel=STATE,
        since=(0, 16),
        turned=False,
    ),
    "DeepSeek-V3.2": Model(SPARSE | MOE, block=sparse_block, since=(0, 19)),
    "balanced": Model(documents=DOCUMENTS, parallel={"algorithm": "megatron_cp_algo", "batch_layout": "balanced"}),
}


def possible():
    """The models that this version of megatron-core supports."""
    absent = {"packed", "balanced"} if VERSION < (0, 16) else set()
    absent |= {"sinks", "window"} if VERSION < (0, 15) else set()
    absent |= {"multi-token prediction", "DeepSeek-V3"} if VERSION >= (0, 20) else set()
    absent |= {"Qwen3-VL"} if VERSION < (0, 16) else set()
    return {name: model for name, model in MODELS.items() if name not in absent and VERSION >= model.since}


def provider(model, cp_size):
    """() -> GPTModel of megatron-core's local specs; the same seed gives the same weights."""
    if model.sees_images:
        return lambda: vision_runs.example().built(cp_size, 2 * model.seq_len)

    def build():
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
        from megatron.core.transformer import MLATransformerConfig, TransformerConfig

        latent = model.settings.get("multi_latent_attention", False)
        kind = MLATransformerConfig if latent else TransformerConfig
        config = kind(**(MODEL | model.settings), context_parallel_size=cp_size)
        if model.block is None:
            layer = get_gpt_layer_local_spec(config.num_moe_experts, multi_latent_attention=latent, **model.layer)
        else:
            layer = model.block(config)
        mtp = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False) if config.mtp_num_layers else None
        built = GPTModel(
            config,
            layer,
            vocab_size=VOCABULARY,
            max_sequence_length=64,
            position_embedding_type=model.positions,
            mtp_block_spec=mtp,
            **model.model,
        )
        for name, parameter in built.named_parameters():
            if name.endswith("softmax_offset"):  # which 0.15 does not initialize
                torch.nn.init.normal_(parameter)
        for module in () if model.turned else built.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq.zero_()
        return built

    return build


def batches(model):
    """Two whole micro-batches."""
    if model.sees_images:
        example = vision_runs.example()
        return [(model, example.sample(model.seq_len, first=first)) for first in (3, 7)]
    return [(model, sample) for sample in samples(model.seq_len, 2, model.documents)]


class Framework:
    """A framework's forward step; a fault replaces one of its parts."""

    def split(self, model, sample):
        from megatron.core.utils import get_batch_on_this_cp_rank

        from mindspeed_cp import megatron_adaptor

        state = megatron_adaptor.state()
        if model.documents is None or state.cp_size == 1:
            return get_batch_on_this_cp_rank(dict(sample))
        return state.shard_batch(sample, cu_seqlens=(*model.documents, model.seq_len))

    def packed(self, model):
        return packed_params(model.documents, model.seq_len)

    def loss(self, sample, local, losses):
        """As in Megatron's own pretrain_gpt.py: 0.12 needs the token count of the whole sequence, later versions that
        of the rank.
        """
        mask = local["loss_mask"]
        count = (sample["loss_mask"] if VERSION < (0, 13) else mask).sum().to(torch.int)
        total = (losses.float() * mask).sum()
        return total, count, {"lm loss": torch.stack([total.detach(), mask.sum()])}

    def forward_step(self, iterator, module):
        model, sample = next(iterator)
        if model.sees_images:
            losses, local = vision_runs.example().losses_after(module, sample)
            return losses, partial(self.loss, sample, local)
        local = self.split(model, sample)
        losses = module(
            local["tokens"],
            local["position_ids"],
            None,
            labels=local["labels"],
            loss_mask=local["loss_mask"],
            packed_seq_params=self.packed(model),
        )
        return losses, partial(self.loss, sample, local)
