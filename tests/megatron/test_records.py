"""The record of a micro-batch: how it is found again, what is read of tokens, masks and packed boundaries, and when a
batch that somebody else split contradicts itself. No process group is needed.
"""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from adaptors import adaptor_of

from mindspeed_cp import ContextParallelConfig, SequenceLayout
from mindspeed_cp.megatron import bridge, documents, foreign, packed
from mindspeed_cp.megatron import records as batch_records
from mindspeed_cp.megatron.batches import refuse_inference
from mindspeed_cp.megatron.bridge import CoreAttention
from mindspeed_cp.megatron.records import BatchRecords, MicroBatch
from mindspeed_cp.patches import experts, recompute
from mindspeed_cp.patches.machine.compiler import outside_compiler

pytestmark = pytest.mark.cpu_only
RING = ContextParallelConfig(context_parallel_size=2, algorithm="megatron_cp_algo")


def record(seq_len, ends=None):
    return MicroBatch(SequenceLayout.build(RING, seq_len), ends)


def packed_batch(adaptor, *args, **kwargs):
    return packed.packed_batch(adaptor, adaptor.main, *args, **kwargs)


def params(true, padded=None, **more):
    as_tensor = lambda ends: None if ends is None else torch.tensor(ends, dtype=torch.int32)  # noqa: E731
    return SimpleNamespace(
        qkv_format="thd", cu_seqlens_q=as_tensor(true), cu_seqlens_q_padded=as_tensor(padded), **more
    )


def test_a_record_is_found_by_any_tensor_of_its_batch_and_by_views_of_them():
    records, tokens, labels = BatchRecords(), torch.zeros(2, 4), torch.zeros(2, 4)
    records.remember([tokens, None, labels], record(8))
    assert records.find([None, labels]) == records.find([tokens[:1]]) == record(8)
    assert records.find([tokens.view(-1)[2:].view(2, 3)[:1]]) == records.find([tokens.detach()]) == record(8)
    assert records.find([torch.zeros(2, 4), "tokens"]) is None


def test_a_copy_of_tokens_leads_to_the_record_of_the_only_batch_with_these_values_on_all_ranks():
    records, tokens, places = BatchRecords(), torch.tensor([[3, 1, 4, 1]]), torch.arange(4)[None]
    scope = BatchRecords()  # any object that can be referred to weakly
    of_scope = lambda *args: replace(record(*args), scope=scope)  # noqa: E731
    records.remember([tokens, places], of_scope(8), [tokens])

    def found(copy, theirs=(1, 2, 3)):
        with mock.patch.object(batch_records, "_on_all_ranks", lambda mine, scope: sorted({*mine} & {*theirs})):
            return records.find_copied([copy], scope)

    for copy in (tokens.clone(), tokens.to(torch.int32), tokens.tolist() and torch.tensor([[3, 1, 4, 1]])):
        assert records.find([copy]) is None and found(copy) == record(8)
    assert found(places.clone()) is None, "positions are those of many batches"
    assert found(tokens.clone(), theirs=()) is None, "another rank holds other values"
    again = tokens.clone()
    records.remember([again], of_scope(8, ((0, 3, 8),)), [again])
    assert found(tokens.clone(), theirs=(2,)) == record(8, ((0, 3, 8),)) and records.find([tokens]) == record(8)
    with pytest.raises(ValueError, match="pass the tensors of one batch"):
        found(tokens.clone())


def test_a_record_goes_with_the_tensors_of_its_batch():
    records, tokens = BatchRecords(), torch.zeros(2, 4)
    records.remember([tokens], record(8))
    del tokens
    gc.collect()
    records.remember([], record(8))
    assert len(records._parts) == 0


def test_tensors_of_batches_that_were_split_differently_are_refused():
    records, tokens, labels = BatchRecords(), torch.zeros(2, 4), torch.zeros(2, 5)
    records.remember([tokens], record(8))
    records.remember([labels], record(10))
    with pytest.raises(ValueError, match="batches of 8 and 10 tokens.*pass the tensors of one batch"):
        records.find([tokens, labels])


def test_documents_end_behind_their_last_token_in_every_row():
    tokens = torch.tensor([[7, 0, 7, 7, 0], [0, 7, 7, 7, 7]])
    assert documents.documents_of_tokens(tokens, 0) == ((0, 2, 5), (0, 1, 5))
    assert documents.documents_of_tokens(tokens[:1].repeat(3, 1), 0) == ((0, 2, 5),)


def test_documents_begin_where_position_ids_begin_again():
    assert documents.documents_of_position_ids(torch.tensor([[0, 1, 0, 1, 2]])) == ((0, 2, 5),)
    assert documents.documents_of_position_ids(torch.tensor([[3, 4, 0, 1, 2]])) == ((0, 2, 5),)


def test_rows_of_boundaries_may_be_tensors_numbers_or_several():
    assert (
        documents.documents_of_rows(torch.tensor([0, 2, 5])) == documents.documents_of_rows([0, 2, 5]) == ((0, 2, 5),)
    )
    assert documents.documents_of_rows([torch.tensor([0, 2, 5]), (0, 5)]) == ((0, 2, 5), (0, 5))


def test_packed_boundaries_are_read_from_the_device_once():
    state, both = adaptor_of(), params((0, 6, 16), (0, 8, 24))
    real, reads = torch.Tensor.tolist, []
    with mock.patch.object(torch.Tensor, "tolist", lambda tensor: reads.append(1) or real(tensor)):
        for _ in range(4):  # layers, and RoPE for queries and keys
            first = packed_batch(state, both, 12)
            state.boundaries.boundaries(both.cu_seqlens_q_padded)
    assert len(reads) == 2 and first.documents == ((0, 6, 8, 18, 24),)
    both.cu_seqlens_q_padded[1] = 16  # in place: a buffer that is reused
    assert state.boundaries.padded(both) == (0, 16, 24)


def test_examining_masks_keeps_none_alive_and_reads_each_once(monkeypatch):
    cache, real, examined = documents.MaskCache(), documents.examine_mask, []
    monkeypatch.setattr(documents, "examine_mask", lambda mask: examined.append(1) or real(mask))
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
    for alias in (mask, mask, mask.detach()):  # layers, and recomputation
        assert cache.facts(alias, alias.bool, 1).is_causal
    assert len(examined) == 1
    gone = weakref.ref(mask)
    del mask, alias
    gc.collect()
    assert gone() is None
    other = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    assert cache.facts(other, other.bool, 1).documents is None and len(cache._entries) == 1


def test_a_mask_that_was_filled_anew_without_a_new_version_is_examined_again():
    cache, mask = documents.MaskCache(), torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
    assert cache.facts(mask, mask.bool, 1).is_causal
    mask.data.zero_()
    assert not cache.facts(mask, mask.bool, 2).is_causal and not cache.facts(mask, mask.bool, None).is_causal
    mask.numpy()[:] = torch.ones(8, 8).triu(1).bool().numpy()
    assert cache.facts(mask, mask.bool, 3).is_causal and cache.facts(mask, mask.bool, None).is_causal


def test_a_mask_is_examined_once_in_a_forward_pass(monkeypatch):
    real, examined, adaptor = documents.examine_mask, [], adaptor_of()
    monkeypatch.setattr(documents, "examine_mask", lambda mask: examined.append(1) or real(mask))
    monkeypatch.setattr(bridge, "_attend", lambda call, *rest, **named: call.tensors[0])
    mask, query = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1), torch.zeros(4, 1, 2, 8)
    for _ in range(2):  # passes
        adaptor.forward_pass_begins()
        with adaptor.running(MicroBatch(record(8).layout, None, adaptor.main)):
            for _ in range(2):  # layers
                bridge.attention(adaptor, adaptor.main, CoreAttention(1, True, 1.0), query, query, query, mask)
    assert len(examined) == 2


@pytest.mark.parametrize(
    ("given", "local_len", "position_ids", "says"),
    [
        (
            params((0, 6, 12)),
            6,
            None,
            ["document 0", "6 tokens", "2 x --context-parallel-size = 4", "cu_seqlens_q_padded"],
        ),
        (params((0, 8, 16)), 16, None, ["holds 16 packed tokens", "end at 16", "give it 8", "document_zigzag"]),
        (params((0, 8), local_cp_size=1), 4, None, ["local_cp_size 1", "--hybrid-context-parallel"]),
    ],
    ids=["not divisible", "not split", "dynamic size"],
)
def test_a_packed_batch_that_contradicts_itself_is_refused_with_a_way_out(given, local_len, position_ids, says):
    ids = None if position_ids is None else torch.tensor([position_ids])
    with pytest.raises(ValueError) as error:
        packed_batch(adaptor_of(), given, local_len, ids)
    assert [part for part in says if part not in str(error.value)] == []


def test_a_size_of_its_own_is_refused_without_context_parallelism_too():
    with pytest.raises(ValueError, match="local_cp_size 2.*leave out --hybrid-context-parallel"):
        packed_batch(adaptor_of(ContextParallelConfig()), params((0, 8), local_cp_size=2), 4)


def packed_layout(ids, padded, ends, preferred="document_zigzag"):
    """The layout that the position ids of two ranks describe."""
    everyone = [torch.tensor(mine) for mine in ids]
    return foreign._layout_of_packed(adaptor_of().main, everyone, padded, ends, preferred)


def test_position_ids_count_within_documents_or_over_all_and_padding_may_hold_anything():
    padded, ends = (0, 8, 16), (0, 5, 8, 13, 16)
    within, other = [0, 1, 6, 7, 0, 1, 6, 7], [2, 3, 4, 5, 2, 3, 4, 5]
    over_all = [0, 1, 6, 7, 8, 9, 14, 15], [2, 3, 4, 5, 10, 11, 12, 13]
    for ids in ((within, other), over_all, ([0, 1, 99, 99, *within[4:]], other)):
        layout = packed_layout(ids, padded, ends)
        assert layout.kind == "document_zigzag" and layout.positions(0).tolist() == over_all[0]


def test_position_ids_say_that_packed_documents_were_cut_in_another_way():
    layout = packed_layout(([0, 1, 2, 3], [4, 5, 6, 7]), (0, 8), (0, 8))
    assert layout.positions(0).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="position id 2 of packed token 2 of rank 0 contradicts .*place 6"):
        packed_layout(([0, 1, 2, 3], [4, 5, 7, 6]), (0, 8), (0, 8))


def rows_layout(*ids, declared="", config=None):
    everyone = [torch.tensor([mine] if isinstance(mine[0], int) else mine) for mine in ids]
    return foreign._layout_of_rows(config or adaptor_of().main.config, everyone, declared)


def test_position_ids_of_whole_rows_are_the_layout():
    for first, second in (([0, 1, 6, 7], [2, 3, 4, 5]), ([0, 1, 2, 3], [4, 5, 6, 7]), ([0, 1, 2, 3, 4], [5, 6, 7])):
        layout = rows_layout(first, second)
        assert [layout.positions(rank).tolist() for rank in (0, 1)] == [first, second]
        rows = rows_layout([first, first], [second, second])
        assert rows == layout


@pytest.mark.parametrize("declared", ["", "zigzag"])
def test_documents_and_padding_in_position_ids_fit_one_way_of_cutting(declared):
    layout = rows_layout([0, 1, 1, 2], [2, 3, 4, 0], declared=declared)  # documents of 5 and 3 tokens, zigzag
    assert layout.positions(0).tolist() == [0, 1, 6, 7]
    layout = rows_layout([0, 1, 0, 0], [2, 3, 4, 5], declared=declared)  # padding at the end
    assert layout.positions(0).tolist() == [0, 1, 6, 7]


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (([0, 1, 2, 3], [0, 1, 2, 3]), "the same 4 position ids, from 0 to 3: nobody split this batch"),
        (([0, 1, 2, 3], [3, 4, 5, 6]), "position 3 is held by context-parallel ranks 0 and 1"),
        (([0, 1, 2, 3], [5, 6, 7, 8]), "position 4 of 8 is held by no context-parallel rank"),
        (([[0, 1], [0, 3]], [[2, 3], [1, 2]]), "rows of this batch were split .* in different ways"),
    ],
    ids=["nobody", "overlap", "gap", "rows"],
)
def test_position_ids_that_are_no_partition_are_refused(ids, says):
    with pytest.raises(ValueError, match=f"{says}.*shard_batch"):
        rows_layout(*ids)


def test_a_layout_that_was_named_is_taken_for_packed_batches_that_come_split():
    config = ContextParallelConfig(context_parallel_size=2, algorithm="megatron_cp_algo", batch_layout="contiguous")
    found = packed_batch(adaptor_of(config), params((0, 5, 13)), 7)
    assert found.layout.positions(0).tolist() == list(range(7)) and found.documents == ((0, 5, 13),)


def test_boundaries_of_another_batch_than_the_one_split_are_refused():
    with pytest.raises(ValueError, match="end at 16, and a sequence of 8 tokens was split"):
        packed_batch(adaptor_of(), params((0, 8, 16)), 4, record=record(8))


def test_a_rank_without_tokens_is_refused_with_the_length_that_works():
    with pytest.raises(ValueError, match="3 tokens leaves context-parallel rank 3 of 4 without any.*at least 4 tokens"):
        adaptor_of(ContextParallelConfig(context_parallel_size=4, algorithm="megatron_cp_algo")).layout(3)


def test_a_layout_by_documents_needs_the_same_documents_in_every_row():
    config = ContextParallelConfig(
        context_parallel_size=2, algorithm="megatron_cp_algo", batch_layout="document_zigzag"
    )
    assert adaptor_of(config).layout(8, ((0, 4, 8),)).kind == "document_zigzag"
    with pytest.raises(ValueError, match="--micro-batch-size 1, or --cp-batch-layout auto"):
        adaptor_of(config).layout(8, ((0, 4, 8), (0, 8)))


def test_losses_of_experts_are_numbers_when_a_micro_batch_is_all_padding(monkeypatch):
    monkeypatch.setattr(experts.dist, "all_reduce", lambda *args, **kwargs: None)
    monkeypatch.setattr(experts, "_scales_with_cp", lambda: True)
    config, scope = SimpleNamespace(calculate_per_token_loss=True), SimpleNamespace(size=2, group=None)
    share = experts._share(scope, config, 1.0, torch.ones(4, dtype=torch.bool))
    assert torch.isfinite(share.share) and torch.isfinite(share.weight)

    def counts(routing_map, reduce_group, topk, with_padding_mask):
        return torch.zeros(4), routing_map.shape[0], routing_map.sum() / topk

    with experts.ROUTING.set(share):
        _, local, total = experts.get_tokens_per_expert_and_token_count(None, counts, torch.zeros(4, 4), None, 2, True)
        balancing = lambda total: torch.zeros(()) * (1 / (total * total))  # noqa: E731
        loss = experts.switch_load_balancing_loss_func(None, balancing, total)
    assert local == 0 and torch.isfinite(loss)


def test_inference_contexts_are_refused_by_name():
    context = type("StaticInferenceContext", (), {"__module__": "megatron.core.inference.contexts.static_context"})()
    refuse_inference((None, torch.zeros(1)))
    with pytest.raises(ValueError, match="StaticInferenceContext.*--context-parallel-size 1 to generate"):
        refuse_inference((None, context))


def test_torch_compile_breaks_its_graph_at_attention_and_traces_nothing_of_it():
    from torch._dynamo.testing import CompileCounter

    calls, counter = [], CompileCounter()

    def attention(tensor, batch):
        calls.append(torch.compiler.is_compiling())
        return tensor * batch.rows

    entry = outside_compiler(attention)
    compiled = torch.compile(lambda tensor, batch: entry(tensor + 1, batch) * 2, backend=counter)
    for rows in (1, 2, 3):
        assert torch.equal(compiled(torch.ones(2), SimpleNamespace(rows=rows)), torch.full((2,), 4.0 * rows))
    assert calls == [False] * 3 and counter.frame_count == 2  # before and behind, whatever the batch


def test_what_transformer_engine_recomputes_sees_the_record_of_its_forward_pass():
    adaptor, kept = adaptor_of(), []
    with adaptor.running(replace(record(8), scope=adaptor.main)):
        expected = adaptor.active
        recompute.te_checkpoint(adaptor, lambda function, *args: kept.append(function), lambda: adaptor.active, False)
    assert adaptor.active is None and kept[0]() is expected


def test_position_ids_come_before_end_of_document_tokens_in_batches_that_others_split():
    adaptor, tokens, whole = adaptor_of(), torch.tensor([[7, 7, 7, 7]]), torch.tensor([[7, 9, 7, 7, 7, 7, 7, 7]])
    adaptor.settings.end_of_document = lambda: 9
    found = record(8).layout, ((0, 3, 8),)
    with mock.patch.multiple(foreign, gather_sequence=lambda *args, **named: whole):
        with mock.patch.object(foreign.Foreign, "_of_ids", lambda *args: found):
            for first, documents_found in ((False, ((0, 2, 8),)), (True, ((0, 3, 8),))):
                adaptor.settings.documents_from_position_ids = first
                made = adaptor.foreign.record(adaptor, adaptor.main, tokens, tokens, "")
                assert made.documents == documents_found
