"""Invariant 1: every algorithm equals dense attention, forward and backward, over the product of all features.

The products are large, so the default run draws them by pairs (pairs.py): all features together over every algorithm
and size, then each feature on its own over sizes and the kinds of algorithms (with a window, with direct exchange).
"""

import random
from functools import cache

import pairs
import pytest
import torch
from cases import Case, attend, check_cases, expected, largest_errors, whole
from distributed import run_ranks
from setups import (
    ALGORITHM_AND_SIZE,
    SOME_SIZES,
    degree_of,
    drawn,
    for_every_algorithm,
    has_ring,
    kind_of,
    setups,
    shapes,
)
from slice_cases import drawn_slices

MASK_TYPES = ("causal", "full")
for_some_sizes = pytest.mark.parametrize("algorithm, cp", SOME_SIZES)
# Kinds of algorithms that four ranks have; eight add nothing to what is kept and fetched again.
UP_TO_4 = {kind_of(setup) for param in SOME_SIZES if param.values[1] <= 4 for setup in setups(*param.values)}
SCALES = (None, 0.7)


def head_choices(degree):
    """(heads, kv_heads): MHA, GQA, MQA and GQA with fewer KV heads than the degree; all divisible by the degree."""
    return [(2 * degree, 2 * degree), (2 * degree, degree), (2 * degree, 2), (2 * degree, 1), (3 * degree, 3)]


def documents(rng, seq_len):
    cuts = sorted(rng.choices(range(seq_len + 1), k=rng.randint(1, 6)))
    return (0, *cuts, seq_len)


# What a point of the whole product has beside algorithm and size; sizes and heads depend on those.
FEATURES = {
    "seq_len": range(9),
    "mask": ("none", "packed", "dense", "window", "packed+window", "packed+dense", "slices", "slices+packed+window"),
    "heads": range(5),
    "window": ((3, 0), (0, 0), (5, 2), (None, 1), (4, -1)),
    "kv_cache_policy": (None, "full", "half"),
    "dims": ((4, 4), (6, 4), (4, 6)),
    "mask_type": MASK_TYPES,
    "send_recv_overlap": (False, True),
    "alltoall": (True, False),
    "allgather_kv": (False, True),
    "ulysses_chunks": (1, 2, 3, 100),
    "in_flight": (1, 2, 100),
    "dense": ("shared", "batch"),
    "batch": (1, 2),
    "sinks": (False, True),
    "softmax_scale": (None, 0.3),
}


@cache
def points():
    """(algorithm, size) -> its points, each a dict of the features; every feature meets every algorithm and size."""
    places = [param.values for param in ALGORITHM_AND_SIZE]
    found = {place: [] for place in places}
    for seed in range(10 if pairs.whole() else 1):
        for first, *rest in pairs.all_pairs([len(places), *map(len, FEATURES.values())], seed):
            found[places[first]].append({name: FEATURES[name][index] for name, index in zip(FEATURES, rest)})
    return found


def case_of(point, number, algorithm, cp):
    """The case of this point, as far as the algorithm has its features."""
    choices, seed = setups(algorithm, cp), random.Random(f"{algorithm} {cp} {number}")
    setup = choices[number % len(choices)]
    degree = degree_of(setup)
    heads, kv_heads = head_choices(degree)[point["heads"]]
    seq_len = (1, max(1, cp - 1), cp + 1, 2 * cp, 4 * cp, 13, 29, 31, 47)[point["seq_len"]]
    config = {**setup, "attention_mask_type": point["mask_type"]}
    if has_ring(setup):
        config["send_recv_overlap"] = point["send_recv_overlap"]
    if setup["kv_exchange"] != "ring" or "window_size" in setup:
        config["in_flight"] = point["in_flight"]
    if degree > 1:
        config["alltoall"] = point["alltoall"]
        config["ulysses_chunks"] = min(point["ulysses_chunks"], heads // degree)  # 100: every head on its own
    if cp > 1:
        config["kv_cache_policy"] = point["kv_cache_policy"]
    if algorithm == "ulysses_cp_algo" and kv_heads == 1 and heads > 1:
        config["allgather_kv"] = point["allgather_kv"]
    mask, (dk, dv) = point["mask"], point["dims"]
    return Case(
        config=config,
        seq_len=seq_len,
        batch=point["batch"],
        heads=heads,
        kv_heads=kv_heads,
        dk=dk,
        dv=dv,
        cu_seqlens=documents(seed, seq_len) if "packed" in mask else None,
        window=point["window"] if "window" in mask else None,
        slices=drawn_slices(seed, seq_len) if "slices" in mask else None,
        dense=point["dense"] if "dense" in mask else None,
        sinks=point["sinks"],
        softmax_scale=point["softmax_scale"],
        seed=seed.randrange(1 << 30),
    )


@for_every_algorithm
def test_features_together_equal_dense_attention(algorithm, cp):
    chosen = points()[algorithm, cp]
    check_cases([case_of(point, number, algorithm, cp) for number, point in enumerate(chosen)])


@for_some_sizes
def test_plain_attention_equals_dense_attention(algorithm, cp):
    check_cases(
        [
            Case(
                {**setup, "attention_mask_type": mask_type},
                seq_len=4 * cp if multiple else 29,
                heads=2 * degree_of(setup),
                kv_heads=2 * degree_of(setup),
            )
            for setup, mask_type, multiple in drawn(algorithm, cp, MASK_TYPES, (True, False))
        ]
    )


@for_every_algorithm
def test_any_length_from_one_token_up_works(algorithm, cp):
    """Shorter than the group (ranks without tokens), one more or less than a multiple, primes."""
    lengths = (1, max(1, cp - 1), cp + 1, 2 * cp + 1, 17)
    check_cases(
        [
            Case(
                {**setup, "attention_mask_type": mask_type},
                seq_len=lengths[number],
                heads=degree_of(setup),
                kv_heads=degree_of(setup),
            )
            for setup, number, mask_type in drawn(algorithm, cp, range(5), MASK_TYPES)
        ]
    )


@for_some_sizes
def test_packed_documents_of_any_length_equal_dense_attention(algorithm, cp):
    """Documents shorter than the group, of length 1 and 0, one that spans every rank."""
    boundaries = (0, 31), (0, 1, 31), (0, 0, 0, 5, 5, 6, 31, 31), tuple(range(32)), (0, 3, 7, 12, 18, 25, 31)
    check_cases(
        [
            Case(
                {**setup, "attention_mask_type": mask_type},
                seq_len=31,
                cu_seqlens=cu_seqlens,
                heads=degree_of(setup),
                kv_heads=1,
            )
            for setup, cu_seqlens, mask_type in drawn(algorithm, cp, boundaries, MASK_TYPES)
        ]
    )


@for_some_sizes
def test_sliding_windows_equal_dense_attention(algorithm, cp):
    windows = (0, 0), (3, 0), (9, 5), (2, 3), (None, 4), (-1, -1), (7, -1), (1000, 1000)
    check_cases(
        [
            Case(
                {**setup, "attention_mask_type": mask_type},
                seq_len=33,
                window=window,
                heads=degree_of(setup),
                kv_heads=degree_of(setup),
            )
            for setup, window, mask_type in drawn(algorithm, cp, windows, MASK_TYPES)
        ]
    )


@for_some_sizes
def test_dense_masks_equal_dense_attention(algorithm, cp):
    documents = (None, (0, 4, 4, 15, 21))
    check_cases(
        [
            Case(
                {**setup, "attention_mask_type": mask_type},
                seq_len=21,
                dense=dense,
                batch=2,
                heads=2 * degree_of(setup),
                kv_heads=degree_of(setup),
                cu_seqlens=cu_seqlens,
            )
            for setup, dense, mask_type, cu_seqlens in drawn(algorithm, cp, ("shared", "batch"), MASK_TYPES, documents)
        ]
    )


@for_some_sizes
def test_grouped_multi_query_and_latent_attention_equal_dense_attention(algorithm, cp):
    dims = ((4, 4), (6, 4), (3, 5))
    cases = []
    for setup, number, (dk, dv) in drawn(algorithm, cp, range(5), dims):
        heads, kv_heads = head_choices(degree_of(setup))[number]
        cases.append(Case(setup, seq_len=19, batch=2, heads=heads, kv_heads=kv_heads, dk=dk, dv=dv))
    check_cases(cases)


@for_some_sizes
def test_softmax_offsets_and_their_gradient_equal_dense_attention(algorithm, cp):
    check_cases(
        [
            Case(
                {**setup, "attention_mask_type": mask_type},
                seq_len=19,
                heads=2 * degree_of(setup),
                kv_heads=degree_of(setup),
                sinks=True,
                softmax_scale=scale,
                dense=dense,
            )
            for setup, mask_type, scale, dense in drawn(algorithm, cp, MASK_TYPES, SCALES, (None, "shared"))
        ]
    )


@pytest.mark.parametrize("algorithm, cp", [p for p in SOME_SIZES if p.values[1] > 1])
def test_every_cache_policy_and_overlap_gives_the_same_gradients(algorithm, cp):
    """Bitwise the same, not just close: what is kept or fetched again are the same numbers in the same order."""
    for setup in setups(algorithm, cp):
        if cp > 4 and kind_of(setup) in UP_TO_4 and not pairs.whole():
            continue
        variants = [
            {"kv_cache_policy": policy, **({"send_recv_overlap": overlap} if has_ring(setup) else {})}
            for policy in (None, "full", "half")
            for overlap in ((False, True) if has_ring(setup) else (False,))
        ]
        heads = 2 * degree_of(setup)
        cases = [Case({**setup, **variant}, seq_len=27, heads=heads, kv_heads=2) for variant in variants]
        for results in check_cases(cases):
            for case, result in zip(cases[1:], results[1:]):
                assert all(torch.equal(result[name], results[0][name]) for name in result), str(case)


@pytest.mark.parametrize("cp", [2, 4])
def test_every_number_of_chunks_and_cache_policy_is_exact_for_uneven_and_grouped_heads(cp):
    def cases():
        for heads, kv_heads in ((4 * cp, 4 * cp), (4 * cp, cp), (4 * cp, 2 * cp), (4 * cp, 1), (7, 7), (7, 1), (6, 2)):
            for chunks in range(1, min(5, -(-heads // cp) + 1)):
                policy = (None, "half", "full")[(heads + kv_heads + chunks) % 3]
                config = {"context_parallel_size": cp, "ulysses_chunks": chunks, "kv_cache_policy": policy}
                yield Case(config, seq_len=13, heads=heads, kv_heads=kv_heads, sinks=chunks % 2 == 0)
                if policy is None and heads % 2 == 0 and cp == 4:
                    yield Case({**config, "algorithm": "hybrid_cp_algo", "ulysses_degree": 2}, heads=heads, kv_heads=2)

    check_cases(list(cases()))


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
@pytest.mark.parametrize("heads, kv_heads", [(5, 5), (7, 1), (6, 2), (3, 3), (1, 1), (6, 3)])
def test_ulysses_takes_uneven_heads_and_lengths(cp, heads, kv_heads):
    """Heads are split like the sequence: the remainder to the first ranks, none to the last when there are too few."""
    check_cases(
        [
            Case(
                {"context_parallel_size": cp, "attention_mask_type": mask_type},
                seq_len=seq_len,
                heads=heads,
                kv_heads=kv_heads,
            )
            for seq_len in (1, 17, 4 * cp)
            for mask_type in ("causal", "full")
        ]
    )


@for_some_sizes
def test_float32_results_are_accurate_to_float32(algorithm, cp):
    for shape in shapes(algorithm, cp):
        case = Case(shape, seq_len=32, heads=degree_of(shape), kv_heads=degree_of(shape), dtype="float32")
        errors = largest_errors(whole(case, run_ranks(cp, attend, case)), expected(case))
        assert max(errors.values()) < 5e-6, (str(case), errors)
