"""What travels and what the kernel gets are two things: latents of multi-latent attention, in float64 against the
textbook; bytes as equalities; memory; the choice.
"""

from dataclasses import replace

import pairs
import pytest
import torch
from cases import TOLERANCE, largest_errors
from distributed import run_ranks
from expansion_runs import LatentCase, attend_many, expected, of_heads, peak_bytes, whole
from measured import drop_zero
from setups import SIZES, algorithms_at, degree_of, drawn

from mindspeed_cp import ContextParallelConfig, LatentExpansion
from mindspeed_cp.attention.exchange_choice import sends_latents

RING, ULYSSES, HYBRID, GATHER = "megatron_cp_algo", "ulysses_cp_algo", "hybrid_cp_algo", "kvallgather_cp_algo"
DOCUMENTS = (0, 3, 4, 15, 15, 25)


def latents(cp, algorithm=RING, **options):
    return {"context_parallel_size": cp, "algorithm": algorithm, "mla_exchange": "latent", **options}


def check(cases):
    """Results of every rank for each case, after they were compared with the textbook."""
    results = run_ranks(cases[0].cp, attend_many, cases)
    for index, case in enumerate(cases):
        got = whole(case, [of_rank[index][0] for of_rank in results])
        errors = largest_errors(got, expected(case))
        assert max(errors.values()) <= TOLERANCE[case.dtype], f"{case}: {errors}"
    return [[of_rank[index] for of_rank in results] for index in range(len(cases))]


def uneven_partition(cp, seq_len):
    """Runs of some three positions, dealt out in an order that is no rank's."""
    places = torch.arange(0, seq_len, 3).tolist()
    return tuple(tuple((start, min(start + 3, seq_len)) for start in reversed(places[rank::cp])) for rank in range(cp))


SETTINGS = {
    "ring": LatentCase(latents(4), batch=2),
    "ring, keys as wide as values": LatentCase(latents(4, send_recv_overlap=True), dv=6),
    "direct, two in flight": LatentCase(latents(4, kv_exchange="direct", in_flight=2), seq_len=25),
    "mesh, window": LatentCase(latents(4, kv_exchange="mesh", send_recv_overlap=True), seq_len=25, window=(5, 0)),
    "double ring": LatentCase(latents(4, window_size=2), batch=2, sinks=True),
    "gathered": LatentCase(latents(4, GATHER), seq_len=23, dense="batch", batch=2),
    "ulysses, heads uneven": LatentCase(latents(4, ULYSSES), seq_len=22, heads=5),
    "ulysses in chunks, fetched again": LatentCase(
        latents(4, ULYSSES, ulysses_chunks=2, kv_cache_policy="full"), seq_len=22, heads=8
    ),
    "ulysses, gathered": LatentCase(latents(4, ULYSSES, allgather_kv=True, kv_cache_policy="half")),
    "hybrid in chunks": LatentCase(latents(4, HYBRID, ulysses_degree=2, ulysses_chunks=2), seq_len=26),
    "half cache": LatentCase(latents(4, kv_cache_policy="half"), seq_len=27),
    "full cache, kept": LatentCase(latents(4, kv_cache_policy="full", keep_attention=True), kept=True),
    "balanced documents": LatentCase(
        latents(4, batch_layout="balanced", kv_exchange="direct"), seq_len=25, cu_seqlens=DOCUMENTS
    ),
    "documents of every row": LatentCase(
        latents(4, kv_exchange="mesh"), seq_len=25, batch=2, cu_seqlens=(DOCUMENTS, (0, 9, 25))
    ),
    "any partition": LatentCase(latents(4), seq_len=29, runs=uneven_partition(4, 29)),
    "full mask": LatentCase(latents(4, attention_mask_type="full"), seq_len=21),
}


def test_out_and_all_gradients_equal_the_textbook_whatever_travels():
    cases = list(SETTINGS.values())
    check([*cases, *map(of_heads, cases[::3])])


def test_one_rank_makes_keys_and_values_once():
    check([LatentCase(latents(1), batch=2)])


@pytest.mark.skipif(not pairs.whole(), reason="every set-up of every algorithm: --full")
@pytest.mark.parametrize("cp", SIZES[1:])
def test_every_algorithm_exchange_and_policy_sends_latents(cp):
    for algorithm in algorithms_at(cp):
        features = ([None, "full", "half"], [None, DOCUMENTS], [1, 2], [(None, None), (4, 0)])
        check(
            [
                LatentCase(
                    {**setup, "kv_cache_policy": policy, "mla_exchange": "latent"},
                    seq_len=25,
                    heads=2 * degree_of(setup),
                    cu_seqlens=documents,
                    batch=batch,
                    window=None if window == (None, None) else window,
                )
                for setup, policy, documents, batch, window in drawn(algorithm, cp, *features)
            ]
        )


def test_dropout_hides_the_same_as_with_heads_on_their_way():
    case = LatentCase(latents(4, kv_exchange="direct"), seq_len=25, dropout_p=0.3)
    results = run_ranks(4, attend_many, [case, of_heads(case)])
    for of_rank in results:
        (latent, *_), (heads, *_) = of_rank
        assert max(largest_errors(latent, heads).values()) < 1e-12


DEEPSEEK = dict(dk=192, dv=128, rope=64, rank=512, heads=4, dtype="bfloat16")
ELEMENTS = 576  # of a token: 512 of the latent, 64 of the rotated part of the key


def test_576_elements_of_a_token_travel_and_return():
    shard = 8 * ELEMENTS * 2  # bytes of a rank's tokens
    cases = {
        "ring": (LatentCase(latents(4), seq_len=32, **DEEPSEEK), 3, 3),
        "gathered": (LatentCase(latents(4, GATHER), seq_len=32, **DEEPSEEK), 3, 3),
        "direct": (LatentCase(latents(4, kv_exchange="direct"), seq_len=32, **DEEPSEEK), None, None),
        "full cache": (LatentCase(latents(4, kv_cache_policy="full"), seq_len=32, **DEEPSEEK), 3, 0),
        "ulysses": (LatentCase(latents(4, ULYSSES), seq_len=32, **DEEPSEEK), 3, 0),
        "hybrid": (LatentCase(latents(4, HYBRID, ulysses_degree=2), seq_len=32, **DEEPSEEK), 1 + 2, 2),
    }
    results = run_ranks(4, attend_many, [case for case, *_ in cases.values()])
    for rank, of_rank in enumerate(results):
        for (name, (case, forward, again)), (_, sent, returned) in zip(cases.items(), of_rank, strict=True):
            if name == "direct":
                rows = sum(needed(case, reader, rank) for reader in range(4) if reader != rank)
                back = sum(needed(case, rank, source) for source in range(4) if source != rank)
                assert (sent["kv"], returned["kv"]) == (rows * ELEMENTS * 2, rows * ELEMENTS * 2)
                assert returned["dkv"] == back * ELEMENTS * 2
                continue
            assert sent["kv"] == forward * shard, name
            expected_back = drop_zero({"kv": again * shard, "dkv": forward * shard})
            assert {purpose: returned.get(purpose) for purpose in expected_back} == expected_back, name
            assert ("kv" in returned) == bool(again), name


def needed(case, reader, source):
    """Rows of a shard that some query of another sees."""
    layout = case.layout()
    return int(case.allowed(None)[0][layout.positions(reader)][:, layout.positions(source)].any(0).sum())


def test_peak_memory_does_not_grow_with_the_size_and_is_below_that_of_heads():
    def peaks(cp, **changes):
        sizes = dict(heads=8, dk=48, dv=32, rope=16, rank=64, dtype="float32", share_from=None)
        case = replace(LatentCase(latents(cp), seq_len=cp * 64, **sizes), **changes)
        return max(run_ranks(cp, peak_bytes, case)), max(run_ranks(cp, peak_bytes, of_heads(case)))

    (four, of_four), (six, _) = peaks(4), peaks(6)
    assert four == six < of_four


def test_bfloat16_is_as_near_as_on_one_rank():
    def errors(cp):
        case = LatentCase(latents(cp), seq_len=256, heads=4, dk=24, dv=16, rope=8, rank=32, dtype="bfloat16", seed=3)
        got = whole(case, [of_rank[0][0] for of_rank in run_ranks(cp, attend_many, [case])])
        return {name: float((got[name] - want).norm() / want.norm()) for name, want in expected(case).items()}

    one, four = errors(1), errors(4)
    assert all(four[name] <= 1.5 * one[name] for name in one), (one, four)


def asked(tp=1, heads=128, topology="switch", itemsize=2, **settings):
    config = ContextParallelConfig(**({"context_parallel_size": 8, "algorithm": RING} | settings))
    weight = torch.empty(heads // tp * 256, 512, device="meta")
    return sends_latents(config, LatentExpansion(weight, heads // tp, 128, 64, 128), topology, itemsize)


@pytest.mark.parametrize(
    ("wanted", "settings"),
    [
        (True, {}),
        (True, {"tp": 16}),
        (False, {"tp": 32}),  # 1,280 elements of four heads: too few bytes for the products of all ranks' rows
        (True, {"tp": 32, "topology": "nodes"}),
        (False, {"tp": 128, "topology": "nodes"}),  # 320 elements of one head
        (False, {"mla_exchange": "heads"}),
        (True, {"mla_exchange": "latent", "tp": 128}),
        (True, {"algorithm": ULYSSES, "context_parallel_size": 32}),
        (False, {"algorithm": ULYSSES, "context_parallel_size": 64}),
        (False, {"algorithm": ULYSSES, "tp": 16}),  # 8 x 576 elements against 8 heads
        (True, {"algorithm": HYBRID, "ulysses_degree": 4, "tp": 8}),
        (False, {"mla_exchange": "latent", "context_parallel_size": 1}),
    ],
    ids=str,
)
def test_auto_sends_latents_where_saved_bytes_are_worth_repeated_products(wanted, settings):
    assert asked(**settings) is wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 4}, r"must be \(seq_local, 1, 1, 2\) and \(seq_local, 1, 1, 5\)"),
        ({"dk": 7}, "needs keys of 7 elements"),
        ({"heads": 3}, "a divisor of its 3 heads"),
        ({"dtype": "float32"}, "is torch.float64 .* and query is torch.float32"),
    ],
    ids=["latent", "keys", "heads", "dtype"],
)
def test_an_expansion_of_other_sizes_is_refused_with_a_way_out(changes, message):
    from cases import setup_of

    from mindspeed_cp import context_parallel_attention

    case = replace(LatentCase(latents(1)), **changes)
    config, groups = setup_of(case.config)
    query, rope, latent, *_ = case.tensors()
    expand = LatentExpansion(LatentCase(latents(1)).tensors()[3], 4, 4, 2, 3)
    with pytest.raises(ValueError, match=message):
        context_parallel_attention(
            query, rope, latent, config=config, groups=groups, layout=case.layout(), expand=expand
        )
    with pytest.raises(ValueError, match="must have 28 rows"):
        LatentExpansion(torch.zeros(27, 5), 4, 4, 2, 3)
