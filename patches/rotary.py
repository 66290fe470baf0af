"""Patches of rotary position embeddings: each rank's part by the layout, for any length and for packed documents."""

import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch

from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.batches import block_record
from mindspeed_cp.megatron.documents import places_in_documents
from mindspeed_cp.megatron.packed import layout_of_contract
from mindspeed_cp.megatron.records import MicroBatch
from mindspeed_cp.megatron.scopes import Scope, named_group
from mindspeed_cp.megatron.splitting import built
from mindspeed_cp.patches.rows import arguments_of, patch, signature_of
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.sequence.runs import positions

ROPE_UTILS = "megatron.core.models.common.embeddings.rope_utils"
EMBEDDINGS = "megatron.core.models.common.embeddings"
ROTARY = f"{EMBEDDINGS}.rotary_pos_embedding.RotaryEmbedding"
MULTIMODAL = f"{EMBEDDINGS}.rotary_pos_embedding.MultimodalRotaryEmbedding"
YARN = f"{EMBEDDINGS}.yarn_rotary_pos_embedding.YarnRotaryEmbedding"


def forget_cached_embeddings() -> None:
    """Clear Megatron's caches of the last 32 embeddings, which are wrong after the layout has changed."""
    for path in (ROTARY, YARN):
        module, _, name = path.rpartition(".")
        if module not in sys.modules:  # not imported, so nothing is cached
            continue
        forward = getattr(sys.modules[module], name).forward
        if hasattr(forward, "cache_clear"):
            forward.cache_clear()


def _scope(adaptor: Adaptor, group: Any = None) -> Scope:
    """The ranks over which an embedding is split: those of the running forward pass, else those of ``group``."""
    if adaptor.computes_alone:
        return adaptor.scopes.alone
    active = adaptor.active
    if active is not None and active.scope is not None:
        return active.scope
    return adaptor.scope_of_group(group)


@patch(
    f"{ROPE_UTILS}.get_pos_emb_on_this_cp_rank",
    reason="positions follow the chosen algorithm's layout; Megatron's own is an even zigzag",
)
def get_pos_emb_on_this_cp_rank(
    adaptor: Adaptor,
    original: Callable[..., torch.Tensor],
    pos_emb: torch.Tensor,
    seq_dim: int,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    if adaptor.computes_alone:
        return pos_emb  # this rank's own rows already
    group = arguments_of(original, (pos_emb, seq_dim, *args), kwargs).get("cp_group")
    scope = _scope(adaptor, group)
    if scope.alone and not adaptor.sizes:
        return original(pos_emb, seq_dim, *args, **kwargs)
    record = adaptor.running_in(scope)
    if record is not None and record.places is not None and record.seq_len == pos_emb.size(seq_dim):
        pos_emb = pos_emb.index_select(seq_dim, positions(record.places[0], pos_emb.device))
    return _layout_for(adaptor, scope, pos_emb.size(seq_dim)).shard(pos_emb, scope.rank, dim=seq_dim)


def _layout_for(adaptor: Adaptor, scope: Scope, seq_len: int) -> SequenceLayout:
    """The layout of the running forward pass, or the configuration's layout for a sequence of another length."""
    record = adaptor.running_in(scope)
    if record is not None and record.seq_len == seq_len:
        return record.layout
    return adaptor.layout(seq_len, scope=scope)


@patch(
    f"{ROTARY}.get_rotary_seq_len",
    reason="the local length times cp is not the length of the sequence when lengths are uneven",
)
def get_rotary_seq_len(adaptor: Adaptor, original: Callable[..., int], self: Any, *args: Any, **kwargs: Any) -> int:
    given = arguments_of(original, (self, *args), kwargs)
    scope = _scope(adaptor, named_group(vars(self)))
    record, packed = adaptor.running_in(scope), given.get("packed_seq_params") is not None
    if record is not None and record.places is not None:
        _check_places(self, record, packed, scope.alone)
    if packed:
        return original(self, *args, **kwargs)
    if scope.alone and not adaptor.sizes and (record is None or not adaptor.sliced):
        made: Any = None
        length = original(self, *args, **kwargs)
    else:
        record = _entering(adaptor, scope, given)
        made, length = (record.layout, record.places, scope.rank), record.seq_len
    # The key of Megatron's cache. If it has dropped an entry whose id is used again, it is only cleared once more.
    key = id(self), length
    if adaptor.embedded.setdefault(key, made) != made:
        forget_cached_embeddings()
        adaptor.embedded.clear()
        adaptor.embedded[key] = made
    return length


def _check_places(embedding: Any, record: MicroBatch, packed: bool, alone: bool) -> None:
    """Raise ValueError if an embedding cannot use the position ids of a batch with slices."""
    assert record.places is not None
    way_out = "use --micro-batch-size 1"
    if packed:
        way_out = "leave packed_seq_params out"
    elif alone and type(embedding).__name__ == "YarnRotaryEmbedding":
        way_out = "use --context-parallel-size 2 or more"
    elif len(record.places) == 1:
        return
    raise ValueError(
        f"rotary_position_ids of the batch do not count from 0 to the end, and {type(embedding).__name__} has one row "
        f"for each token of a whole sequence, the same for all rows of the batch; {way_out}."
    )


@patch(
    f"{ROTARY}.get_freqs_non_repeated",
    reason="without context parallelism, rotary_position_ids of a batch with slices (a tree) say where its tokens are",
)
def get_freqs_non_repeated(
    adaptor: Adaptor, original: Callable[..., torch.Tensor], self: Any, *args: Any, **kwargs: Any
) -> torch.Tensor:
    frequencies, record = original(self, *args, **kwargs), adaptor.active
    if record is None or record.places is None or record.layout.cp_size > 1 or len(frequencies) != record.seq_len:
        return frequencies
    return frequencies[positions(record.places[0], frequencies.device)]


def _entering(adaptor: Adaptor, scope: Scope, given: dict[str, Any]) -> MicroBatch:
    """The record of the micro-batch whose length a model requests; ``given`` are the arguments of the request."""
    record = adaptor.running_in(scope)
    if record is not None:
        return record
    block, rows = given["transformer"], given["transformer_input"]
    if block is not None and block.input_tensor is not None:
        rows = block.input_tensor
    return block_record(adaptor, scope, given["transformer_config"] if block is None else block.config, rows.size(0))


@patch(
    f"{MULTIMODAL}.forward",
    reason="its position ids are those of the whole sequence or of this rank's part; 0.12 cuts the rows of the batch",
)
def multimodal(
    adaptor: Adaptor,
    original: Callable[..., torch.Tensor],
    self: Any,
    position_ids: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    scope = _scope(adaptor, named_group(arguments_of(original, (self, position_ids, *args), kwargs)))
    record = adaptor.running_in(scope)
    if scope.alone or record is None:
        return original(self, position_ids, *args, **kwargs)
    length, own = position_ids.size(-1), record.layout.length(scope.rank)
    if length not in (record.seq_len, own):
        raise ValueError(
            f"position_ids of a multimodal embedding have shape {tuple(position_ids.shape)}, and the sequence has "
            f"{record.seq_len} tokens, of which this rank holds {own}; pass (3, batch, {record.seq_len}) or this "
            f"rank's part, (3, batch, {own})."
        )
    if length == record.seq_len:
        position_ids = record.layout.shard(position_ids, scope.rank, dim=-1 % position_ids.dim()).contiguous()
    with adaptor.computing_alone():
        table = original(self, position_ids, *args, **kwargs)
    adaptor.tables.remember([table], record)
    return table


@patch(
    f"{ROPE_UTILS}._apply_rotary_pos_emb_thd",
    reason="packed documents are split as one sequence, not each into 2 * cp padded chunks",
)
def apply_packed(
    adaptor: Adaptor,
    original: Callable[..., torch.Tensor],
    t: torch.Tensor,
    cu_seqlens: torch.Tensor,
    freqs: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    scope = _scope(adaptor, arguments_of(original, (t, cu_seqlens, freqs, *args), kwargs).get("cp_group"))
    if scope.alone and not adaptor.computes_alone and not adaptor.sizes:
        return original(t, cu_seqlens, freqs, *args, **kwargs)
    utils = importlib.import_module(ROPE_UTILS)
    # Arguments that only the packed embedding takes are about its own split: cp_group, from 0.20 on max_seqlen.
    known = signature_of(utils._apply_rotary_pos_emb_bshd).parameters
    kwargs = {name: value for name, value in kwargs.items() if name in known}
    rows = freqs
    if adaptor.tables.find([freqs]) is None and not _are_of_tokens(adaptor, scope, freqs, t.size(0)):
        boundaries = adaptor.boundaries.boundaries(cu_seqlens)
        layout = _layout_of_packed(adaptor, scope, boundaries, t.size(0))
        # From 0.15 on, embeddings of the total length hold one row per packed token instead of one per position in a
        # document.
        by_token = "offset" in signature_of(utils._get_thd_freqs_on_this_cp_rank).parameters
        documents = None if by_token and freqs.size(0) == boundaries[-1] else boundaries
        rows = freqs[_places(layout, scope.rank, documents, freqs.size(0), boundaries[-1], freqs.device)]
    rotated: torch.Tensor = utils._apply_rotary_pos_emb_bshd(t.unsqueeze(1), rows, *args, **kwargs)
    return rotated.squeeze(1)


def _are_of_tokens(adaptor: Adaptor, scope: Scope, freqs: torch.Tensor, local_len: int) -> bool:
    """Whether row i of an embedding is for this rank's token i, as in frameworks that select rows by position ids.

    Otherwise row i is for position i, so that angles count up from 0. If rows of tokens count up from 0 too, both
    meanings agree, or there are too few rows.
    """
    if freqs.size(0) != local_len or local_len < 2:
        return False
    angles = freqs.reshape(local_len, -1)[:, 0].float()
    counted = torch.arange(local_len, device=freqs.device)
    counts_up = (angles / angles[1] - counted).abs() <= 0.25 + 0.01 * counted  # angles are rounded; 0 / 0 is not near
    if bool(counts_up.all()):
        return False
    record = adaptor.running_in(scope)
    if record is not None:  # cached for all layers of the micro-batch
        adaptor.tables.remember([freqs], record)
    return True


def _layout_of_packed(adaptor: Adaptor, scope: Scope, boundaries: tuple[int, ...], local_len: int) -> SequenceLayout:
    """The layout of the running packed batch; only its padded boundaries may be known here."""
    if scope.alone:
        return built(scope.config, local_len)
    record = adaptor.running_in(scope)
    if record is not None:
        return record.layout
    return layout_of_contract(adaptor, scope, boundaries, local_len)


@lru_cache(maxsize=16)
def _places(
    layout: SequenceLayout,
    cp_rank: int,
    boundaries: tuple[int, ...] | None,
    num_rows: int,
    end: int,
    device: torch.device,
) -> torch.Tensor:
    """(s,), the row of the embedding for each token of this rank; cached for all layers of a micro-batch.

    Args:
        boundaries: document boundaries, None if the embedding has one row for each token of the sequence.
        num_rows: number of rows of the embedding.
        end: end of the last document; padding after it uses the last row if its own does not exist.

    Raises:
        ValueError: the embedding has no row for a token of a document.
    """
    positions = layout.positions(cp_rank)
    places = positions if boundaries is None else places_in_documents(positions, boundaries)
    beyond = places >= num_rows
    if bool((beyond & (positions < end)).any()):
        raise ValueError(
            f"a rotary embedding has {num_rows} rows, and a packed document has a token at place {int(places.max())}; "
            "give PackedSeqParams a max_seqlen_q of the longest document."
        )
    return torch.where(beyond, num_rows - 1, places).to(device)


@patch(
    f"{ROPE_UTILS}.apply_rotary_pos_emb",
    reason="the fused packed embedding of Transformer Engine assumes its own split; what computes alone in a process "
    "with context parallelism would be split",
)
def unfused_when_packed(
    adaptor: Adaptor,
    original: Callable[..., torch.Tensor],
    t: torch.Tensor,
    freqs: torch.Tensor,
    config: Any,
    cu_seqlens: torch.Tensor | None = None,
    mscale: float = 1.0,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    if cu_seqlens is None or adaptor.alone:
        return original(t, freqs, config, cu_seqlens, mscale, *args, **kwargs)
    alone = config.context_parallel_size == 1 and not adaptor.sizes
    if not alone and not config.apply_rope_fusion:
        return original(t, freqs, config, cu_seqlens, mscale, *args, **kwargs)
    utils = importlib.import_module(ROPE_UTILS)
    known = signature_of(utils._apply_rotary_pos_emb_thd).parameters
    given = arguments_of(original, (t, freqs, config, cu_seqlens, mscale, *args), kwargs)
    given = {name: value for name, value in given.items() if name in known}
    if "mla_rotary_interleaved" not in signature_of(original).parameters:  # from 0.19 on it is an argument
        given["multi_latent_attention"] = config.multi_latent_attention
    with adaptor.computing_alone() if alone else nullcontext():  # an encoder's group may be the default
        rotated: torch.Tensor = utils._apply_rotary_pos_emb_thd(**given, rotary_interleaved=config.rotary_interleaved)
    return rotated
