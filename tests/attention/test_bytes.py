"""Invariant 3: the bytes and messages that every rank sends, as equalities."""

from math import lcm

import pytest
import torch
from cases import Case
from distributed import run_ranks
from measured import drop_zero, traffic
from pairs import drawn
from setups import degree_of, shapes
from slice_cases import NAMED

from mindspeed_cp import ContextParallelConfig, SequenceLayout
from mindspeed_cp.comm import count_bytes
from mindspeed_cp.sequence.runs import split_sizes

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
RINGS = [
    pytest.param(shape, id=f"cp{cp}-window{shape.get('window_size', 1)}")
    for cp in range(2, 9)
    for shape in shapes("megatron_cp_algo", cp)
]


def row_bytes(case):
    """Bytes of one token's keys and values."""
    return case.batch * case.kv_heads * (case.dk + case.dv) * ITEMSIZE[case.dtype]


def shard_bytes(case):
    """K of the design: the bytes of one rank's keys and values, for even lengths."""
    assert case.seq_len % (2 * case.cp) == 0
    return case.seq_len // case.cp * row_bytes(case)


def needed_by(case, reader, source):
    """How many rows of source's shard some query of reader sees, by the dense mask."""
    layout = case.layout()
    return int(case.allowed(None)[0][layout.positions(reader)][:, layout.positions(source)].any(0).sum())


@pytest.mark.parametrize("mask_type", ["causal", "full"])
@pytest.mark.parametrize("shape", RINGS)
def test_a_ring_sends_every_shard_once_forward_and_keys_values_and_gradients_once_backward(shape, mask_type):
    case = Case(
        {**shape, "attention_mask_type": mask_type},
        seq_len=4 * shape["context_parallel_size"],
        batch=2,
        heads=4,
        kv_heads=2,
        dk=6,
        dv=4,
        dtype="bfloat16",
    )
    once = (case.cp - 1) * shard_bytes(case)
    for forward, messages, backward, _ in traffic(case):
        assert forward == {"kv": once}
        assert messages == {"kv": case.cp - 1}, "keys and values travel together"
        assert backward == {"kv": once, "dkv": once}


@pytest.mark.parametrize("shape", RINGS)
def test_a_full_cache_sends_no_keys_or_values_in_backward_and_a_half_cache_the_values_only(shape):
    case = Case(
        {**shape, "kv_cache_policy": "full"},
        seq_len=4 * shape["context_parallel_size"],
        dk=6,
        dv=4,
        kv_heads=2,
        dtype="float32",
    )
    once = (case.cp - 1) * shard_bytes(case)
    values = once * case.dv // (case.dk + case.dv)
    for forward, _, backward, _ in traffic(case):
        assert (forward, backward) == ({"kv": once}, {"dkv": once})
    for forward, _, backward, _ in traffic(case.with_config(kv_cache_policy="half")):
        assert (forward, backward) == ({"kv": once}, {"kv": values, "dkv": once})


def test_the_cache_interval_decides_by_the_layers_number_which_backward_fetches_again():
    case = Case(
        {
            "context_parallel_size": 2,
            "algorithm": "megatron_cp_algo",
            "kv_cache_policy": "full",
            "kv_cache_interval": 2,
        },
        seq_len=8,
    )
    for layer in range(1, 8):
        for _, _, backward, _ in traffic(Case(**{**case.__dict__, "layer_number": layer})):
            assert ("kv" not in backward) == (layer % 3 == 1), layer


@pytest.mark.parametrize("cp", range(2, 9))
def test_an_all_gather_sends_the_own_shard_to_every_other_rank(cp):
    case = Case({"context_parallel_size": cp, "algorithm": "kvallgather_cp_algo"}, seq_len=4 * cp, kv_heads=2)
    once = (cp - 1) * shard_bytes(case)
    for forward, messages, backward, _ in traffic(case):
        assert (forward, messages, backward) == ({"kv": once}, {"kv": 1}, {"kv": once, "dkv": once})


@pytest.mark.parametrize("cp, exchange", [(cp, "mesh" if cp % 2 else "direct") for cp in range(2, 9)])
def test_direct_and_mesh_exchange_of_even_zigzag_causal_send_three_quarters_of_the_ring(cp, exchange):
    case = Case(
        {"context_parallel_size": cp, "algorithm": "megatron_cp_algo", "kv_exchange": exchange},
        seq_len=8 * cp,
        kv_heads=2,
    )
    counts = traffic(case)
    ring = cp * (cp - 1) * shard_bytes(case)
    assert 4 * sum(forward["kv"] for forward, *_ in counts) == 3 * ring
    assert 4 * sum(backward["kv"] for _, _, backward, _ in counts) == 3 * ring
    assert 4 * sum(backward["dkv"] for _, _, backward, _ in counts) == 3 * ring


DIRECT_CASES = {
    "causal": {"seq_len": 32},
    "causal-uneven": {"seq_len": 29},
    "shorter-than-the-group": {"seq_len": 3},
    "full": {"seq_len": 30, "mask_type": "full"},
    "packed": {"seq_len": 40, "cu_seqlens": (0, 3, 3, 17, 18, 40)},
    "packed-full": {"seq_len": 40, "cu_seqlens": (0, 9, 40), "mask_type": "full"},
    "packed-zigzag": {"seq_len": 96, "cu_seqlens": (0, 9, 60, 63, 96), "batch_layout": "zigzag"},
    "packed-balanced": {"seq_len": 96, "cu_seqlens": (0, 9, 60, 63, 96), "batch_layout": "balanced"},
    "packed-balanced-full": {"seq_len": 96, "cu_seqlens": (0, 70, 96), "batch_layout": "balanced", "mask_type": "full"},
    "window": {"seq_len": 40, "window": (5, 0)},
    "window-full": {"seq_len": 37, "window": (2, 3), "mask_type": "full"},
    "window-packed": {"seq_len": 40, "cu_seqlens": (0, 11, 30, 40), "window": (4, 0)},
    **{name: {"seq_len": 40, "slices": slices} for name, slices in NAMED.items()},
    "tree-window": {"seq_len": 40, "slices": NAMED["tree"], "window": (11, 0)},
}


@pytest.mark.parametrize(
    "kind, cp, exchange, policy", drawn(list(DIRECT_CASES), [2, 3, 5, 8], ["direct", "mesh"], [None, "full"])
)
def test_direct_and_mesh_exchange_send_exactly_the_rows_that_the_mask_needs(kind, cp, exchange, policy):
    options = dict(DIRECT_CASES[kind])
    config = {
        "context_parallel_size": cp,
        "algorithm": "megatron_cp_algo",
        "kv_exchange": exchange,
        "kv_cache_policy": policy,
        "attention_mask_type": options.pop("mask_type", "causal"),
        "batch_layout": options.pop("batch_layout", "auto"),
    }
    case = Case(config, kv_heads=2, dk=4, dv=6, **options)
    for rank, (forward, _, backward, _) in enumerate(traffic(case)):
        others = [other for other in range(cp) if other != rank]
        lent = sum(needed_by(case, reader, rank) for reader in others) * row_bytes(case)
        borrowed = sum(needed_by(case, rank, source) for source in others) * row_bytes(case)
        assert forward == drop_zero({"kv": lent})
        assert backward == drop_zero({"kv": 0 if policy == "full" else lent, "dkv": borrowed})


@pytest.mark.parametrize("exchange", ["direct", "mesh"])
def test_direct_and_mesh_exchange_send_nothing_when_every_document_lies_on_one_rank(exchange):
    case = Case(
        {
            "context_parallel_size": 4,
            "algorithm": "megatron_cp_algo",
            "kv_exchange": exchange,
            "attention_mask_type": "full",
        },
        seq_len=32,
        cu_seqlens=(0, 8, 12, 16, 24, 32),
    )
    assert traffic(case) == [({}, {}, {}, {})] * 4


def test_an_uneven_ring_forwards_every_shard_but_the_next_ranks_own():
    for cp, seq_len in ((3, 13), (4, 30), (5, 7)):
        case = Case({"context_parallel_size": cp, "algorithm": "megatron_cp_algo"}, seq_len=seq_len, kv_heads=2)
        layout = SequenceLayout.build(ContextParallelConfig(**case.config), seq_len)
        for rank, (forward, *_) in enumerate(traffic(case)):
            assert forward == {"kv": (seq_len - layout.length((rank + 1) % cp)) * row_bytes(case)}, (cp, rank)


def ulysses_sizes(case, degree, local):
    """Bytes of one direction through the Ulysses group for q, keys and values, and out, with even shares."""
    widths = case.heads * case.dk, lcm(case.kv_heads, degree) * (case.dk + case.dv), case.heads * case.dv
    return tuple(local * case.batch * ITEMSIZE[case.dtype] * width * (degree - 1) // degree for width in widths)


@pytest.mark.parametrize("mask_type", ["causal", "full"])
@pytest.mark.parametrize("cp", range(2, 9))
@pytest.mark.parametrize("kv", ["mha", "gqa", "mqa", "half-the-degree"])
def test_ulysses_sends_one_share_of_everything_in_one_message_before_and_one_after(cp, kv, mask_type):
    heads = 2 * cp
    kv_heads = {"mha": heads, "gqa": cp, "mqa": 1, "half-the-degree": cp // 2 if cp % 2 == 0 else 2}[kv]
    case = Case(
        {"context_parallel_size": cp, "attention_mask_type": mask_type},
        seq_len=2 * cp,
        batch=2,
        heads=heads,
        kv_heads=kv_heads,
        dk=6,
        dv=4,
        dtype="float32",
    )
    q, keys_values, out = ulysses_sizes(case, cp, 2)
    for forward, messages, backward, backward_messages in traffic(case):
        assert forward == {"q": q, "kv": keys_values, "out": out}
        assert sum(messages.values()) == 2, messages
        assert backward == {"dout": out, "dq": q, "dkv": keys_values}
        assert sum(backward_messages.values()) == 2, backward_messages


CHUNKED = [(2, 8, 8), (2, 8, 4), (2, 8, 1), (4, 16, 2), (3, 7, 7), (4, 6, 2)]


@pytest.mark.parametrize("policy", [None, "half", "full"])
@pytest.mark.parametrize("cp, heads, kv_heads", CHUNKED)
def test_chunks_of_heads_send_the_bytes_of_all_at_once_in_as_many_messages_as_chunks(cp, heads, kv_heads, policy):
    case = Case(
        {"context_parallel_size": cp, "kv_cache_policy": policy}, seq_len=4 * cp, heads=heads, kv_heads=kv_heads
    )
    at_once, most = traffic(case), -(-heads // cp)
    for chunks in {2, 3, 4, most} if most > 1 else ():
        if chunks > most:
            continue
        for once, found in zip(at_once, traffic(case.with_config(ulysses_chunks=chunks))):
            assert found[::2] == once[::2], chunks
            assert sum(found[1].values()) >= 2 * chunks


@pytest.mark.parametrize("chunks, times", [(1, 1), (2, 1), (4, 2)])
def test_a_ring_around_chunks_sends_a_kv_head_once_for_every_chunk_that_needs_it(chunks, times):
    """Two KV heads of a rank: two chunks share them out; of four, two need each."""
    config = {"context_parallel_size": 4, "algorithm": "hybrid_cp_algo", "ulysses_degree": 2}
    case = Case(config, seq_len=16, heads=8, kv_heads=4)
    _, keys_values, _ = ulysses_sizes(case, 2, 4)
    ring = 4 * 2 * 2 * (case.dk + case.dv) * ITEMSIZE[case.dtype]
    for forward, _, backward, _ in traffic(case.with_config(ulysses_chunks=chunks)):
        assert forward["kv"] == keys_values + times * ring
        assert (backward["kv"], backward["dkv"]) == (times * ring, keys_values + times * ring)


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_ulysses_cache_policy_communicates_what_it_did_not_keep_again(cp, kv_heads):
    case = Case({"context_parallel_size": cp, "kv_cache_policy": "full"}, seq_len=4 * cp, kv_heads=kv_heads, dk=4, dv=4)
    q, keys_values, out = ulysses_sizes(case, cp, 4)
    for policy, again in ((None, 0), ("half", keys_values // 2), ("full", keys_values)):
        for forward, _, backward, _ in traffic(case.with_config(kv_cache_policy=policy)):
            assert forward == {"q": q, "kv": keys_values, "out": out}
            assert backward == drop_zero({"dout": out, "kv": again, "dq": q, "dkv": keys_values}), policy


@pytest.mark.parametrize("cp", [2, 3, 4])
def test_gathering_the_one_kv_head_sends_no_more_than_replicating_it(cp):
    case = Case({"context_parallel_size": cp, "allgather_kv": True}, seq_len=4 * cp, heads=2 * cp, kv_heads=1)
    q, keys_values, out = ulysses_sizes(case, cp, 4)
    for forward, *_ in traffic(case):
        assert forward == {"q": q, "kv": keys_values, "out": out}


HYBRIDS = [
    pytest.param(shape, id=f"cp{cp}-u{shape['ulysses_degree']}-window{shape.get('window_size', 1)}")
    for cp in (4, 6, 8)
    for shape in shapes("hybrid_cp_algo", cp)
]


@pytest.mark.parametrize("shape", HYBRIDS)
def test_hybrid_sends_what_its_two_parts_send(shape):
    cp, degree = shape["context_parallel_size"], degree_of(shape)
    case = Case(shape, seq_len=4 * cp, heads=2 * degree, kv_heads=1)
    q, keys_values, out = ulysses_sizes(case, degree, 4)
    replicated = lcm(case.kv_heads, degree) // degree
    ring = (cp // degree - 1) * 4 * degree * case.batch * replicated * (case.dk + case.dv) * ITEMSIZE[case.dtype]
    for forward, _, backward, _ in traffic(case):
        assert forward == {"q": q, "kv": keys_values + ring, "out": out}
        assert backward == {"dout": out, "kv": ring, "dq": q, "dkv": keys_values + ring}


@pytest.mark.parametrize("cp, heads, seq_len", [(2, 3, 7), (3, 5, 11), (4, 2, 9)])
def test_uneven_ulysses_sends_each_rank_its_heads_of_the_own_tokens(cp, heads, seq_len):
    case = Case({"context_parallel_size": cp}, seq_len=seq_len, heads=heads, kv_heads=heads)
    shares, lengths = split_sizes(heads, cp), split_sizes(seq_len, cp)
    unit = case.dk * ITEMSIZE[case.dtype]
    for rank, (forward, _, backward, _) in enumerate(traffic(case)):
        scatter = lengths[rank] * (heads - shares[rank]) * unit
        gather = (seq_len - lengths[rank]) * shares[rank] * unit
        assert forward == drop_zero({"q": scatter, "kv": 2 * scatter, "out": gather})
        assert backward == drop_zero({"dout": scatter, "dq": gather, "dkv": 2 * gather})


def test_one_rank_sends_nothing():
    case = Case({"context_parallel_size": 1}, seq_len=8)
    assert traffic(case) == [({}, {}, {}, {})]


def nested_counts(rank):
    peer, ones = 1 - rank, torch.ones(4)
    from mindspeed_cp.comm.link import link_of

    link = link_of(None)

    def send(purpose):
        link.exchange([(peer, [ones])], [(peer, [torch.empty(4)])], purpose).wait()

    with count_bytes() as outer:
        with count_bytes() as inner:
            send("kv")
        send("q")
    send("out")
    return dict(inner.bytes), dict(outer.bytes), outer.total_bytes, outer.total_messages


def test_counting_blocks_nest_and_stop_at_their_end():
    assert run_ranks(2, nested_counts) == [({"kv": 16}, {"kv": 16, "q": 16}, 32, 2)] * 2
