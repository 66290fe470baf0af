"""Patches of the balancing losses of a mixture of experts: the same weight for any context-parallel size.

Every context-parallel rank routes its own tokens, and the gradients of these losses are added outside the loss that the
training script computes. s: tokens of this rank, S: tokens of the whole sequence, cp: ranks.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.batches import record_of_length
from mindspeed_cp.megatron.scopes import Scope
from mindspeed_cp.patches.computing import WhileRunning
from mindspeed_cp.patches.rows import absent, arguments_of, patch
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.settings.notices import warn_rank0

MOE = "megatron.core.transformer.moe"
UTILS = f"{MOE}.moe_utils"


@dataclass(frozen=True)
class Share:
    """The running router's share of a micro-batch's tokens on this rank.

    Args:
        share: s / (S / cp); 1 for even lengths.
        counted: whether Megatron has counted the tokens itself (padding masks).
        weight: factor for the gradients of the losses.
    """

    share: float | torch.Tensor
    counted: bool
    weight: float | torch.Tensor


ROUTING = WhileRunning[Share]("share of the router that runs")


@patch(f"{MOE}.router.TopKRouter.routing", reason="the losses below must know which part of the sequence is routed")
def routing(
    adaptor: Adaptor, original: Callable[..., Any], module: Any, logits: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    scope, config = adaptor.scope_of(module), module.config
    if scope.alone or not module.training:
        return original(module, logits, *args, **kwargs)
    local = logits.size(0) * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    layout = record_of_length(adaptor, scope, local).layout
    _warn_of_local_decisions(config)
    _check_dispatcher(config, layout)
    padding_mask = arguments_of(original, (module, logits, *args), kwargs).get("padding_mask")
    with ROUTING.set(_share(scope, config, local * scope.size / layout.seq_len, padding_mask)):
        return original(module, logits, *args, **kwargs)


def _share(scope: Scope, config: Any, share: float | torch.Tensor, padding_mask: torch.Tensor | None) -> Share:
    if padding_mask is not None:
        valid = padding_mask.logical_not().sum().float()
        total = valid.clone()
        dist.all_reduce(total, group=scope.group)
        # Ranks and micro-batches that contain only padding have losses of 0.
        share = (valid * scope.size / total.clamp(min=1)).clamp(min=1e-9)
    if config.calculate_per_token_loss:
        # Megatron multiplies by s (from 0.19 on by s * cp), sums over the ranks and divides by all tokens; with cp = 1
        # the factor is S.
        weight = (1 if _multiplies_by_ranks() else scope.size) / share
    else:
        # Gradients are averaged over the ranks, but these must be summed.
        weight = 1 if _scales_with_cp() else scope.size
    return Share(share, padding_mask is not None, weight)


@patch(
    f"{UTILS}.switch_load_balancing_loss_func",
    reason="every rank is taken to hold the same number of tokens; and before 0.16, or with a per-token loss, the loss "
    "counts 1 / cp of what it counts without context parallelism",
)
def switch_load_balancing_loss_func(
    adaptor: Adaptor, original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor:
    loss, now = original(*args, **kwargs), ROUTING.get()
    if now is None:
        return loss
    # Megatron divides by (s * cp)^2, assuming S = s * cp.
    return _weighted(loss if now.counted else loss * now.share**2, now.weight)


@patch(
    f"{UTILS}.get_tokens_per_expert_and_token_count",
    reason="with a padding mask the count of this rank's tokens is overwritten by that of all ranks",
    when=absent(f"{UTILS}.get_tokens_per_expert_and_token_count", "padding masks of experts come with 0.16"),
)
def get_tokens_per_expert_and_token_count(
    adaptor: Adaptor, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[Any, Any, Any]:
    per_expert, local, total = original(*args, **kwargs)
    now = ROUTING.get()
    if now is not None and now.counted:
        given = arguments_of(original, args, kwargs)
        local = given["routing_map"].sum() / given["topk"]
        total = total.clamp(min=1)  # if there is only padding, the losses would be 0 / 0
    return per_expert, local, total


@patch(
    f"{UTILS}.sequence_load_balancing_loss_func",
    reason="the same, and gathering the tokens fails for uneven lengths",
    when=absent(
        f"{UTILS}.sequence_load_balancing_loss_func", "from 0.14 this loss is computed by the one for whole batches"
    ),
)
def sequence_load_balancing_loss_func(
    adaptor: Adaptor, original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor:
    now = ROUTING.get()
    if now is None:
        return original(*args, **kwargs)
    return _weighted(_sequence_loss(**arguments_of(original, args, kwargs), share=now.share), now.weight)


@patch(
    f"{UTILS}.z_loss_func",
    reason="the mean over a rank's tokens is the mean over all only for equal counts; and its weight as above",
)
def z_loss_func(adaptor: Adaptor, original: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
    loss, now = original(*args, **kwargs), ROUTING.get()
    return loss if now is None else _weighted(loss * now.share, now.weight)


def _sequence_loss(
    probs: torch.Tensor,
    routing_map: torch.Tensor,
    batch_size: int,
    seq_length: int,
    topk: int,
    moe_aux_loss_coeff: float,
    sequence_partition_group: dist.ProcessGroup,
    share: float | torch.Tensor,
) -> torch.Tensor:
    """This rank's term of the loss that balances the experts within each sequence; the loss is the sum over the ranks.

    Args:
        probs, routing_map: (seq_length * batch_size, experts), for the tokens of this rank.
        sequence_partition_group: the ranks that hold parts of the sequence.
        share: tokens of this rank divided by the mean over the ranks.
    """
    probs, chosen = (tensor.view(seq_length, batch_size, -1).sum(0) for tensor in (probs, routing_map.float()))
    dist.all_reduce(chosen, group=sequence_partition_group)
    total = seq_length * dist.get_world_size(sequence_partition_group) / share
    return (probs * chosen).sum() * (probs.size(-1) * moe_aux_loss_coeff / (batch_size * topk * total**2))


def _check_dispatcher(config: Any, layout: SequenceLayout) -> None:
    if config.moe_token_dispatcher_type != "allgather" or config.expert_model_parallel_size == 1 or layout.is_even:
        return
    raise ValueError(
        f"--moe-token-dispatcher-type allgather gathers equally many tokens from every rank, and sequence "
        f"length {layout.seq_len} gives the --context-parallel-size {layout.cp_size} ranks different "
        "numbers; use --moe-token-dispatcher-type alltoall, or a length that all ranks share evenly."
    )


def _weighted(loss: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """The loss with an unchanged value, for the log, and its gradient multiplied by ``weight``."""
    return loss.detach() + weight * (loss - loss.detach())


@cache
def _scales_with_cp() -> bool:
    """Whether Megatron multiplies these losses by cp, as it does with the training script's loss."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    before = MoEAuxLossAutoScaler.main_loss_backward_scale
    try:
        return schedule_two_ranks(num_moe_experts=1) and float(MoEAuxLossAutoScaler.main_loss_backward_scale) == 2
    finally:
        MoEAuxLossAutoScaler.main_loss_backward_scale = before


def schedule_two_ranks(**settings: Any) -> bool:
    """Let Megatron's schedule set the factors of its own losses, as after every forward pass, for a dummy micro-batch
    on two context-parallel ranks; False if it sets them without a context-parallel size.

    Args:
        settings: settings of the dummy configuration.
    """
    from megatron.core.pipeline_parallel import schedules

    calculate = getattr(schedules, "forward_step_calc_loss", None)
    if calculate is None or "cp_group_size" not in inspect.signature(calculate).parameters:
        return False
    config = {"calculate_per_token_loss": False, "num_moe_experts": None, "mtp_num_layers": None}
    given: dict[str, Any] = {
        "model": None,
        "output_tensor": torch.zeros(1),
        "loss_func": None,
        "config": SimpleNamespace(**config | {"grad_scale_func": None, "timers": None} | settings),
        "vp_stage": None,
        "collect_non_loss_data": False,
        "num_microbatches": 1,
        "forward_data_store": [],
        "cp_group_size": 2,
        "is_last_stage": False,
    }
    calculate(**{name: given[name] for name in inspect.signature(calculate).parameters if name in given})
    return True


@cache
def _multiplies_by_ranks() -> bool:
    """Whether Megatron multiplies these losses by a rank's tokens times the number of ranks, not by the tokens alone.

    Determined by letting a router attach a dummy loss of 1 for 3 tokens on 2 ranks.
    """
    router = importlib.import_module(f"{MOE}.router")
    attach = getattr(router.TopKRouter, "attach_and_log_load_balancing_loss", None)
    if attach is None:
        return False
    attached = []
    made_up = SimpleNamespace(
        config=SimpleNamespace(num_layers=1, mtp_num_layers=None, mtp_use_repeated_layer=False),
        calculate_per_token_loss=True,
        is_mtp_layer=False,
        layer_number=1,
        tp_cp_group=SimpleNamespace(size=lambda: 2),
    )
    nowhere = SimpleNamespace(record=lambda *args, **kwargs: None)
    replaced = {
        "MoEAuxLossAutoScaler": SimpleNamespace(apply=lambda activation, loss: attached.append(float(loss))),
        "save_to_aux_losses_tracker": nowhere.record,
        "get_moe_metrics_tracker": lambda: nowhere,
    }
    before = {name: getattr(router, name) for name in replaced if hasattr(router, name)}
    try:
        for name in before:
            setattr(router, name, replaced[name])
        attach(made_up, torch.zeros(3, 1), 1.0, torch.ones(()), "made up", None)
    finally:
        for name, value in before.items():
            setattr(router, name, value)
    return attached == [6.0]


def _warn_of_local_decisions(config: Any) -> None:
    if config.moe_expert_capacity_factor is not None:
        warn_rank0(
            f"--moe-expert-capacity-factor {config.moe_expert_capacity_factor} drops tokens by the capacity of each "
            "context-parallel rank, so results depend on --context-parallel-size; leave it out to be independent of it."
        )
    if config.moe_router_load_balancing_type == "sinkhorn":
        warn_rank0(
            "--moe-router-load-balancing-type sinkhorn balances the tokens of each context-parallel rank, so results "
            "depend on --context-parallel-size; use aux_loss or seq_aux_loss to be independent of it."
        )
