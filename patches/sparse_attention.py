"""Patches of sparse attention (DSA), which gathers keys and indexer keys and computes the rank's own queries.

Megatron assumes that the ranks' parts are its zigzag over the whole row, or over every packed document. Here they
follow the layout of the batch, of any lengths, and keys come from the ranks in the order of the sequence; scores,
losses and kernels are Megatron's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from mindspeed_cp.linear.rows import exchange_rows, whole_sequence
from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.batches import block_record
from mindspeed_cp.megatron.scopes import Scope
from mindspeed_cp.patches.computing import WhileRunning
from mindspeed_cp.patches.experts import schedule_two_ranks
from mindspeed_cp.patches.rows import Row, absent, arguments_of, patch
from mindspeed_cp.sequence.layout import SequenceLayout

VARIANT = "megatron.core.transformer.experimental_attention_variant"
LAYOUTS = f"{VARIANT}.dsa_layout"
WITHOUT = absent(
    f"{LAYOUTS}.build_zigzag_allgather_cp_key_reorder", "this version's sparse attention has no context parallelism"
)
WHERE = "the ranks hold what the layout of the batch says, not Megatron's zigzag"
DSA = f"{VARIANT}.dsa"
AUTO_SCALER = f"{DSA}.DSAIndexerLossAutoScaler"


@dataclass(frozen=True)
class Running:
    """The running sparse attention.

    Args:
        weight: factor for the gradient of its indexer's loss.
        share: this rank's queries over the mean of all ranks, for a mean of them; else 1.
    """

    layout: SequenceLayout
    scope: Scope
    weight: float
    share: float


RUNNING = WhileRunning[Running]("the sparse attention that runs")


@patch(f"{DSA}.DSAttention.forward", reason=WHERE, when=WITHOUT)
def forward(adaptor: Adaptor, original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    scope = adaptor.scope_of(self)
    if scope.alone:
        return original(self, *args, **kwargs)
    given = arguments_of(original, (self, *args), kwargs)
    params = given.get("packed_seq_params")
    packed = params if getattr(params, "qkv_format", None) == "thd" else None
    layout = block_record(adaptor, scope, self.config, given["x"].size(0), packed).layout
    _check(self, scope, layout, packed)
    self.cp_comm_type = "allgather"  # the only type that it supports, whatever other layers use
    share = weight = 1.0
    if not self.config.calculate_per_token_loss:
        share = layout.length(scope.rank) * scope.size / layout.seq_len
        weight = share / (scope.size if _scales_with_cp() else 1)
    with RUNNING.set(Running(layout, scope, weight, share)):
        return original(self, *args, **kwargs)


def _check(module: Any, scope: Scope, layout: SequenceLayout, packed: Any) -> None:
    """Raise ValueError for inputs that this attention would compute wrongly."""
    from megatron.core.transformer.experimental_attention_variant import dsa_kernels

    fused = dsa_kernels.use_fused_dsa_kernels(module.config)
    if not layout.is_even and fused:
        raise ValueError(
            f"--dsa-kernel-backend {module.config.dsa_kernel_backend} takes equally many tokens on every rank, and a "
            f"sequence of {layout.seq_len} tokens in the layout {layout.kind} is shared unevenly by the "
            f"--context-parallel-size {scope.size} ranks; use a length that 2 x {scope.size} divides, or "
            "--dsa-kernel-backend none."
        )
    if packed is None:
        return
    if layout.kind != "document_zigzag" and fused:
        raise ValueError(
            f"--dsa-kernel-backend {module.config.dsa_kernel_backend} takes packed documents to be zigzag each, and "
            f"the batch has the layout {layout.kind}; use --cp-batch-layout document_zigzag, or --dsa-kernel-backend "
            "none."
        )
    if getattr(packed, "real_token_mask_q", None) is not None and not module.config.calculate_per_token_loss:
        raise ValueError(
            "the indexer loss of sparse attention averages over the real tokens of each rank, of which the "
            "context-parallel ranks have different numbers (real_token_mask_q); use --calculate-per-token-loss."
        )


@patch(
    "megatron.core.tensor_parallel.mappings.gather_from_sequence_parallel_region",
    reason="sparse attention gathers keys with it: from parts of any length, in the order of the sequence",
    when=WITHOUT,
)
def gathered(adaptor: Adaptor, original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    now = RUNNING.get()
    if now is None:
        return original(*args, **kwargs)
    given = arguments_of(original, args, kwargs)
    if given.get("group") is not now.scope.group:  # that of sequence parallelism
        return original(*args, **kwargs)
    link = now.scope.groups.cp
    assert link is not None, "it runs over several ranks"
    return exchange_rows(given["input_"], whole_sequence(now.layout), link, "kv")


def while_running(target: str, reason: str = WHERE) -> Callable[[Callable[..., Any]], Row]:
    """Decorate ``(now, **arguments) -> result``, which runs instead of ``target`` inside of a sparse attention."""

    def decorate(function: Callable[..., Any]) -> Row:
        def run(adaptor: Adaptor, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            now = RUNNING.get()
            if now is None:
                return original(*args, **kwargs)
            return function(now, **arguments_of(original, args, kwargs))

        return patch(target, reason=reason, when=WITHOUT)(run)

    return decorate


@while_running(f"{DSA}._validate_nonpacked_cp_uniform_length", "ranks may hold unequal numbers of tokens")
def validate(now: Running, **given: Any) -> None:
    pass


@while_running(f"{LAYOUTS}.build_zigzag_allgather_cp_key_reorder")
def key_reorder(now: Running, *, device: Any, **given: Any) -> torch.Tensor:
    return torch.arange(now.layout.seq_len, device=device)


@while_running(f"{LAYOUTS}.get_cp_positions_from_layout")
def positions(now: Running, *, cp_rank: int, skv: int, device: Any, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return now.layout.positions(cp_rank, device), torch.arange(skv, device=device)


@while_running(
    f"{LAYOUTS}.extract_query_positions_from_position_ids",
    "position ids may count from the beginning of a document; without context parallelism they are not read",
)
def positions_of_ids(now: Running, **given: Any) -> None:
    return None


@while_running(f"{LAYOUTS}.build_packed_allgather_cp_local_positions")
def packed_positions(now: Running, *, cp_rank: int, device: Any, **given: Any) -> torch.Tensor:
    return now.layout.positions(cp_rank, device)


@while_running(f"{LAYOUTS}.build_packed_allgather_cp_query_positions_and_key_reorder")
def packed_positions_and_reorder(
    now: Running, *, cp_rank: int, device: Any, **given: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return now.layout.positions(cp_rank, device), torch.arange(now.layout.seq_len, device=device)


@patch(
    f"{DSA}.DSAIndexerLossLoggingHelper.save_loss_to_tracker",
    reason="the logged loss is averaged over the ranks, which may hold unequal numbers of queries",
    when=WITHOUT,
)
def save_loss(adaptor: Adaptor, original: Callable[..., None], loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    now = RUNNING.get()
    original(loss if now is None else loss * now.share, *args, **kwargs)


@patch(f"{AUTO_SCALER}.forward", reason="the factor of the gradient below is that of the layer", when=WITHOUT)
def attach_loss(
    adaptor: Adaptor, original: Callable[..., Any], ctx: Any, output: torch.Tensor, loss: torch.Tensor
) -> torch.Tensor:
    now = RUNNING.get()
    ctx.weight = 1 if now is None else now.weight
    attached: torch.Tensor = original(ctx, output, loss)
    return attached


@patch(
    f"{AUTO_SCALER}.backward",
    reason="a mean over each rank's queries counts cp times what it counts without context parallelism, where the "
    "schedule multiplies it by cp",
    when=WITHOUT,
)
def loss_gradient(adaptor: Adaptor, original: Callable[..., Any], ctx: Any, grad: torch.Tensor) -> Any:
    grad, of_loss = original(ctx, grad)
    return grad, of_loss * ctx.weight


@cache
def _scales_with_cp() -> bool:
    """Whether Megatron multiplies the loss of the indexer by cp."""
    factors: list[torch.Tensor] = []
    return schedule_two_ranks(experimental_attention_variant_loss_scale_func=factors.append) and float(factors[-1]) == 2
