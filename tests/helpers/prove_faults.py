"""Silent faults of context parallelism, injected by patches in the run with context parallelism.

Published faults are identified by their public issue.
"""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.distributed as dist
from prove_models import Framework, Model

BRIDGE = "mindspeed_cp.megatron.bridge.context_parallel_attention"


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        model: name of the model that shows it.
        build: () -> (context manager in which it is active, the framework's forward step).
        module: the module that must be named, "" if all outputs are right.
        parameter: the first parameter in backward whose gradient is wrong, "" for any.
        kind: the signature that must be recognised, "" for any; that of the gradient if no module is named.
    """

    model: str
    build: Callable
    module: str
    parameter: str = ""
    kind: str = ""


def rank():
    return dist.get_rank()


# -- attention: around the one entry of all algorithms


def attention(change):
    """A fault in which ``change(original, query, key, value, arguments)`` replaces attention."""

    def build():
        from mindspeed_cp.megatron import bridge

        original = bridge.context_parallel_attention

        def faulty(query, key, value, **arguments):
            return change(original, query, key, value, arguments)

        return mock.patch(BRIDGE, faulty), Framework()

    return build


def with_arguments(**changed):
    return attention(lambda original, q, k, v, given: original(q, k, v, **(given | changed)))


def _other_layout(original, query, key, value, given):
    from mindspeed_cp import SequenceLayout

    config = replace(given["config"], batch_layout="contiguous")
    return original(query, key, value, **given | {"layout": SequenceLayout.build(config, given["layout"].seq_len)})


def _full(original, query, key, value, given):
    return original(query, key, value, **given | {"config": replace(given["config"], attention_mask_type="full")})


def _moved_boundary(original, query, key, value, given):
    ends = given["cu_seqlens"]
    return original(query, key, value, **given | {"cu_seqlens": (*ends[:-2], ends[-2] + 2, ends[-1])})


class _Scaled(torch.autograd.Function):
    """The same values with a scaled gradient."""

    @staticmethod
    def forward(ctx, tensor, factor):
        ctx.factor = factor
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def _own_keys_alone(original, query, key, value, given):
    """Only this rank's keys and values, in their order, as if other parts were not merged."""
    from mindspeed_cp.attention.entry import context_parallel_attention
    from mindspeed_cp.comm.groups import ContextParallelGroups
    from mindspeed_cp.sequence.layout import SequenceLayout
    from mindspeed_cp.settings.config import ContextParallelConfig

    alone = ContextParallelConfig(context_parallel_size=1)
    groups, layout = ContextParallelGroups.build(alone), SequenceLayout.build(alone, query.shape[0])
    kept = {"config": alone, "groups": groups, "layout": layout, "kept": None}
    return context_parallel_attention(query, key, value, **given | kept)


def _values_of_another_rank(original, query, key, value, given):
    """Keys arrive from one rank and values from another."""
    others = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(others, value.detach().contiguous())
    return original(query, key, others[rank() - 1] + 0 * value, **given)


def _twice(original, query, key, value, given):
    """A second project exchanges heads and sequence once more, so that heads come back in another order."""
    return original(query.roll(1, 2), key.roll(1, 2), value.roll(1, 2), **given)


# -- positions


def rope(change):
    """A fault in the rotary embedding's result, ``change(embedding of these positions, right result)``."""

    def build():
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

        original = RotaryEmbedding.forward

        def forward(self, *args, **kwargs):
            right = original(self, *args, **kwargs)
            angles = torch.arange(2 * right.size(0) + 8, dtype=torch.float32)[:, None] * self.inv_freq.float()
            table = torch.cat([angles, angles], dim=-1)[:, None, None, :]
            return change(table, right)

        return mock.patch.object(RotaryEmbedding, "forward", forward), Framework()

    return build


def _local_positions(table, right):
    return table[: right.size(0)]


def _one_later(table, right):
    return right.roll(-1, 0) if rank() else right


# -- the framework's own part


def framework(**parts):
    """A fault in the framework's forward step."""

    def build():
        return nullcontext(), type("Faulty", (Framework,), parts)()

    return build


def _split_in_halves(self, model, sample):
    """Tokens split in halves, with positions of the zigzag; else the adaptor would recognise the actual split."""
    local, half = Framework.split(self, model, sample), model.seq_len // dist.get_world_size()
    for name in ("tokens", "labels", "loss_mask"):
        local[name].copy_(sample[name][:, rank() * half : (rank() + 1) * half])
    return local


def _split_backwards(self, model, sample):
    """Each rank gets the other rank's part."""
    right = Framework.split(self, model, sample)
    found = {}
    for name, value in right.items():
        parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, value)
        found[name] = value.copy_(parts[1 - rank()])  # in the tensors by which the model finds the layout
    return found


def _labels_shifted_after_the_split(self, model, sample):
    local = Framework.split(self, model, sample)
    whole = torch.cat([sample["tokens"][:, :1], sample["labels"][:, :-1]], 1)
    before = Framework.split(self, model, sample | {"labels": whole})["labels"]
    local["labels"].copy_(before.roll(-1, 1))
    return local


def _positions_from_zero(self, model, sample):
    local = Framework.split(self, model, sample)
    local["position_ids"].copy_(torch.arange(local["position_ids"].size(1)))
    return local


def _one_token_lost(self, model, sample):
    local = Framework.split(self, model, sample)
    if rank():
        local["tokens"][:, 0] = 0
    return local


def scaled(factor):
    def loss(self, sample, local, losses):
        total, count, said = Framework.loss(self, sample, local, losses)
        return total * factor, count, said

    return framework(loss=loss)


def _mean_of_means(self, sample, local, losses):
    total, _, said = Framework.loss(self, sample, local, losses)
    return total / local["loss_mask"].sum() / dist.get_world_size(), said


def _without_mask(self, sample, local, losses):
    total, count, _ = Framework.loss(self, sample, local | {"loss_mask": torch.ones_like(local["loss_mask"])}, losses)
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


# -- gradients and weights


def _not_reduced():
    from megatron.core.distributed import DistributedDataParallel

    return mock.patch.object(DistributedDataParallel, "finish_grad_sync", lambda self, *a, **k: None), Framework()


def _other_weights():
    """Seeds that depend on the rank."""
    from megatron.core import tensor_parallel

    original = tensor_parallel.model_parallel_cuda_manual_seed
    name = "megatron.core.tensor_parallel.model_parallel_cuda_manual_seed"
    return mock.patch(name, lambda seed: original(seed + rank())), Framework()


def _one_rank_scaled(original, query, key, value, given):
    out = original(query, key, value, **given)
    return out * 1.01 if rank() else out


def _aux_loss(factor):
    def build():
        from megatron.core.transformer import TransformerConfig

        original = TransformerConfig.__post_init__

        def changed(self):
            original(self)
            self.moe_aux_loss_coeff = self.moe_aux_loss_coeff * factor

        return mock.patch.object(TransformerConfig, "__post_init__", changed), Framework()

    return build


def _prediction_rolls_alone():
    """Multi-token prediction takes the next token only from this rank's part."""
    from megatron.core.transformer import multi_token_prediction

    original = multi_token_prediction.roll_tensor

    def roll(tensor, shifts=-1, dims=-1, **given):
        if not shifts:  # never true, but without this reference the adaptor would report a replaced name
            return original(tensor, shifts, dims, **given)
        rolled = tensor.roll(shifts, dims)
        rolled.select(dims, shifts).fill_(0)
        return rolled, rolled.sum()

    return mock.patch.object(multi_token_prediction, "roll_tensor", roll), Framework()


@contextmanager
def _embedding_scaled(factor):
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding

    original = LanguageModelEmbedding.forward
    with mock.patch.object(
        LanguageModelEmbedding, "forward", lambda self, *args, **kwargs: factor * original(self, *args, **kwargs)
    ):
        yield


CORE, EMBEDDING, QKV = "self_attention.core_attention", "embedding", "layers.1.self_attention.linear_qkv"
FAULTS = {
    "attention believes in another layout": Fault("dense", attention(_other_layout), CORE),
    "every token sees all": Fault("dense", attention(_full), CORE),
    "documents lost": Fault("packed", with_arguments(cu_seqlens=None), CORE, kind="across documents"),
    "a document's end moved": Fault("packed", attention(_moved_boundary), CORE),
    "window lost": Fault("window", with_arguments(sliding_window=None), CORE),
    "sinks lost": Fault("sinks", with_arguments(softmax_offset=None), CORE),
    "another softmax scale": Fault("dense", with_arguments(softmax_scale=0.3), CORE),
    "parts of other ranks not merged": Fault("dense", attention(_own_keys_alone), CORE),
    "values of another rank": Fault("dense", attention(_values_of_another_rank), CORE),
    "heads in another order": Fault("dense", attention(_twice), CORE, kind="every row"),
    "heads of groups in another order": Fault(
        "grouped queries", attention(lambda f, q, k, v, given: f(q, k.flip(2), v.flip(2), **given)), CORE
    ),
    "one rank's output is scaled": Fault("dense", attention(_one_rank_scaled), CORE, kind="one rank's part"),
    "gradient of keys and values not returned": Fault(
        "dense", attention(lambda f, q, k, v, given: f(q, k.detach(), v.detach(), **given)), "", QKV
    ),
    "gradient of values halved": Fault(
        "latents", attention(lambda f, q, k, v, given: f(q, k, _Scaled.apply(v, 0.5), **given)), "", "linear_kv_down"
    ),
    "gradient of queries doubled on one rank": Fault(
        "dense", attention(lambda f, q, k, v, given: f(_Scaled.apply(q, 1.0 + rank()), k, v, **given)), "", QKV
    ),
    # NVIDIA/Megatron-LM issue 560 and modelscope/ms-swift pull request 5683 are about such positions.
    "RoPE counts from a rank's first token": Fault("dense", rope(_local_positions), "rotary_pos_emb"),
    "RoPE shifted by one on one rank": Fault("dense", rope(_one_later), "rotary_pos_emb", kind="one rank's part"),
    "position ids from zero": Fault(
        "learned positions", framework(split=_positions_from_zero), "embedding.position_embeddings"
    ),
    "split in halves": Fault("dense", framework(split=_split_in_halves), EMBEDDING, kind="permuted rows"),
    "split the other way round": Fault("dense", framework(split=_split_backwards), EMBEDDING, kind="permuted rows"),
    "a token lost on one rank": Fault("dense", framework(split=_one_token_lost), EMBEDDING, kind="one rank's part"),
    "embedding twice as large": Fault(
        "dense", lambda: (_embedding_scaled(2.0), Framework()), EMBEDDING, kind="factor cp"
    ),
    # huggingface/transformers pull request 36607 describes it.
    "labels shifted after the split": Fault(
        "dense", framework(split=_labels_shifted_after_the_split), "GPTModel", "output_layer", kind="ends"
    ),
    # NVIDIA/Megatron-LM issues 673 and 906.
    "loss times cp": Fault("dense", scaled(2.0), "", "output_layer", kind="factor cp"),
    # NovaSky-AI/SkyRL pull request 1420: a correction without the context-parallel size.
    "loss over cp": Fault("dense", scaled(0.5), "", "output_layer", kind="factor 1/cp"),
    # verl-project/verl issue 6609: two values where the loss is per token.
    "mean of the ranks' means": Fault("dense", framework(loss=_mean_of_means), "", "output_layer"),
    "loss of masked tokens": Fault("dense", framework(loss=_without_mask), "", "output_layer"),
    "gradients not reduced": Fault("dense", _not_reduced, "", "output_layer"),
    "other weights on one rank": Fault("dense", _other_weights, EMBEDDING),
    "auxiliary loss of experts times cp": Fault("experts", _aux_loss(2.0), "", "router.weight"),
    "multi-token prediction alone": Fault(
        "multi-token prediction", _prediction_rolls_alone, "called by mtp", kind="ends"
    ),
}


def possible(models: dict[str, Model]) -> dict[str, Fault]:
    """The faults that these models can show."""
    return {name: fault for name, fault in FAULTS.items() if fault.model in models}
