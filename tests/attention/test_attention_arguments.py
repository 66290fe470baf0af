"""What context_parallel_attention refuses, and that the message holds the value, the rule and a way out."""

import re
from dataclasses import replace

import pytest
import torch
from cases import Case, arguments

from mindspeed_cp import ContextParallelConfig, ContextParallelGroups, SequenceLayout, context_parallel_attention

SEQ = 8


def call(
    query=(SEQ, 1, 4, 8),
    key=(SEQ, 1, 2, 8),
    value=(SEQ, 1, 2, 8),
    dtype=torch.float32,
    config=None,
    layout=None,
    groups=None,
    **options,
):
    config = config or ContextParallelConfig()
    groups = groups or ContextParallelGroups.build(config)
    layout = layout or SequenceLayout.build(config, SEQ)
    tensors = [
        shape if isinstance(shape, torch.Tensor) else torch.zeros(shape, dtype=dtype) for shape in (query, key, value)
    ]
    return context_parallel_attention(*tensors, config=config, groups=groups, layout=layout, **options)


def second_rank(config, seq_len=SEQ):
    """Rank 1's view of a group of two, without any process group: what is refused is refused before communication."""
    return {
        "config": config,
        "layout": SequenceLayout.build(config, seq_len),
        "groups": ContextParallelGroups(hierarchy=config.hierarchy, cp_rank=1, global_ranks=(0, 1)),
    }


def test_a_legal_call_passes():
    assert call().shape == (SEQ, 1, 4, 8)


ERRORS = {
    "heads-not-a-multiple": (dict(query=(SEQ, 1, 3, 8)), r"3 heads.*2 KV heads.*choose"),
    "no-kv-heads": (dict(key=(SEQ, 1, 0, 8), value=(SEQ, 1, 0, 8)), r"0 KV heads"),
    "key-and-value-heads-differ": (dict(value=(SEQ, 1, 4, 8)), r"same heads"),
    "batch-differs": (dict(key=(SEQ, 2, 2, 8), value=(SEQ, 2, 2, 8)), r"batch"),
    "key-dim-differs": (dict(key=(SEQ, 1, 2, 4)), r"head dimension 4.*8"),
    "three-dimensions": (
        dict(query=(SEQ, 4, 8)),
        r"query has shape \(8, 4, 8\).*\(seq_local, batch, heads, head_dim\)",
    ),
    "wrong-length": (dict(query=(SEQ - 1, 1, 4, 8)), r"query has 7 tokens.*8.*layout\.shard"),
    "batch-first": (dict(query=(2, SEQ, 4, 8)), r"looks like \(batch, seq, .*pass query\.permute\(1, 0, 2, 3\)"),
    "heads-first": (dict(key=(1, 2, SEQ, 8)), r"looks like \(batch, heads, .*pass key\.permute\(2, 0, 1, 3\)"),
    "wrong-key-length": (dict(key=(SEQ + 1, 1, 2, 8)), r"key has 9 tokens"),
    "integer-dtype": (dict(dtype=torch.int64), r"dtype torch\.int64.*float64, float32, float16, bfloat16"),
    "mixed-dtypes": (dict(key=torch.zeros(SEQ, 1, 2, 8, dtype=torch.float64)), r"key has dtype torch\.float64.*share"),
    "cu_seqlens-without-zero": (
        dict(cu_seqlens=torch.tensor([3, 8], dtype=torch.int32)),
        r"cu_seqlens \[3, 8\].*start with 0.*prepend",
    ),
    "cu_seqlens-descending": (
        dict(cu_seqlens=torch.tensor([0, 5, 3, 8], dtype=torch.int32)),
        r"cu_seqlens \[0, 5, 3, 8\].*not descend, and entry 2 is 3 after 5",
    ),
    "cu_seqlens-too-short": (dict(cu_seqlens=torch.tensor([0, 5], dtype=torch.int32)), r"cu_seqlens ends with 5.*8"),
    "cu_seqlens-too-long": (dict(cu_seqlens=torch.tensor([0, 5, 9], dtype=torch.int32)), r"cu_seqlens ends with 9.*8"),
    "cu_seqlens-empty": (dict(cu_seqlens=torch.tensor([], dtype=torch.int32)), r"cu_seqlens"),
    "cu_seqlens-only-zero": (dict(cu_seqlens=torch.tensor([0], dtype=torch.int32)), r"cu_seqlens"),
    "cu_seqlens-two-dimensions": (dict(cu_seqlens=torch.tensor([[0, 8]], dtype=torch.int32)), r"cu_seqlens"),
    "cu_seqlens-not-integers": (dict(cu_seqlens=torch.tensor([0.0, 8.0])), r"cu_seqlens"),
    "mask-of-local-shape": (
        dict(attention_mask=torch.zeros(4, 8, dtype=torch.bool)),
        r"attention_mask.*\(4, 8\).*\(8, 8\).*\(1, 1, 8, 8\).*do not split it over the ranks",
    ),
    "mask-per-head": (
        dict(attention_mask=torch.zeros(1, 4, 8, 8, dtype=torch.bool)),
        r"attention_mask.*\(1, 4, 8, 8\)",
    ),
    "mask-of-another-batch": (
        dict(attention_mask=torch.zeros(3, 1, 8, 8, dtype=torch.bool)),
        r"attention_mask.*\(3, 1, 8, 8\)",
    ),
    "mask-of-floats": (dict(attention_mask=torch.zeros(8, 8)), r"attention_mask.*float32.*bool"),
    "window-of-one-number": (dict(sliding_window=(3,)), r"sliding_window"),
    "window-of-a-number": (dict(sliding_window=3), r"sliding_window"),
    "window-of-floats": (dict(sliding_window=(1.5, 0)), r"sliding_window \(1\.5, 0\)"),
    "window-below-minus-one": (dict(sliding_window=(-2, 0)), r"sliding_window \(-2, 0\)"),
    "dropout-negative": (dict(dropout_p=-0.1), r"dropout_p -0\.1.*0 and 1"),
    "dropout-above-one": (dict(dropout_p=1.5), r"dropout_p 1\.5.*0 and 1"),
    "offset-of-another-length": (dict(softmax_offset=torch.zeros(3)), r"softmax_offset.*3.*4"),
    "offset-of-two-dimensions": (dict(softmax_offset=torch.zeros(1, 4)), r"softmax_offset"),
    "layer-zero": (dict(layer_number=0), r"layer_number 0"),
    "unknown-kernel": (dict(kernel="magic"), r"--cp-kernel magic.*choose"),
    "kernel-of-another-device": (dict(kernel="npu"), r"--cp-kernel npu"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_wrong_argument_is_a_value_error_that_says_which(kind):
    options, words = ERRORS[kind]
    with pytest.raises(ValueError) as error:
        call(**options)
    assert re.search(words, str(error.value)), str(error.value)


def test_the_whole_sequence_instead_of_the_local_part_is_refused_with_the_way_out():
    config = ContextParallelConfig(context_parallel_size=2, algorithm="megatron_cp_algo")
    with pytest.raises(ValueError, match=r"query has 8 tokens on rank 1, .*4.*layout\.shard"):
        call(**second_rank(config))


@pytest.mark.parametrize("shape", [(4, 4), (1, 1, 4, 4), (1, 1, 4, 8)])
def test_a_mask_that_was_split_over_the_ranks_is_refused_with_both_shapes(shape):
    config = ContextParallelConfig(context_parallel_size=2, algorithm="megatron_cp_algo")
    with pytest.raises(ValueError) as error:
        call(
            query=(4, 1, 4, 8),
            key=(4, 1, 2, 8),
            value=(4, 1, 2, 8),
            attention_mask=torch.zeros(shape, dtype=torch.bool),
            **second_rank(config),
        )
    says = [str(shape), "(8, 8) or (1, 1, 8, 8)", "do not split it over the ranks"]
    assert [part for part in says if part not in str(error.value)] == []


def test_a_layout_of_another_configuration_is_refused():
    ring = ContextParallelConfig(context_parallel_size=2, algorithm="megatron_cp_algo")
    ulysses = ContextParallelConfig(context_parallel_size=2)
    wrong = {**second_rank(ring), "layout": SequenceLayout.build(ulysses, SEQ)}
    with pytest.raises(ValueError, match="same config"):
        call(query=(4, 1, 4, 8), key=(4, 1, 2, 8), value=(4, 1, 2, 8), **wrong)


def test_groups_of_another_configuration_are_refused():
    ring = ContextParallelConfig(context_parallel_size=2, algorithm="megatron_cp_algo")
    ulysses = ContextParallelConfig(context_parallel_size=2)
    wrong = {**second_rank(ring), "groups": second_rank(ulysses)["groups"]}
    with pytest.raises(ValueError, match="same config"):
        call(query=(4, 1, 4, 8), key=(4, 1, 2, 8), value=(4, 1, 2, 8), **wrong)


def test_gathering_kv_with_more_than_one_kv_head_is_refused():
    config = ContextParallelConfig(context_parallel_size=2, allgather_kv=True)
    with pytest.raises(ValueError, match=r"--use-ulysses-allgather-kv.*one KV head.*2"):
        call(query=(4, 1, 4, 8), key=(4, 1, 2, 8), value=(4, 1, 2, 8), **second_rank(config))


@pytest.mark.parametrize("empty", [(0, 0, 8), (0, 8, 8), (0, 3, 3, 3, 8, 8)])
def test_empty_documents_are_legal_anywhere(empty):
    assert call(cu_seqlens=torch.tensor(empty, dtype=torch.int32)).shape == (SEQ, 1, 4, 8)


def test_general_is_the_mask_that_comes_along_else_causal():
    torch.manual_seed(0)
    tensors = [torch.randn(SEQ, 1, 4, 8) for _ in range(3)]
    shows_what_follows = torch.ones(SEQ, SEQ, dtype=torch.bool).tril(-1)

    def attend(mask_type, attention_mask):
        config = ContextParallelConfig(attention_mask_type=mask_type)
        return context_parallel_attention(
            *tensors,
            config=config,
            groups=ContextParallelGroups.build(config),
            layout=SequenceLayout.build(config, SEQ),
            attention_mask=attention_mask,
        )

    assert torch.equal(attend("general", None), attend("causal", None))
    assert torch.equal(attend("general", shows_what_follows), attend("full", shows_what_follows))
    assert not torch.equal(attend("general", shows_what_follows), attend("causal", shows_what_follows))


def test_the_output_has_no_gradient_when_nothing_asks_for_one():
    assert not call().requires_grad


def test_only_the_inputs_that_ask_get_a_gradient():
    query, key, value = (torch.randn(SEQ, 1, 2, 4, dtype=torch.float64) for _ in range(3))
    key.requires_grad_()
    call(query, key, value).sum().backward()
    assert key.grad is not None and query.grad is None and value.grad is None


def test_the_case_helper_passes_every_argument_by_name():
    """A guard for the tests themselves: a feature of Case that is not passed on would be tested as absent."""
    case = replace(
        Case({}),
        window=(1, 0),
        sinks=True,
        softmax_scale=0.5,
        dropout_p=0.1,
        layer_number=3,
        kernel="cpu",
        cu_seqlens=(0, 24),
    )
    passed = arguments(case, None, None, None, torch.ones(4), torch.ones(1))
    assert passed["sliding_window"] == (1, 0) and passed["softmax_scale"] == 0.5 and passed["dropout_p"] == 0.1
    assert passed["layer_number"] == 3 and passed["kernel"] == "cpu" and passed["cu_seqlens"].tolist() == [0, 24]
    assert passed["softmax_offset"] is not None and passed["attention_mask"] is not None
