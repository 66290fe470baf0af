"""The facts of invariant 1 for points that nobody thought of: hypothesis draws the problem, the ranks solve it."""

from dataclasses import replace

from cases import Case, attend, expected, largest_errors, whole
from distributed import run_ranks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from setups import degree_of, exchanges, has_ring, shapes
from slice_cases import drawn_slices

from mindspeed_cp.settings.algorithms import ALGORITHMS

# Largest absolute error for inputs of size 1; the low precisions round inputs' products at their own resolution.
LIMIT = {"float64": 1e-10, "float32": 1e-4, "float16": 0.05, "bfloat16": 0.4}


@st.composite
def cases(draw):
    cp = draw(st.integers(1, 8))
    algorithm = draw(st.sampled_from([name for name in ALGORITHMS if any(shapes(name, cp))]))
    shape = draw(st.sampled_from(list(shapes(algorithm, cp))))
    config = {
        **shape,
        "attention_mask_type": draw(st.sampled_from(["causal", "full"])),
        "kv_exchange": draw(st.sampled_from(exchanges(shape))),
    }
    if cp > 1:
        config["kv_cache_policy"] = draw(st.sampled_from([None, "full", "half"]))
        if config["kv_cache_policy"]:
            config["kv_cache_interval"] = draw(st.integers(0, 2))
    if has_ring(shape):
        config["send_recv_overlap"] = draw(st.booleans())
        config["batch_layout"] = draw(st.sampled_from(["auto", "balanced"]))
    if degree_of(shape) > 1:
        config["alltoall"] = draw(st.booleans())
    kv_heads = draw(st.integers(1, 6))
    heads = kv_heads * draw(st.integers(1, 4))
    if algorithm == "hybrid_cp_algo" and heads < degree_of(shape):
        heads = kv_heads * degree_of(shape)
    if algorithm == "ulysses_cp_algo" and kv_heads == 1 and heads > 1 and cp > 1:
        config["allgather_kv"] = draw(st.booleans())
    seq_len = draw(st.integers(1, 60))
    cuts = draw(st.none() | st.lists(st.integers(0, seq_len), max_size=8))
    limit = st.none() | st.integers(-1, seq_len + 3)
    return Case(
        config=config,
        seq_len=seq_len,
        batch=draw(st.integers(1, 3)),
        heads=heads,
        kv_heads=kv_heads,
        dk=draw(st.integers(1, 8)),
        dv=draw(st.integers(1, 8)),
        dtype=draw(st.sampled_from(list(LIMIT))),
        cu_seqlens=None if cuts is None else (0, *sorted(cuts), seq_len),
        window=draw(st.none() | st.tuples(limit, limit)),
        dense=draw(st.sampled_from([None, None, "shared", "batch"])),
        slices=draw(st.none() | st.randoms(use_true_random=False).map(lambda rng: drawn_slices(rng, seq_len))),
        sinks=draw(st.booleans()),
        softmax_scale=draw(st.none() | st.floats(0.05, 1.0)),
        layer_number=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_any_drawn_problem_equals_dense_attention(case):
    errors = largest_errors(whole(case, run_ranks(case.cp, attend, case)), expected(case))
    # The gradient of an offset sums over every row, its rounding too.
    limits = {name: LIMIT[case.dtype] * (case.seq_len if name == "d_offset" else 1) for name in errors}
    assert all(errors[name] <= limits[name] for name in errors), (errors, repr(case))


@st.composite
def partitions(draw, cp, seq_len):
    """Any partition of the positions: pieces of any length, in any order, on any rank; a rank may hold nothing."""
    edges = [0, *sorted(draw(st.sets(st.integers(1, seq_len), max_size=10)) - {seq_len}), seq_len]
    pieces = draw(st.permutations(list(zip(edges, edges[1:]))))
    owners = draw(st.lists(st.integers(0, cp - 1), min_size=len(pieces), max_size=len(pieces)))
    return tuple(tuple(run for run, owner in zip(pieces, owners) if owner == rank) for rank in range(cp))


@st.composite
def anybodys_cases(draw):
    """Batches that somebody else split: any partition, documents of their own in every row, masks that come along."""
    case = draw(cases())
    config = {**case.config, "attention_mask_type": draw(st.sampled_from(["causal", "full", "general"]))}
    if config.get("kv_exchange") == "direct":
        config["kv_exchange"] = draw(st.sampled_from(["direct", "auto"]))
    documents = case.cu_seqlens
    if documents and draw(st.booleans()):
        cuts = st.lists(st.integers(0, case.seq_len), max_size=6)
        documents = tuple((0, *sorted(draw(cuts)), case.seq_len) for _ in range(case.batch))
    runs = draw(partitions(case.cp, case.seq_len))
    return replace(case, config=config, dtype="float64", cu_seqlens=documents, runs=runs)


@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(anybodys_cases())
def test_any_partition_of_the_sequence_is_exact(case):
    errors = largest_errors(whole(case, run_ranks(case.cp, attend, case)), expected(case))
    assert all(error <= 1e-10 * (case.seq_len if name == "d_offset" else 1) for name, error in errors.items()), (
        errors,
        repr(case),
    )
