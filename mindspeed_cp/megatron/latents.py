"""Multi-latent attention of Megatron, of which the latent travels instead of the keys and values of all heads.

Megatron projects the latent up and puts keys together from that and the rotated part, in one function. Here its
up-projection gives back an ``UpProjected``, which computes nothing and remembers what it would have been made of. The
function so returns the two tensors that travel, and core attention makes keys and values of them.

Shapes, s: tokens of this rank, b: batch, which tensors of packed sequences do not have, n: heads of this
tensor-parallel rank: latent (s, b, rank), rotated part of the key (s, b, 1, rope), key (s, b, n, nope + rope), value
(s, b, n, dv).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional

from mindspeed_cp.attention.exchange_choice import sends_latents
from mindspeed_cp.attention.expansion import LatentExpansion, Sums
from mindspeed_cp.settings.notices import warn_rank0

if TYPE_CHECKING:
    from mindspeed_cp.megatron.adaptor import Adaptor

MARK = "context_parallel_latents"  # on an up-projection and a core attention that belong together
HOLDS_BACK = "holds_latents_back"  # on the forward methods of up-projections that look for the mark
HEADS = "use --cp-mla-exchange heads"


@dataclass(frozen=True, eq=False)
class FusedExpansion(LatentExpansion):
    """One whose gradient joins ``main_grad``, as Megatron's linear layers with gradient accumulation fusion do it."""

    def handed_over(self, sums: Sums) -> tuple[torch.Tensor | None, ...]:
        (total,), weight = sums, self.weight
        main_grad = getattr(weight, "main_grad", None)
        if total is None or main_grad is None:
            return super().handed_over(sums)
        main_grad.add_(total)
        if not hasattr(weight, "grad_added_to_main_grad"):
            return (None,)
        weight.grad_added_to_main_grad = True
        # The hooks of data parallelism run where there is a gradient, and read this one where they are told to.
        return (torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight),)


@dataclass(frozen=True, eq=False)
class Latents:
    """What the up-projection and the core attention of one module share.

    Args:
        linear: the up-projection. heads: of this tensor-parallel rank.
        nope, rope, dv: of a head.
        apart: what travels needs memory of its own, because Megatron frees it.
    """

    linear: Any
    heads: int
    nope: int
    rope: int
    dv: int
    apart: bool

    @classmethod
    def of(cls, module: Any) -> "Latents":
        """Those of Megatron's MLASelfAttention."""
        config = module.config
        return cls(
            module.linear_kv_up_proj,
            module.num_attention_heads_per_partition,
            config.qk_head_dim,
            config.qk_pos_emb_head_dim,
            config.v_head_dim,
            apart=module.recompute_up_proj or bool(getattr(module, "offload_core_attention", False)),
        )

    @property
    def expansion(self) -> LatentExpansion:
        fused = any(
            getattr(self.linear, name, False) for name in ("gradient_accumulation_fusion", "fuse_wgrad_accumulation")
        )
        kind = FusedExpansion if fused else LatentExpansion
        return kind(self.linear.weight, self.heads, self.nope, self.rope, self.dv)

    def held_back(self, latent: torch.Tensor) -> "UpProjected":
        """What the up-projection returns for its input, of which a rank of sequence parallelism has a part."""
        latent = _whole(self.linear, _normed(self.linear, latent))
        return UpProjected(self, latent.clone() if self.apart else latent)


def _normed(linear: Any, latent: torch.Tensor) -> torch.Tensor:
    """The norm inside of Transformer Engine's linear layer, where it has one; in float32, as there."""
    weight = getattr(linear, "layer_norm_weight", None)
    if weight is None:
        return latent
    gamma, shape = weight.float() + int(linear.zero_centered_gamma), latent.shape[-1:]
    if linear.normalization == "RMSNorm":
        return functional.rms_norm(latent.float(), shape, gamma, linear.eps).to(latent.dtype)
    beta = None if linear.layer_norm_bias is None else linear.layer_norm_bias.float()
    return functional.layer_norm(latent.float(), shape, gamma, beta, linear.eps).to(latent.dtype)


def _whole(linear: Any, latent: torch.Tensor) -> torch.Tensor:
    """The latent of all tokens, whose gradient is summed over tensor parallelism, as the linear layer has it."""
    from megatron.core.tensor_parallel import mappings

    group = getattr(linear, "tp_group", None) or getattr(linear, "_tp_group", None)
    named = {} if group is None else {"group": group}  # 0.12 knows but one
    function: Callable[..., torch.Tensor] = mappings.copy_to_tensor_model_parallel_region
    if linear.sequence_parallel:
        function = mappings.gather_from_sequence_parallel_region
    return function(latent, **named)


class UpProjected:
    """What an up-projection would have made of the latent: it has the shape, and no memory.

    ``contiguous``, with which Megatron ends what it makes of it, gives what travels: for the key its rotated part, for
    the value the latent.

    Args:
        latent: (s, b, rank), or without batch.
        part: of which tensor it is; at first of both.
        rotated: (s, b, n, rope), the part of a key that has been joined to it.
    """

    def __init__(
        self,
        latents: Latents,
        latent: torch.Tensor,
        part: Literal["both", "key", "value"] = "both",
        rotated: torch.Tensor | None = None,
    ) -> None:
        self._latents, self._latent, self._part, self._rotated = latents, latent, part, rotated
        width = {"both": latents.nope + latents.dv, "key": latents.nope, "value": latents.dv}[part]
        width += 0 if rotated is None else latents.rope
        self.shape = torch.Size((*latent.shape[:-1], latents.heads * width))
        self._by_heads = torch.Size((*latent.shape[:-1], latents.heads, width))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def view(self, *shape: int) -> "UpProjected":
        if torch.Size(shape) != self._by_heads:
            raise _unknown(f"view{tuple(shape)}")
        return self

    def contiguous(self) -> torch.Tensor:
        if self._part == "value":
            return self._latent.unsqueeze(-2)
        if self._part == "both" or self._rotated is None:
            raise _unknown("contiguous")
        return self._rotated[..., :1, :]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        last = (kwargs or {}).get("dim", 0) == -1
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        if isinstance(first, cls) and last:
            latents = first._latents
            if function is torch.split and first._part == "both" and list(args[1]) == [latents.nope, latents.dv]:
                return cls(latents, first._latent, "key"), cls(latents, first._latent, "value")
            if function is torch.cat and first._part == "key" and len(args[0]) == 2 and first._rotated is None:
                return cls(latents, first._latent, "key", args[0][1])
        raise _unknown(getattr(function, "__name__", str(function)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _unknown(name)


def _unknown(what: str) -> ValueError:
    return ValueError(
        f"--cp-mla-exchange latent: this Megatron does {what} to what the up-projection of keys and values returns, "
        f"and of the latent nothing of the kind can be done; {HEADS}."
    )


def latents_of(adaptor: "Adaptor", module: Any) -> Latents | None:
    """What travels for one of Megatron's modules of multi-latent attention: its latents, None for heads.

    Raises:
        ValueError: latents are asked for, and this module cannot send them.
    """
    core = module.core_attention
    scope = adaptor.scope_of(core if hasattr(core, "config") else module)
    exchange = scope.config.mla_exchange
    if exchange == "heads" or scope.alone:
        return None
    why = _refusal(adaptor, module)
    if why and exchange == "latent":
        raise ValueError(f"--cp-mla-exchange latent: {why}; {HEADS}.")
    if why:
        warn_rank0(f"--cp-mla-exchange auto sends heads: {why}; {HEADS}, which says nothing.")
        return None
    latents = Latents.of(module)
    expansion = latents.expansion
    itemsize = expansion.weight.element_size()
    return latents if sends_latents(scope.config, expansion, scope.groups.topology, itemsize) else None


def _refusal(adaptor: "Adaptor", module: Any) -> str:
    """Why a module cannot send latents, "" where it can."""
    config, linear = module.config, module.linear_kv_up_proj
    bias, weight = getattr(linear, "bias", None), getattr(linear, "weight", None)
    ours = getattr(type(module.core_attention).forward, "exchanges_context_parallel", False)
    kind, core = type(linear).__name__, type(module.core_attention).__name__
    reasons = {
        f"its core attention is a {core}, which this project does not compute": not ours,
        f"its up-projection is a {kind}, which may do more than a matrix product": not getattr(
            type(linear).forward, HOLDS_BACK, False
        ),
        "its up-projection has a bias": bias is not None and bias.numel() > 0,
        "its up-projection is computed in fp8 or fp4, and keys and values would be made in another type": bool(
            getattr(config, "fp8", None) or getattr(config, "fp4", None)
        ),
        "--delay-wgrad-compute takes the weight's gradient from the up-projection itself": getattr(
            config, "delay_wgrad_compute", False
        ),
        "fused rotary embeddings rotate keys that are made already (--no-rope-fusion)": config.apply_rope_fusion,
        "a fully sharded weight is there in the up-projection alone": hasattr(weight, "__fsdp_param__"),
        "the up-projection's weight is shared out and gathered when it runs": getattr(linear, "gtp_remat_size", 1) > 1,
        "micro-batches of several context-parallel sizes share the module": bool(adaptor.sizes),
    }
    return next((why for why, holds in reasons.items() if holds), "")


def mark(module: Any, latents: Latents | None) -> None:
    """Let the up-projection and the core attention of ``module`` know what travels; no parameter and no state."""
    for part in (module.linear_kv_up_proj, module.core_attention):
        vars(part)[MARK] = latents


def marked(module: Any) -> Latents | None:
    """What ``mark`` left on an up-projection or a core attention."""
    found: Latents | None = vars(module).get(MARK)
    return found
