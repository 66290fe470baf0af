"""Every fallback and notice of the configuration, and what it takes for granted where nothing is said."""

import pytest

from mindspeed_cp import ContextParallelConfig, TrainingSetup, resolve
from mindspeed_cp.settings.notices import ContextParallelWarning

RING, ULYSSES, HYBRID = "megatron_cp_algo", "ulysses_cp_algo", "hybrid_cp_algo"


def setup(**changes):
    return TrainingSetup(**({"num_attention_heads": 8, "num_layers": 4, "seq_length": 1024} | changes))


def config(size, algorithm=ULYSSES, **changes):
    return ContextParallelConfig(context_parallel_size=size, algorithm=algorithm, **changes)


@pytest.mark.parametrize(
    ("other", "changes", "algorithm_changes"),
    [
        ("--context-parallel-kv-cache-policy half", {}, dict(kv_cache_policy="half")),
        ("--use-legacy-models", dict(use_legacy_models=True), {}),
    ],
)
def test_unaligned_falls_back_to_aligned_and_names_both_flags(other, changes, algorithm_changes):
    resolved = resolve(config(4, **algorithm_changes), setup(gather_size_calculator="dynamic", **changes))
    assert not resolved.unaligned
    assert any(
        "--gather-size-calculator dynamic" in notice and other in notice and "aligned" in notice
        for notice in resolved.notices
    )


def test_unaligned_takes_any_length_and_uneven_heads():
    resolved = resolve(config(3), setup(gather_size_calculator="dynamic", seq_length=1021))
    assert resolved.unaligned and resolved.notices == ()


def test_calculator_is_ignored_by_rings_and_says_so():
    resolved = resolve(config(3, RING), setup(gather_size_calculator="dynamic", seq_length=1021))
    assert not resolved.unaligned
    assert any("--gather-size-calculator dynamic is ignored" in notice for notice in resolved.notices)


def test_flash_attention_is_switched_on_with_context_parallelism_alone():
    resolved = resolve(config(2), setup(use_flash_attn=False))
    assert resolved.use_flash_attn and "--use-flash-attn is switched on" in resolved.notices[0]
    assert not resolve(config(1), setup(use_flash_attn=False)).use_flash_attn


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(window_size=2), "--cp-window-size 2 is ignored"),
        (dict(ulysses_degree=2), "--ulysses-degree-in-cp 2 is ignored"),
        (dict(context_parallel_size=1, log=True), "--cp-log says nothing"),
        (dict(send_recv_overlap=True), "--use-cp-send-recv-overlap is ignored"),
        (dict(algorithm=RING, alltoall=False), "enable_alltoall False is ignored"),
    ],
)
def test_setting_that_the_algorithm_ignores_is_a_warning(changes, says):
    with pytest.warns(ContextParallelWarning, match=says):
        ContextParallelConfig(**({"context_parallel_size": 4} | changes))


@pytest.mark.parametrize("changes", [dict(algorithm=RING), dict(algorithm=HYBRID, ulysses_degree=2)])
@pytest.mark.parametrize("exchange", ["ring", "direct", "auto"])
def test_a_window_of_the_rings_size_is_the_plain_ring_and_says_so(changes, exchange):
    ring = 8 // changes.get("ulysses_degree", 1)
    with pytest.warns(ContextParallelWarning, match=f"--cp-window-size {ring} is one window of all {ring} ranks"):
        one = ContextParallelConfig(context_parallel_size=8, window_size=ring, kv_exchange=exchange, **changes)
    plain = ContextParallelConfig(context_parallel_size=8, kv_exchange=exchange, **changes)
    assert one == plain and one.hierarchy == plain.hierarchy and one.describe() == plain.describe()


def test_kept_attention_needs_ranks_and_says_so_where_nothing_is_recomputed():
    with pytest.raises(ValueError, match="--cp-keep-attention needs --context-parallel-size above 1; leave it out"):
        config(1, keep_attention=True)
    kept = config(2, RING, keep_attention=True)
    assert "attention kept across recomputation" in kept.describe()
    assert [
        "--cp-keep-attention is ignored" in " ".join(resolve(kept, setup(recomputes_attention=known)).notices)
        for known in (False, True, None)
    ] == [True, False, False]


def test_general_is_causal_until_the_batch_brings_a_mask():
    general = config(2, RING, attention_mask_type="general")
    assert general.causal and general.layout_kind == "zigzag" and general.attention_mask_type == "general"
    assert not config(2, RING, attention_mask_type="full").causal
