"""What MindSpeed's names do here: the names that frameworks and MindSpeed's own tests import."""

import argparse
import importlib
from types import SimpleNamespace

import pytest
import reference
import torch
from distributed import run_ranks

from mindspeed_cp import compat
from mindspeed_cp.compat import process_groups
from mindspeed_cp.compat.arguments import process_args
from mindspeed_cp.compat.patch_manager import MindSpeedPatchesManager
from mindspeed_cp.compat.tensors import sbh_to_tnd, tnd_to_sbh
from mindspeed_cp.compat.ulysses import ulyssesattn_context_parallel
from mindspeed_cp.megatron.documents import Handed
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.settings.config import ContextParallelConfig

SEQ, BATCH, HEADS, KV_HEADS, DIM = 8, 2, 4, 2, 3


def test_changes_of_shape_keep_the_rows_of_the_batch_together():
    sbh = torch.arange(SEQ * BATCH * HEADS * DIM).view(SEQ, BATCH, HEADS * DIM)
    tnd = sbh_to_tnd(sbh, HEADS)
    assert tnd.shape == (SEQ * BATCH, HEADS, DIM) and torch.equal(tnd[SEQ + 1].flatten(), sbh[1, 1])
    assert torch.equal(tnd_to_sbh(tnd, BATCH), sbh)


def test_process_args_adds_the_flags_and_no_patch_is_registered():
    parser = process_args(argparse.ArgumentParser())
    assert parser.parse_args(["--context-parallel-algo", "megatron_cp_algo"]).context_parallel_algo
    assert MindSpeedPatchesManager.patches_info == {}
    MindSpeedPatchesManager.apply_patches()
    MindSpeedPatchesManager.remove_patches()
    with pytest.raises(NotImplementedError, match="fla.ops.rule cannot be patched"):
        MindSpeedPatchesManager.register_patch("fla.ops.rule", print)


def test_makers_of_groups_say_that_initialize_model_parallel_makes_them():
    for name in process_groups.__all__:
        if name.startswith("initialize_"):
            getattr(process_groups, name)(1, 1, 1, {})


@pytest.mark.parametrize(
    ("ends", "rows", "documents"),
    [
        ([3, 8], 1, ((0, 3, 8),)),
        (torch.tensor([3, 8]), 1, ((0, 3, 8),)),
        ([0, 3], 1, ((0, 3, 8),)),
        ([3, 8, 10, 16], 2, ((0, 3, 8), (0, 2, 8))),
        ([5, 16], 2, ((0, 5, 8), (0, 8))),
    ],
)
def test_ends_that_were_handed_over_are_the_boundaries_of_a_batch_and_stay(ends, rows, documents):
    handed = Handed()
    assert handed.take(rows, 8) is None
    handed.set_ends(ends)
    assert handed.ends is ends
    assert handed.take(rows, 8) == documents
    assert not handed.waiting and handed.take(rows, 8) == documents, "they stay until others are set"


@pytest.mark.parametrize("ends", [[3, 9], [5, 3], []])
def test_ends_that_do_not_fit_the_batch_are_refused(ends):
    handed = Handed()
    handed.set_ends(ends)
    with pytest.raises(ValueError, match="set_actual_seq_len got ends up to .* 1 rows of 8 tokens"):
        handed.take(1, 8)


def _packed(*ends):
    return SimpleNamespace(cu_seqlens_q=torch.tensor(ends, dtype=torch.int32))


# name -> (attn_para, cache policy, whether heads and dim come merged, what reference.allowed_pairs takes)
HIDDEN = torch.rand(SEQ, SEQ, generator=torch.Generator().manual_seed(9)) < 0.4
COMPRESSED = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
BAND = {"sparse_mode": 4, "attention_mask": COMPRESSED, "pre_tokens": 2, "next_tokens": 1}
# The rows of the batch one after another: documents that differ by row, and one that is as long as a row.
ENDS, ROWS = (3, SEQ, SEQ + 1, BATCH * SEQ), ((0, 3, SEQ), (0, 1, SEQ))
ULYSSES = {
    "causal": ({"sparse_mode": 2, "attention_mask": COMPRESSED}, "full", False, [dict(causal=True)]),
    "full": ({"sparse_mode": 0}, "half", True, [{}]),
    "mask": ({"sparse_mode": 0, "attention_mask": HIDDEN}, None, False, [dict(attention_mask=HIDDEN)]),
    "band": (BAND, None, True, [dict(window=(2, 1))]),
    "packed band": (
        {**BAND, "packed_seq_params": _packed(*ENDS)},
        None,
        False,
        [dict(window=(2, 1), cu_seqlens=row) for row in ROWS],
    ),
    "packed causal": (
        {"sparse_mode": 2, "packed_seq_params": _packed(0, *ENDS)},
        "full",
        False,
        [dict(causal=True, cu_seqlens=row) for row in ROWS],
    ),
    "packed full": ({"packed_seq_params": _packed(*ENDS)}, "half", True, [dict(cu_seqlens=row) for row in ROWS]),
}


def _ulysses(rank):
    """name -> largest difference of outputs and gradients from dense attention."""
    layout = SequenceLayout.build(ContextParallelConfig(context_parallel_size=2), SEQ)
    generator = torch.Generator().manual_seed(4)
    shapes = [(SEQ, BATCH, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    *whole, grad = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    found = {}
    for name, (para, policy, merged, allowed) in ULYSSES.items():
        rows = [reference.allowed_pairs(SEQ, **row) for row in allowed]
        expected = reference.attention_with_gradients(*whole, grad, torch.cat(rows))
        local = [layout.shard(tensor, rank).clone().requires_grad_() for tensor in whole]
        given = [tensor.flatten(2) for tensor in local] if merged else local
        out = ulyssesattn_context_parallel(
            *given, {"n_head": HEADS, "keep_prob": 1.0, **para}, {"spg": None, "cache_policy": policy}
        )
        out.backward(layout.shard(grad, rank).flatten(2))
        results = [out.detach().unflatten(2, (HEADS, DIM)), *(tensor.grad for tensor in local)]
        found[name] = max(
            float((result - layout.shard(tensor, rank)).abs().max())
            for result, tensor in zip(results, expected.values(), strict=True)
        )
    query = torch.zeros(SEQ // 2, BATCH, HEADS, DIM)
    for para, words in (
        ({"sparse_mode": 6}, r"\['sparse_mode'\] 6 is not supported; use 2 or 3"),
        ({"sparse_mode": 4, "pre_tokens": 3}, "pre_tokens and next_tokens, which are 3 and None"),
        ({"attention_mask": HIDDEN, "packed_seq_params": _packed(*ENDS)}, "leave out one of the two"),
        ({"packed_seq_params": _packed(3, SEQ)}, f"ends with {SEQ} and must end with {BATCH * SEQ}"),
    ):
        with pytest.raises(ValueError, match=words):
            ulyssesattn_context_parallel(query, query, query, para, {"spg": None})
    return found


def test_ulysses_as_mindspeed_calls_it_is_dense_attention():
    for found in run_ranks(2, _ulysses):
        assert max(found.values()) < 1e-10, found


def test_every_answered_module_says_what_it_exports():
    for name in set(compat.ALIASES.values()):
        if not name.endswith("megatron_adaptor"):
            module = importlib.import_module(name)
            assert all(hasattr(module, attribute) for attribute in module.__all__)
