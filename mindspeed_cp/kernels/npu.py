"""The Ascend NPU kernel: torch_npu.npu_fusion_attention and npu_fusion_attention_grad.

Which call computes a block:

========================  ======  ===========  ================================================================
block                     layout  sparse_mode  mask
========================  ======  ===========  ================================================================
rectangle                 SBH     0            none
causal square             SBH     2            the compressed 2048 x 2048 triangle, one per device
band                      SBH     4            the same triangle; pre_tockens and next_tockens are the two limits
rectangle + dense mask    SBH     1            the dense mask
packed pieces             TND     0 or 2       as above; batch is folded into the heads, so that the pieces of all
                                               batch entries share one list of cumulative lengths
========================  ======  ===========  ================================================================

GQA, dropout and dk > dv are the operator's own. dv > dk pads query and key with zeros, which adds nothing to a score.
Written against the published schemas and documentation; not yet run on a device.
"""

from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mindspeed_cp.kernels.npu_setup import unavailable  # noqa: F401  the table's probe of this module
from mindspeed_cp.kernels.npu_statistics import LARGE, from_lse, probe_order, row_permutation, to_lse

MASK_SIZE = 2048  # the operator's compressed triangle, whatever the sequence length
UNLIMITED = 2147483647  # pre_tockens and next_tockens of an open side
MAX_HEADS = 256  # query heads of one call
MAX_PIECES = 1024  # documents of one TND call
MAX_HEAD_DIM = 768
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class OperatorVariant(NamedTuple):
    """How one generation of the operators is called.

    Args:
        marker: the argument of npu_fusion_attention by which the generation is known; None is the oldest.
        packed_arguments: further arguments of both operators in TND.
        statistics_order: memory order of TND statistics (``npu_statistics``); None has to be probed.
    """

    marker: str | None
    packed_arguments: dict
    statistics_order: str | None


# Post-releases of an old torch branch carry newer operators (2.1.0.post17 has what 2.5.1 lacks), so the schema decides
# and not the version number. Newest first.
VARIANTS = (
    OperatorVariant("softmax_layout", {"softmax_layout": "TND"}, "rows"),  # 2.1.0.post17, 2.7.1, 2.9.1, 2.13.0
    OperatorVariant(None, {}, None),  # 2.5.1
)


def operator_variant(torch_npu):
    """The first row of VARIANTS whose marker the installed operator's schema holds."""
    operator = getattr(torch_npu.npu_fusion_attention, "default", None) or torch.ops.npu.npu_fusion_attention.default
    names = {argument.name for argument in operator._schema.arguments}
    return next(variant for variant in VARIANTS if variant.marker is None or variant.marker in names)


def build():
    return NpuKernel(import_module("torch_npu"))


@cache
def compressed_mask(device):
    """Bool (2048, 2048), True above the diagonal: the mask of sparse_mode 2 and 4, one for all calls of a device."""
    return torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool, device=device).triu_(1)


class _Call(NamedTuple):
    """One operator call: rows of the block that it reads, its layout, and the arguments that describe its mask.

    Args:
        q, k, batch: slices of the block's query rows, key rows and batch entries.
        q_lengths, k_lengths: rows of each piece in TND; None in SBH.
    """

    q: slice
    k: slice
    batch: slice
    q_lengths: tuple | None
    k_lengths: tuple | None
    mask_arguments: dict

    @property
    def layout(self):
        return "SBH" if self.q_lengths is None else "TND"

    def operand(self, tensor, rows):
        """(seq, batch, heads, dim) -> (rows, batch, heads * dim) in SBH, (rows, batch * heads, dim) in TND."""
        part = tensor[rows, self.batch]
        return part.flatten(2) if self.q_lengths is None else part.flatten(1, 2)


class NpuKernel:
    """Blocks of attention on an NPU; ``torch_npu`` is the module to call."""

    name = "npu"
    native_bands = True

    def __init__(self, torch_npu):
        self._npu, self._variant = torch_npu, operator_variant(torch_npu)
        self._order = self._variant.statistics_order
        if hasattr(torch_npu, "npu_ring_attention_update"):
            self.merge = self._fused_merge

    def forward(self, query, key, value, block, options, attention_mask=None):
        _check(query, key, value)
        query, key = _padded(query, key, value)
        calls = list(_calls(query, key, block, attention_mask))
        outs, lses, rngs = [], [], []
        for call in calls:
            out, softmax_max, softmax_sum, _, *rng = self._npu.npu_fusion_attention(
                call.operand(query, call.q),
                call.operand(key, call.k),
                call.operand(value, call.k),
                _num_heads(query, call),
                call.layout,
                scale=options.softmax_scale,
                keep_prob=1.0 - options.dropout_p,
                **self._arguments(call),
            )
            shape = query[call.q, call.batch].shape[:3]
            outs.append(out.view(*shape, -1))
            lses.append(self._rows_first(to_lse(softmax_max, softmax_sum), call, shape))
            rngs.append(tuple(rng))
        out = _assembled(outs, [call.q for call in calls], calls, (*query.shape[:3], value.shape[-1]))
        lse = _assembled(lses, [call.q for call in calls], calls, query.shape[:3])
        if attention_mask is not None:
            _clear_empty_rows(out, lse, attention_mask)
        return out, lse, tuple(rngs) if options.dropout_p else None

    def backward(self, grad_out, query, key, value, out, lse, block, options, rng, attention_mask=None):
        head_dim = query.shape[-1]
        query, key = _padded(query, key, value)
        out, grad_out = out.to(query.dtype), grad_out.to(query.dtype)
        calls, parts = list(_calls(query, key, block, attention_mask)), []
        for call, (seed, offset, numels) in zip(calls, rng or [(0, 0, 0)] * len(calls), strict=True):
            softmax_max, softmax_sum = self._statistics(lse[call.q, call.batch], call)
            parts.append(
                self._npu.npu_fusion_attention_grad(
                    call.operand(query, call.q),
                    call.operand(key, call.k),
                    call.operand(value, call.k),
                    call.operand(grad_out, call.q),
                    _num_heads(query, call),
                    call.layout,
                    softmax_max=softmax_max,
                    softmax_sum=softmax_sum,
                    attention_in=call.operand(out, call.q),
                    scale_value=options.softmax_scale,
                    keep_prob=1.0 - options.dropout_p,
                    seed=seed,
                    offset=offset,
                    numels=numels,
                    **self._arguments(call),
                )[:3]
            )
        q_rows, k_rows = [call.q for call in calls], [call.k for call in calls]
        dq, dk, dv = (
            _assembled(
                [part.view(like[rows, call.batch].shape) for part, rows, call in zip(grads, all_rows, calls)],
                all_rows,
                calls,
                like.shape,
            )
            for grads, all_rows, like in zip(zip(*parts), (q_rows, k_rows, k_rows), (query, key, value))
        )
        return dq[..., :head_dim], dk[..., :head_dim], dv

    def _arguments(self, call):
        if call.q_lengths is None:
            return call.mask_arguments
        return {
            **call.mask_arguments,
            **self._variant.packed_arguments,
            "actual_seq_qlen": _cumulative(call.q_lengths),
            "actual_seq_kvlen": _cumulative(call.k_lengths),
        }

    def _rows_first(self, lse, call, shape):
        """lse as the operator laid it out -> (rows, batch, heads)."""
        if call.q_lengths is None:
            return lse.permute(2, 0, 1)
        permutation = self._permutation(call, shape, lse.device)
        return (lse if permutation is None else lse.reshape(-1)[permutation]).view(shape)

    def _statistics(self, lse, call):
        """The operator's (max, sum) of lse (rows, batch, heads)."""
        if call.q_lengths is None:
            return from_lse(lse.permute(1, 2, 0))
        permutation, rows = self._permutation(call, lse.shape, lse.device), lse.flatten(1)
        if permutation is None:
            return from_lse(rows)
        ordered = torch.empty_like(rows, memory_format=torch.contiguous_format)
        ordered.view(-1)[permutation] = rows.reshape(-1)
        return from_lse(ordered)

    def _permutation(self, call, shape, device):
        if self._order is None:
            self._order = probe_order(self._probe, device)
        return row_permutation(self._order, call.q_lengths, shape[1] * shape[2], device)

    def _probe(self, query, key, value, lengths):
        ends = _cumulative(lengths)
        return self._npu.npu_fusion_attention(
            query, key, value, query.shape[1], "TND", scale=1.0, actual_seq_qlen=ends, actual_seq_kvlen=ends
        )[1:3]

    def _fused_merge(self, out, lse, block_out, block_lse):
        """``softmax.merge_attention`` by npu_ring_attention_update: same arguments, same numbers, one operator."""
        # Rows without keys carry lse -inf, and the operator would compute -inf - -inf.
        finite = [tensor.permute(1, 2, 0).clamp(min=-LARGE) for tensor in (lse, block_lse)]
        merged, softmax_max, softmax_sum = self._npu.npu_ring_attention_update(
            out.flatten(2),
            *from_lse(finite[0]),
            block_out.to(out.dtype).flatten(2),
            *from_lse(finite[1]),
            input_layout="SBH",
        )
        out.copy_(merged.view(out.shape))
        total = to_lse(softmax_max, softmax_sum).permute(2, 0, 1)
        lse.copy_(total.masked_fill(total <= -LARGE / 2, -torch.inf))


def _check(query, key, value):
    """Refuse what the operators do not take; the message says the way out."""
    if query.dtype not in DTYPES:
        raise ValueError(
            f"--cp-kernel npu does not take {query.dtype} tensors, only float16, bfloat16 and float32; "
            "choose --cp-kernel blockwise, or train in --bf16."
        )
    head_dim = max(query.shape[-1], value.shape[-1])
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"--cp-kernel npu does not take a head dimension of {head_dim}, at most {MAX_HEAD_DIM}; "
            "choose --cp-kernel blockwise."
        )
    if query.shape[2] > MAX_HEADS:
        raise ValueError(
            f"--cp-kernel npu takes at most {MAX_HEADS} heads per rank, got {query.shape[2]}; raise "
            "--tensor-model-parallel-size, or choose --cp-kernel blockwise."
        )


def _padded(query, key, value):
    """Query and key with zeros up to value's dimension, because the operator wants dk >= dv."""
    missing = value.shape[-1] - key.shape[-1]
    return (query, key) if missing <= 0 else (F.pad(query, (0, missing)), F.pad(key, (0, missing)))


def _assembled(parts, rows, calls, shape):
    """One tensor of ``shape`` from what the calls made of their rows and batch entries; a single part as it is."""
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].new_empty(shape)
    for part, part_rows, call in zip(parts, rows, calls):
        whole[part_rows, call.batch] = part
    return whole


def _num_heads(query, call):
    heads = query.shape[2]
    return heads if call.q_lengths is None else heads * len(range(*call.batch.indices(query.shape[1])))


def _cumulative(lengths):
    """Running totals without a leading 0, the operator's way of writing document lengths."""
    totals, total = [], 0
    for length in lengths:
        total += length
        totals.append(total)
    return totals


def _calls(query, key, block, attention_mask):
    """The operator calls of one block; their rows and batch entries tile it exactly."""
    batch = slice(0, query.shape[1])
    if block.num_pieces == 1 or not (block.is_full or block.is_causal):
        for q, k in block.pieces():
            arguments = _mask_arguments(block, q.stop - q.start, k.stop - k.start, attention_mask, query.device)
            yield _Call(q, k, batch, None, None, arguments)
        return
    per_call = max(1, MAX_HEADS // query.shape[2])
    q0, k0 = block.q_offsets[0], block.k_offsets[0]
    arguments = _mask_arguments(block, 0, 0, None, query.device)
    for start in range(0, query.shape[1], per_call):
        for first in range(0, block.num_pieces, MAX_PIECES):
            q_offsets, k_offsets = (
                offsets[first : first + MAX_PIECES + 1] for offsets in (block.q_offsets, block.k_offsets)
            )
            lengths = (tuple(b - a for a, b in zip(offsets, offsets[1:])) for offsets in (q_offsets, k_offsets))
            yield _Call(
                slice(q_offsets[0] - q0, q_offsets[-1] - q0),
                slice(k_offsets[0] - k0, k_offsets[-1] - k0),
                slice(start, min(start + per_call, query.shape[1])),
                *lengths,
                arguments,
            )


def _mask_arguments(block, rows, cols, attention_mask, device):
    """Which mask the operator applies to a piece of rows x cols."""
    if attention_mask is not None:
        # (1, rows, cols) is the SS form for all batch entries, (batch, 1, rows, cols) one mask for each.
        shared = attention_mask.shape[0] == 1
        return {"sparse_mode": 1, "atten_mask": attention_mask[0] if shared else attention_mask.unsqueeze(1)}
    if block.is_full:
        return {"sparse_mode": 0}
    if block.is_causal:
        return {"sparse_mode": 2, "atten_mask": compressed_mask(device)}
    # The operator counts both limits from the diagonal that ends in the lower right corner, a block from the upper
    # left.
    shift = cols - rows
    assert block.lower is None or shift >= block.lower, "every row of a band sees a key (blocks.plan_blocks)"
    return {
        "sparse_mode": 4,
        "atten_mask": compressed_mask(device),
        "pre_tockens": UNLIMITED if block.lower is None else shift - block.lower,
        "next_tockens": UNLIMITED if block.upper is None else block.upper - shift,
    }


def _clear_empty_rows(out, lse, attention_mask):
    """Out 0 and lse -inf where a dense mask hides every key; the operator computes something else there."""
    empty = attention_mask.all(-1).t().unsqueeze(-1)
    out.masked_fill_(empty.unsqueeze(-1), 0)
    lse.masked_fill_(empty, -torch.inf)
