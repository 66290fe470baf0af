"""Patches of what Megatron does to a batch: splitting it, rolling it, and the shapes that pipeline stages expect."""

import importlib
import inspect
from functools import wraps

import torch
import torch.distributed as dist
from mindspeed_cp.patches.documents import documents_of_packed_params, documents_of_position_ids
from mindspeed_cp.patches.manager import Patch
from mindspeed_cp.patches.state import BatchShape

UTILS = "megatron.core.utils"
MTP = "megatron.core.transformer.multi_token_prediction"


def batch_patches(state):
    return [
        Patch(
            f"{UTILS}.get_batch_on_this_cp_rank",
            _slice_batch(state),
            "a rank gets the tokens of the chosen algorithm's layout; any length, the dense mask stays whole",
        ),
        Patch(
            f"{UTILS}.get_thd_batch_on_this_cp_rank",
            _slice_packed_batch(state),
            "Megatron's split of packed documents needs Transformer Engine and padding",
            _absent(UTILS, "get_thd_batch_on_this_cp_rank", "packed batches come with 0.16"),
        ),
        Patch(
            "megatron.core.transformer.transformer_block.TransformerBlock.forward",
            _run_with_shape(state),
            "pipeline stages without a batch, and layers, learn the true length of the micro-batch",
        ),
        Patch(
            "megatron.core.tensor_parallel.random.checkpoint",
            _checkpoint(state),
            "recomputation must see the micro-batch of its forward pass",
        ),
        Patch(
            "megatron.core.tensor_parallel.random.CheckpointWithoutOutput.checkpoint",
            _checkpoint_without_output(state),
            "recomputation must see the micro-batch of its forward pass",
        ),
        Patch(
            "megatron.core.pipeline_parallel.schedules.get_tensor_shapes",
            _tensor_shapes(state),
            "pipeline stages exchange seq_length / cp rows, which differs between ranks for uneven lengths",
        ),
        Patch(
            f"{MTP}.roll_tensor",
            _roll(state),
            "multi-token prediction shifts tokens within a rank before 0.14, later across the ranks of Megatron's own "
            "zigzag",
        ),
    ]


def _absent(module, name, why):
    """() -> why when ``module`` has no ``name``."""
    return lambda: "" if hasattr(importlib.import_module(module), name) else why


def split_batch(batch, state):
    """Replace every sequence of ``batch`` by the part of this rank, in place, and record the shape of the batch.

    Args:
        batch: dict of (b, S) tensors, None, and an optional attention_mask (b, 1, S, S), which stays whole: attention
            takes its rows and columns through the layout.
    """
    sequences = {
        name: value
        for name, value in batch.items()
        if name != "attention_mask" and isinstance(value, torch.Tensor) and value.dim() >= 2
    }
    if not sequences:
        return batch
    lengths = {value.size(1) for value in sequences.values()}
    if len(lengths) > 1:
        raise ValueError(
            "the batch holds sequences of different lengths on dimension 1: "
            f"{', '.join(f'{name} {value.size(1)}' for name, value in sequences.items())}; pad them to one length."
        )
    seq_len, documents = lengths.pop(), None
    if (
        state.documents_from_position_ids
        and batch.get("attention_mask") is None
        and batch.get("position_ids") is not None
    ):
        documents = documents_of_position_ids(batch["position_ids"])
    layout = state.layout(seq_len)
    for name, value in sequences.items():
        batch[name] = layout.shard(value, state.cp_rank, dim=1).contiguous()
    state.batch = BatchShape(seq_len, documents)
    return batch


def _slice_batch(state):
    def build(original):
        @wraps(original)
        def get_batch_on_this_cp_rank(batch, *args, **kwargs):
            group = kwargs.get("cp_group", args[0] if args else None)
            if state.cp_size == 1 or (isinstance(group, dist.ProcessGroup) and group.size() != state.cp_size):
                return original(batch, *args, **kwargs)
            return split_batch(batch, state)

        return get_batch_on_this_cp_rank

    return build


def _slice_packed_batch(state):
    def build(original):
        @wraps(original)
        def get_thd_batch_on_this_cp_rank(batch, cu_seqlens, cu_seqlens_padded, max_seqlen, cp_size=None, cp_rank=None):
            if state.cp_size == 1 or cp_size not in (None, state.cp_size):
                return original(batch, cu_seqlens, cu_seqlens_padded, max_seqlen, cp_size, cp_rank)
            # Given as one rank, Megatron makes the parameters and splits nothing.
            batch, params = original(batch, cu_seqlens, cu_seqlens_padded, max_seqlen, 1, 0)
            return split_batch(batch, state), params

        return get_thd_batch_on_this_cp_rank

    return build


def _run_with_shape(state):
    def build(original):
        @wraps(original)
        def forward(self, hidden_states, *args, **kwargs):
            if (
                state.cp_size == 1
                or kwargs.get("inference_context") is not None
                or kwargs.get("inference_params") is not None
            ):
                return original(self, hidden_states, *args, **kwargs)
            local = hidden_states if self.pre_process else self.input_tensor
            with state.running(block_shape(state, self, local.size(0))):
                return original(self, hidden_states, *args, **kwargs)

        return forward

    return build


def block_shape(state, block, num_rows):
    """The shape of the micro-batch that enters a TransformerBlock; ``num_rows`` is the first dimension of its input."""
    config = block.config
    local_len = num_rows * config.tensor_model_parallel_size if config.sequence_parallel else num_rows
    return state.shape_for(local_len, batch_is_known=block.pre_process or block.post_process)


def _checkpoint(state):
    def build(original):
        @wraps(original)
        def checkpoint(function, *args, **kwargs):
            return original(function if state.cp_size == 1 else state.bound(function), *args, **kwargs)

        return checkpoint

    return build


def _checkpoint_without_output(state):
    def build(original):
        @wraps(original)
        def checkpoint(self, run_function, *args, **kwargs):
            return original(self, run_function if state.cp_size == 1 else state.bound(run_function), *args, **kwargs)

        return checkpoint

    return build


def _tensor_shapes(state):
    def build(original):
        signature = inspect.signature(original)

        @wraps(original)
        def get_tensor_shapes(*args, **kwargs):
            shapes = original(*args, **kwargs)
            if state.cp_size == 1:
                return shapes
            given = signature.bind(*args, **kwargs).arguments
            config, seq_len = given["config"], given.get("decoder_seq_length") or given["seq_length"]
            rows = state.layout(seq_len).length(state.cp_rank)
            if config.sequence_parallel:
                rows //= config.tensor_model_parallel_size
            return [(rows, *shape[1:]) if shape else shape for shape in shapes]

        return get_tensor_shapes

    return build


def _roll(state):
    def build(original):
        signature = inspect.signature(original)

        @wraps(original)
        def roll_tensor(*args, **kwargs):
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            tensor, shifts, dims, group, params = (
                given.arguments.get(name) for name in ("tensor", "shifts", "dims", "cp_group", "packed_seq_params")
            )
            # Before 0.14 there is no group to pass.
            alone = "cp_group" in signature.parameters and (group is None or group.size() == 1)
            if state.cp_size == 1 or alone:
                return original(*args, **kwargs)
            if shifts != -1:
                raise ValueError(
                    f"roll_tensor with shifts={shifts} is not supported with context parallelism; use shifts=-1."
                )
            shape = state.shape_for(tensor.size(dims))
            documents = (0, shape.seq_len) if params is None else documents_of_packed_params(params, shape.seq_len)
            whole = _rolled_whole(state, tensor, shape.seq_len, dims, documents)
            # The sum divides each rank's loss, and gradients are averaged over the ranks: with the mean of the ranks'
            # sums that is the mean over all tokens, however unevenly they are shared.
            return state.layout(shape.seq_len).shard(
                whole, state.cp_rank, dim=dims
            ).contiguous(), whole.sum() / state.cp_size

        return roll_tensor

    return build


def _rolled_whole(state, tensor, seq_len, dim, documents):
    """The whole sequence, of which ``tensor`` is this rank's part, shifted by one to the left; 0 ends each document.

    Tokens, labels and masks are small, so the whole sequence is gathered; that is right for every layout.
    """
    layout = state.layout(seq_len)
    rows = tensor.movedim(dim, 0).contiguous()
    longest = max(layout.length(rank) for rank in range(state.cp_size))
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: rows.size(0)] = rows
    gathered = [torch.empty_like(padded) for _ in range(state.cp_size)]
    dist.all_gather(gathered, padded, group=state.groups.cp_group)
    whole = layout.unshard([shard[: layout.length(rank)] for rank, shard in enumerate(gathered)])
    whole = torch.cat([whole[1:], torch.zeros_like(whole[:1])])
    for end in documents[1:]:
        if end:
            whole[end - 1] = 0
    return whole.movedim(0, dim)
