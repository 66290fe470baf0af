"""Megatron's multi-latent attention with exchange of the latent instead of the keys and values of all heads.

Megatron's function projects the latent up and assembles keys from that and the rotated part. Here the up-projection
returns an ``UpProjected``, which computes nothing and records its inputs. The function therefore returns the two
tensors that travel, and core attention computes keys and values from them.

Shapes, s: tokens of this rank, b: batch (missing in packed sequences), n: heads of this tensor-parallel rank: latent
(s, b, rank), rotated part of the key (s, b, 1, rope), key (s, b, n, nope + rope), value (s, b, n, dv).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional

from mindspeed_cp.attention.exchange_choice import sends_latents
from mindspeed_cp.attention.expansion import LatentExpansion, Sums
from mindspeed_cp.megatron.layer_numbers import number_of
from mindspeed_cp.settings.notices import warn_rank0

if TYPE_CHECKING:
    from mindspeed_cp.megatron.adaptor import Adaptor

MARK = "context_parallel_latents"  # attribute of an up-projection and a core attention that belong together
HOLDS_BACK = "holds_latents_back"  # attribute of forward methods of up-projections that check for MARK
ENDS = "ends_as_latents"  # attribute of the method that assembles queries, keys and values, if it is this project's
HEADS = "use --cp-mla-exchange heads"


@dataclass(frozen=True, eq=False)
class FusedExpansion(LatentExpansion):
    """A LatentExpansion that adds its gradient to ``main_grad``, like Megatron's gradient accumulation fusion."""

    def handed_over(self, sums: Sums) -> tuple[torch.Tensor | None, ...]:
        (total,), weight = sums, self.weight
        main_grad = getattr(weight, "main_grad", None)
        if total is None or main_grad is None:
            return super().handed_over(sums)
        main_grad.add_(total)
        if not hasattr(weight, "grad_added_to_main_grad"):
            return (None,)
        weight.grad_added_to_main_grad = True
        # The hooks of data parallelism need some gradient to run; they read its values only if zero_out_wgrad is set.
        return (torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight),)


@dataclass(frozen=True, eq=False)
class Latents:
    """Data shared by the up-projection and the core attention of one module.

    Args:
        linear: the up-projection. expansion: what core attention computes with its weight.
        apart: whether the tensors that travel must be copies, because Megatron frees the originals.
    """

    linear: Any
    expansion: LatentExpansion
    apart: bool

    @classmethod
    def of(cls, module: Any) -> "Latents":
        """The Latents of a module of Megatron's class MLASelfAttention."""
        config, linear = module.config, module.linear_kv_up_proj
        fused = any(
            getattr(linear, name, False) for name in ("gradient_accumulation_fusion", "fuse_wgrad_accumulation")
        )
        expansion = (FusedExpansion if fused else LatentExpansion)(
            linear.weight,
            module.num_attention_heads_per_partition,
            config.qk_head_dim,
            config.qk_pos_emb_head_dim,
            config.v_head_dim,
        )
        return cls(linear, expansion, module.recompute_up_proj or getattr(module, "offload_core_attention", False))

    def held_back(self, latent: torch.Tensor) -> "UpProjected":
        """The up-projection's return value for its input, of which a rank has a part with sequence parallelism."""
        latent = _whole(self.linear, _normed(self.linear, latent))
        return UpProjected(self, latent.clone() if self.apart else latent)


def _normed(linear: Any, latent: torch.Tensor) -> torch.Tensor:
    """Apply the norm inside Transformer Engine's linear layer, if it has one; in float32, as there."""
    weight = getattr(linear, "layer_norm_weight", None)
    if weight is None:
        return latent
    gamma, shape = weight.float() + int(linear.zero_centered_gamma), latent.shape[-1:]
    if linear.normalization == "RMSNorm":
        return functional.rms_norm(latent.float(), shape, gamma, linear.eps).to(latent.dtype)
    beta = None if linear.layer_norm_bias is None else linear.layer_norm_bias.float()
    return functional.layer_norm(latent.float(), shape, gamma, beta, linear.eps).to(latent.dtype)


def _whole(linear: Any, latent: torch.Tensor) -> torch.Tensor:
    """The latent of all tokens, with its gradient summed over tensor-parallel ranks, as in the linear layer."""
    from megatron.core.tensor_parallel import mappings

    group = getattr(linear, "tp_group", None) or getattr(linear, "_tp_group", None)
    named = {} if group is None else {"group": group}  # 0.12 has only one
    function: Callable[..., torch.Tensor] = mappings.copy_to_tensor_model_parallel_region
    if linear.sequence_parallel:
        function = mappings.gather_from_sequence_parallel_region
    return function(latent, **named)


class UpProjected:
    """A placeholder for the up-projection of a latent, with its shape but without memory.

    Megatron finally calls ``contiguous``, which returns the tensor that travels: the rotated part for the key, the
    latent for the value.

    Args:
        latent: (s, b, rank), or without batch.
        part: the tensor for which it stands, at first both.
        rotated: (s, b, n, rope), the rotated part that was concatenated to the key.
    """

    def __init__(
        self,
        latents: Latents,
        latent: torch.Tensor,
        part: Literal["both", "key", "value"] = "both",
        rotated: torch.Tensor | None = None,
    ) -> None:
        self._latents, self._latent, self._part, self._rotated = latents, latent, part, rotated
        sizes = latents.expansion
        width = {"both": sizes.nope + sizes.dv, "key": sizes.nope, "value": sizes.dv}[part]
        width += 0 if rotated is None else sizes.rope
        self.shape = torch.Size((*latent.shape[:-1], sizes.heads * width))
        self._by_heads = torch.Size((*latent.shape[:-1], sizes.heads, width))

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
            widths = [latents.expansion.nope, latents.expansion.dv]
            if function is torch.split and first._part == "both" and list(args[1]) == widths:
                return cls(latents, first._latent, "key"), cls(latents, first._latent, "value")
            if function is torch.cat and first._part == "key" and len(args[0]) == 2 and first._rotated is None:
                return cls(latents, first._latent, "key", args[0][1])
        raise _unknown(getattr(function, "__name__", str(function)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _unknown(name)

    def _refuse(self, other: Any) -> Any:
        raise _unknown("arithmetic")

    # Python looks up operators on the class; the hook of an adapter (LoRA) uses them to add its own product.
    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __truediv__ = _refuse


def _unknown(what: str) -> ValueError:
    return ValueError(
        f"--cp-mla-exchange latent: this Megatron does {what} to what the up-projection of keys and values returns, "
        f"and of the latent nothing of the kind can be done; {HEADS}."
    )


def latents_of(adaptor: "Adaptor", module: Any) -> Latents | None:
    """The Latents of one of Megatron's modules of multi-latent attention; None if keys and values of heads travel.

    Raises:
        ValueError: latents are requested, but this module cannot send them.
    """
    core = module.core_attention
    scope = adaptor.scope_of(core if hasattr(core, "config") else module)
    config = scope.config.of_layer(number_of(module))
    exchange = config.mla_exchange
    if exchange == "heads" or scope.alone:
        return None
    why = _refusal(adaptor, module)
    if why and exchange == "latent":
        raise ValueError(f"--cp-mla-exchange latent: {why}; {HEADS}.")
    if why:
        warn_rank0(f"--cp-mla-exchange auto sends heads: {why}; {HEADS}, which says nothing.")
        return None
    latents = Latents.of(module)
    itemsize = latents.expansion.weight.element_size()
    sends = sends_latents(config, latents.expansion, scope.groups.of(config).topology, itemsize)
    return latents if sends else None


def _refusal(adaptor: "Adaptor", module: Any) -> str:
    """Why a module cannot send latents, "" if it can."""
    config, linear = module.config, module.linear_kv_up_proj
    bias, weight = getattr(linear, "bias", None), getattr(linear, "weight", None)
    ours = _calls(module.core_attention, "forward", "exchanges_context_parallel")
    kind, core = type(linear).__name__, type(module.core_attention).__name__
    autocast = weight is not None and weight.device.type != "meta" and torch.is_autocast_enabled(weight.device.type)
    reasons = {
        f"its core attention is a {core}, which this project does not compute": not ours,
        f"its up-projection is a {kind}, which may do more than a matrix product": not _calls(
            linear, "forward", HOLDS_BACK
        ),
        f"get_query_key_value_tensors of {type(module).__name__} may do more to keys and values than Megatron": not (
            _calls(module, "get_query_key_value_tensors", ENDS)
        ),
        "autocast computes its up-projection in another type than the weight has": autocast,
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


def _calls(module: Any, method: str, attribute: str) -> bool:
    """Whether a method of ``module`` has this attribute and is its class's own, not set on the instance."""
    found = getattr(type(module), method, None)
    return method not in vars(module) and bool(getattr(found, attribute, False))


def mark(module: Any, latents: Latents | None) -> None:
    """Set MARK on the up-projection and the core attention of ``module``, outside of parameters and state."""
    for part in (module.linear_kv_up_proj, module.core_attention):
        vars(part)[MARK] = latents


def marked(module: Any) -> Latents | None:
    """The Latents that ``mark`` set on an up-projection or a core attention."""
    found: Latents | None = vars(module).get(MARK)
    return found
