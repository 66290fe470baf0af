"""Shard batches and gather sequences in training loops that are not Megatron's."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.sequence.layout import SequenceLayout

# Names of a batch's tensors that hold one entry per token, and names of those that describe the batch as a whole.
SEQUENCES = frozenset({"tokens", "input_ids", "labels", "loss_mask", "position_ids", "padding_mask", "token_type_ids"})
WHOLE = frozenset(
    {
        "attention_mask",
        "attention_slices",
        "rotary_position_ids",
        "prefix_lengths",
        "cu_seqlens",
        "cu_seqlens_argmin",
        "cu_seqlens_padded",
        "max_seqlen",
        "max_seqlen_argmin",
    }
    | {"local_cp_size", "hybrid_cp_group", "cp_group"}
    | {
        f"{name}_{side}{end}"
        for name in ("cu_seqlens", "max_seqlen")
        for side in "q kv".split()
        for end in ("", "_padded")
    }
)


def sequence_dim(name: str, value: torch.Tensor, dim: int = 1) -> int:
    """Where the sequence lies in a tensor of a batch: behind the planes of multimodal position ids, (3, batch, seq)."""
    return dim + (name == "position_ids" and value.dim() == 3)


def shard_batch(
    batch: Mapping[str, Any], *, layout: SequenceLayout, cp_rank: int, dim: int = 1, sequences: Collection[str] = ()
) -> dict[str, Any]:
    """The part of a batch that one rank holds.

    Tensors are selected by name, never by size.

    Args:
        batch: name -> tensor or anything else. Tensors named in SEQUENCES are split; everything else is kept as it is.
        layout: which tokens each rank holds.
        dim: 1 for (batch, seq), and for (3, batch, seq) position ids of multimodal embeddings.
        sequences: further names to split.

    Returns:
        a new dict; masks and document boundaries stay whole, since attention expects them so.

    Raises:
        ValueError: a tensor with an unknown name is as long as the sequence, or a sequence has another length than the
            layout's.
    """
    named = SEQUENCES.union(sequences)
    local = dict(batch)
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor) or name in WHOLE - named:
            continue
        along = sequence_dim(name, value, dim)
        length = value.size(along) if value.dim() > along else None
        if name in named:
            if length != layout.seq_len:
                raise ValueError(
                    f"{name} of the batch has shape {tuple(value.shape)}, and the sequence has {layout.seq_len} tokens "
                    f"on dimension {along}; pad all sequences of a batch to one length."
                )
            local[name] = layout.shard(value, cp_rank, along).contiguous()
        elif length == layout.seq_len:
            raise ValueError(
                f"{name} of the batch has shape {tuple(value.shape)}: as long as the sequence, and not a name that is "
                f"known to be split; pass sequences=({name!r},) to split it, or take it out of the batch."
            )
    return local


def gather_sequence(
    tensor: torch.Tensor, *, groups: ContextParallelGroups, layout: SequenceLayout, dim: int = 0
) -> torch.Tensor:
    """The whole sequence, in order, from every rank's part of it; every rank of the group calls this.

    Differentiable: each rank gets the gradient of its own part. It is the gradient of the whole loss if all ranks
    compute the same loss from the whole sequence, for example from log-probabilities. Sum gradients over the ranks; if
    they are averaged instead, multiply the loss by the number of ranks. Megatron's schedule does that for a loss
    function that returns two values, ``(loss / count, report)``; with three values it sums the counts, so return
    ``(loss, state().share_of(count), report)``.

    Args:
        tensor: ``dim`` holds this rank's tokens in the order of layout.positions(cp_rank).

    Returns:
        the same shape except for ``dim``, which has layout.seq_len entries.

    Raises:
        ValueError: this rank's part does not have the length that the layout gives it.
    """
    expected = layout.length(groups.cp_rank)
    if tensor.size(dim) != expected:
        raise ValueError(
            f"the tensor has {tensor.size(dim)} entries on dimension {dim}, and the layout gives rank {groups.cp_rank} "
            f"{expected} tokens; pass this rank's part."
        )
    whole: torch.Tensor = _GatherSequence.apply(tensor, groups, layout, dim % tensor.dim())
    return whole


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: torch.Tensor, groups: ContextParallelGroups, layout: SequenceLayout, dim: int
    ) -> torch.Tensor:
        ctx.groups, ctx.layout, ctx.dim = groups, layout, dim
        rows = tensor.movedim(dim, 0)
        if groups.cp is None:
            return layout.unshard([rows]).movedim(0, dim)
        lengths = [layout.length(rank) for rank in range(layout.cp_size)]
        return layout.unshard(groups.cp.gather(rows, lengths, "gathered").wait()).movedim(0, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.layout.shard(grad_out, ctx.groups.cp_rank, ctx.dim).contiguous(), None, None, None
