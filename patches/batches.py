"""Patches of how Megatron splits a batch over the context-parallel ranks."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.records import Documents
from mindspeed_cp.megatron.scopes import Scope, own_group
from mindspeed_cp.megatron.sizes import refuse_dynamic, split_sub_batch
from mindspeed_cp.megatron.slices import brings_slices
from mindspeed_cp.megatron.splitting import length_of, named_sequences, split_in_place
from mindspeed_cp.patches.rows import absent, patch, signature_of

UTILS = "megatron.core.utils"
Batch = dict[str, Any]


@patch(
    f"{UTILS}.get_batch_on_this_cp_rank",
    reason="a rank gets the tokens of the chosen layout; any length, the dense mask stays whole",
)
def get_batch_on_this_cp_rank(
    adaptor: Adaptor, original: Callable[..., Batch], batch: Batch, *args: Any, **kwargs: Any
) -> Batch:
    known = signature_of(original)
    given = known.bind_partial(batch, *args, **kwargs).arguments
    if "is_hybrid_cp" in known.parameters and "is_hybrid_cp" not in given:
        # Code written for Megatron before 0.18 does not pass it and uses Megatron's default group.
        kwargs["is_hybrid_cp"] = False
        if given.get("cp_group") is None and dist.is_initialized():
            kwargs["cp_group"] = own_group()

    def split(scope: Scope, sub_batch: Batch) -> Batch:
        documents = _documents_that_come_along(adaptor, sub_batch, given.get("is_hybrid_cp"))
        return split_in_place(adaptor, scope, sub_batch, documents)

    if adaptor.sizes:
        split_batch: Batch = split_sub_batch(adaptor, batch, given, split)
        return split_batch
    scope = adaptor.scope_of_group(given.get("cp_group"))
    untouched = scope.alone and not adaptor.sliced and not brings_slices(batch, adaptor.settings.image_token_id)
    return original(batch, *args, **kwargs) if untouched else split(scope, batch)


def _documents_that_come_along(adaptor: Adaptor, batch: Batch, is_hybrid: Any) -> Documents | None:
    """The documents of a batch that contains cu_seqlens (1, n), as in 0.18 and later; else None.

    Raises:
        ValueError: dynamic context parallelism without initialize_model_parallel's argument, or several rows.
    """
    if is_hybrid and not adaptor.sizes:
        refuse_dynamic("initialize_model_parallel was not told so (hybrid_context_parallel=True)")
    ends, padded = batch.get("cu_seqlens"), batch.get("cu_seqlens_padded")
    if not isinstance(ends, torch.Tensor):
        return None
    sequences = named_sequences(batch)
    if not sequences:
        return None  # an inner pipeline stage
    if ends.dim() > 1 and ends.size(0) > 1:
        raise ValueError(
            f"cu_seqlens of the batch has shape {tuple(ends.shape)}, and a packed batch is one row; use "
            "--micro-batch-size 1."
        )
    params = SimpleNamespace(cu_seqlens_q=ends, cu_seqlens_q_padded=padded)
    return (adaptor.boundaries.documents(params, length_of(sequences)),)


@patch(
    f"{UTILS}.get_thd_batch_on_this_cp_rank",
    reason="Megatron's split of packed documents needs Transformer Engine and padding",
    when=absent(f"{UTILS}.get_thd_batch_on_this_cp_rank", "packed batches come with 0.16"),
)
def get_thd_batch_on_this_cp_rank(
    adaptor: Adaptor,
    original: Callable[..., tuple[Batch, Any]],
    batch: Batch,
    cu_seqlens: torch.Tensor,
    cu_seqlens_padded: torch.Tensor | None,
    max_seqlen: Any,
    cp_size: int | None = None,
    cp_rank: int | None = None,
) -> tuple[Batch, Any]:
    scope = adaptor.main
    untouched = scope.alone and not adaptor.sliced and not brings_slices(batch, adaptor.settings.image_token_id)
    if untouched or cp_size not in (None, scope.size):
        return original(batch, cu_seqlens, cu_seqlens_padded, max_seqlen, cp_size, cp_rank)
    # As one of one ranks, Megatron creates the parameters but splits nothing.
    batch, params = original(batch, cu_seqlens, cu_seqlens_padded, max_seqlen, 1, 0)
    documents = (adaptor.boundaries.documents(params, length_of(named_sequences(batch))),)
    return split_in_place(adaptor, scope, batch, documents), params
