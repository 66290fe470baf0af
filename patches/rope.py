"""Patches of rotary position embeddings: each rank's part by the layout, for any length and for packed documents."""

import importlib
import inspect
from functools import lru_cache, wraps

from mindspeed_cp.patches.manager import Patch
from mindspeed_cp.patches.pipeline import block_record

from mindspeed_cp.megatron.packed import layout_of_packed, places_in_documents

ROPE_UTILS = "megatron.core.models.common.embeddings.rope_utils"
ROTARY = "megatron.core.models.common.embeddings.rotary_pos_embedding.RotaryEmbedding"
YARN = "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding.YarnRotaryEmbedding"


def rope_patches(state):
    state.on_change.append(forget_cached_embeddings)
    return [
        Patch(
            f"{ROPE_UTILS}.get_pos_emb_on_this_cp_rank",
            _slice_embedding(state),
            "positions follow the chosen algorithm's layout; Megatron's own is an even zigzag",
        ),
        Patch(
            f"{ROTARY}.get_rotary_seq_len",
            _rotary_seq_len(state),
            "the local length times cp is not the length of the sequence when lengths are uneven",
        ),
        Patch(
            f"{ROPE_UTILS}._apply_rotary_pos_emb_thd",
            _apply_packed(state),
            "packed documents are split as one sequence, not each into 2 * cp padded chunks",
        ),
        Patch(
            f"{ROPE_UTILS}.apply_rotary_pos_emb",
            _unfused_when_packed(state),
            "the fused packed embedding of Transformer Engine assumes its own split",
        ),
    ]


def forget_cached_embeddings():
    """Megatron keeps the last 32 embeddings per length; they are wrong after the layout has changed."""
    for path in (ROTARY, YARN):
        module, _, name = path.rpartition(".")
        try:
            forward = getattr(importlib.import_module(module), name).forward
        except ImportError:  # Megatron is not there, and so has cached nothing
            continue
        if hasattr(forward, "cache_clear"):
            forward.cache_clear()


def _slice_embedding(state):
    def build(original):
        @wraps(original)
        def get_pos_emb_on_this_cp_rank(pos_emb, seq_dim, *args, **kwargs):
            if state.alone:
                return original(pos_emb, seq_dim, *args, **kwargs)
            return _layout_for(state, pos_emb.size(seq_dim)).shard(pos_emb, state.cp_rank, dim=seq_dim)

        return get_pos_emb_on_this_cp_rank

    return build


def _layout_for(state, seq_len):
    """The layout of the forward pass that runs, or of the configuration for a sequence of another length."""
    record = state.active
    return record.layout if record is not None and record.seq_len == seq_len else state.layout(seq_len)


def _rotary_seq_len(state):
    def build(original):
        signature = inspect.signature(original)
        embedded = {}  # length -> layout with which Megatron's cache holds an embedding of that length
        state.on_change.append(embedded.clear)

        @wraps(original)
        def get_rotary_seq_len(self, *args, **kwargs):
            given = signature.bind(self, *args, **kwargs).arguments
            if state.alone or given.get("packed_seq_params") is not None:
                return original(self, *args, **kwargs)
            layout = _entering(state, given).layout
            if embedded.get(layout.seq_len, layout) != layout:  # Megatron's cache goes by the length alone
                forget_cached_embeddings()
                embedded.clear()
            embedded[layout.seq_len] = layout
            return layout.seq_len

        return get_rotary_seq_len

    return build


def _entering(state, given):
    """The record of the micro-batch for which a model asks the length; ``given`` are the arguments of the question."""
    if state.active is not None:
        return state.active
    block, rows = given["transformer"], given["transformer_input"]
    if block is not None and block.input_tensor is not None:
        rows = block.input_tensor
    return block_record(state, given["transformer_config"] if block is None else block.config, rows.size(0))


def _apply_packed(state):
    def build(original):
        utils = importlib.import_module(ROPE_UTILS)
        # From 0.15 on, embeddings of the total length hold one row per packed token instead of one per place in a
        # document.
        by_token = "offset" in inspect.signature(utils._get_thd_freqs_on_this_cp_rank).parameters
        # What only the packed embedding takes speaks of its own split: cp_group, from 0.20 on max_seqlen.
        known = inspect.signature(utils._apply_rotary_pos_emb_bshd).parameters

        @wraps(original)
        def _apply_rotary_pos_emb_thd(t, cu_seqlens, freqs, *args, **kwargs):
            if state.alone:
                return original(t, cu_seqlens, freqs, *args, **kwargs)
            kwargs = {name: value for name, value in kwargs.items() if name in known}
            boundaries = state.boundaries.boundaries(cu_seqlens)
            layout = layout_of_packed(state, boundaries, t.size(0))
            rows = freqs[
                _places(
                    layout,
                    state.cp_rank,
                    None if by_token and freqs.size(0) == boundaries[-1] else boundaries,
                    freqs.size(0),
                    freqs.device,
                )
            ]
            return utils._apply_rotary_pos_emb_bshd(t.unsqueeze(1), rows, *args, **kwargs).squeeze(1)

        return _apply_rotary_pos_emb_thd

    return build


@lru_cache(maxsize=16)
def _places(layout, cp_rank, boundaries, num_rows, device):
    """(s,) the row of the embedding for each token of this rank; the layers of a micro-batch share it.

    Args:
        boundaries: of the documents, None when the embedding has one row for each token of the sequence.
        num_rows: of the embedding; only padding after the last document lies beyond.
    """
    positions = layout.positions(cp_rank)
    places = positions if boundaries is None else places_in_documents(positions, boundaries)
    return places.clamp_(max=num_rows - 1).to(device)


def _unfused_when_packed(state):
    def build(original):
        utils, signature = importlib.import_module(ROPE_UTILS), inspect.signature(original)
        known = inspect.signature(utils._apply_rotary_pos_emb_thd).parameters

        @wraps(original)
        def apply_rotary_pos_emb(t, freqs, config, cu_seqlens=None, mscale=1.0, *args, **kwargs):
            if state.alone or cu_seqlens is None or not config.apply_rope_fusion:
                return original(t, freqs, config, cu_seqlens, mscale, *args, **kwargs)
            given = signature.bind(t, freqs, config, cu_seqlens, mscale, *args, **kwargs).arguments
            given = {name: value for name, value in given.items() if name in known}
            if "mla_rotary_interleaved" not in signature.parameters:  # from 0.19 on the caller says it
                given["multi_latent_attention"] = config.multi_latent_attention
            return utils._apply_rotary_pos_emb_thd(**given, rotary_interleaved=config.rotary_interleaved)

        return apply_rotary_pos_emb

    return build
