"""Every rule and every fallback of the configuration, read from its message: flag, value, rule, way out."""

import dataclasses

import pytest

from mindspeed_cp import ContextParallelConfig, TrainingSetup, resolve
from mindspeed_cp.settings.algorithms import ALGORITHMS
from mindspeed_cp.settings.rules import heads_of_rank

RING, ULYSSES, HYBRID = "megatron_cp_algo", "ulysses_cp_algo", "hybrid_cp_algo"


def setup(**changes):
    return TrainingSetup(**({"num_attention_heads": 8, "num_layers": 4, "seq_length": 1024} | changes))


def config(size, algorithm=ULYSSES, **changes):
    return ContextParallelConfig(context_parallel_size=size, algorithm=algorithm, **changes)


# values of the configuration, then what the message must hold: flag and value, the rule, the way out
CONFIG_RULES = {
    "size": (dict(context_parallel_size=0), "--context-parallel-size 0", "at least 1", "1 switches"),
    "algorithm": (dict(algorithm="ring"), "--context-parallel-algo ring", "not known", ", ".join(ALGORITHMS)),
    "mask": (dict(attention_mask_type="band"), "--cp-attention-mask-type band", "not known", "causal, full"),
    "degree missing": (dict(context_parallel_size=8, algorithm=HYBRID), "--ulysses-degree-in-cp", "needs it", "2 or 4"),
    "degree too large": (
        dict(context_parallel_size=8, algorithm=HYBRID, ulysses_degree=8),
        "--ulysses-degree-in-cp 8",
        "--context-parallel-size 8",
        "2 or 4",
    ),
    "degree one": (
        dict(context_parallel_size=8, algorithm=HYBRID, ulysses_degree=1),
        "--ulysses-degree-in-cp 1",
        "between",
        "2 or 4",
    ),
    "degree does not divide": (
        dict(context_parallel_size=8, algorithm=HYBRID, ulysses_degree=3),
        "--ulysses-degree-in-cp 3",
        "must divide --context-parallel-size 8",
        "choose 2 or 4",
    ),
    "degree of a prime": (
        dict(context_parallel_size=5, algorithm=HYBRID, ulysses_degree=2),
        "--ulysses-degree-in-cp 2",
        "must divide --context-parallel-size 5",
        "not prime",
    ),
    "window above the ring's size": (
        dict(context_parallel_size=8, algorithm=RING, window_size=16),
        "--cp-window-size 16",
        "at most the ring size 8",
        "1, 2 or 4",
    ),
    "window does not divide": (
        dict(context_parallel_size=6, algorithm=RING, window_size=4),
        "--cp-window-size 4",
        "divide",
        "1, 2 or 3",
    ),
    "window zero": (
        dict(context_parallel_size=6, algorithm=RING, window_size=0),
        "--cp-window-size 0",
        "at least 1",
        "1 is",
    ),
    "window of hybrid": (
        dict(context_parallel_size=8, algorithm=HYBRID, ulysses_degree=2, window_size=3),
        "--cp-window-size 3",
        "ring size 4",
        "1 or 2",
    ),
    "policy": (
        dict(context_parallel_size=2, kv_cache_policy="all"),
        "--context-parallel-kv-cache-policy all",
        "not known",
        "full or half",
    ),
    "policy without cp": (
        dict(kv_cache_policy="full"),
        "--context-parallel-kv-cache-policy full",
        "needs --context-parallel-size above 1",
        "2 or more",
    ),
    "interval without policy": (
        dict(context_parallel_size=2, kv_cache_interval=1),
        "--context-parallel-cache-interval 1",
        "needs --context-parallel-kv-cache-policy",
        "full or half",
    ),
    "negative interval": (
        dict(context_parallel_size=2, kv_cache_policy="full", kv_cache_interval=-1),
        "--context-parallel-cache-interval -1",
        "0 or more",
        "every layer",
    ),
    "exchange": (
        dict(context_parallel_size=2, algorithm=RING, kv_exchange="mail"),
        "--cp-kv-exchange mail",
        "not known",
        "ring, direct",
    ),
    "direct with ulysses": (
        dict(context_parallel_size=2, kv_exchange="direct"),
        "--cp-kv-exchange direct",
        "ring-type algorithm",
        "megatron_cp_algo or hybrid_cp_algo",
    ),
    "mesh with all-gather": (
        dict(context_parallel_size=2, algorithm="kvallgather_cp_algo", kv_exchange="mesh"),
        "--cp-kv-exchange mesh",
        "ring-type algorithm",
        "megatron_cp_algo or hybrid_cp_algo",
    ),
    "mesh with windows": (
        dict(context_parallel_size=4, algorithm=RING, window_size=2, kv_exchange="mesh"),
        "--cp-kv-exchange mesh",
        "--cp-window-size 2",
        "use --cp-window-size 1",
    ),
    "no step in flight": (
        dict(context_parallel_size=4, algorithm=RING, kv_exchange="direct", in_flight=0),
        "--cp-in-flight 0",
        "a whole number of at least 1, or auto",
        "1 is one step at a time",
    ),
    "topology": (
        dict(context_parallel_size=4, algorithm=RING, kv_exchange="auto", topology="torus"),
        "--cp-topology torus",
        "not known",
        "mesh, switch, nodes",
    ),
    "no chunk": (
        dict(context_parallel_size=4, ulysses_chunks=0),
        "--cp-ulysses-chunks 0",
        "at least 1",
        "1 exchanges all heads at once",
    ),
    "direct with windows": (
        dict(context_parallel_size=4, algorithm=RING, window_size=2, kv_exchange="direct"),
        "--cp-kv-exchange direct",
        "--cp-window-size 2",
        "use --cp-window-size 1",
    ),
    "more ranks than there are": (
        dict(context_parallel_size=99999999999, algorithm="hybrid_cp_algo"),  # in less than a second
        "--ulysses-degree-in-cp is not given",
        "needs it",
        "choose 3, 9",
    ),
    "p2p": (
        dict(context_parallel_size=2, algorithm=RING, p2p="mail"),
        "--cp-p2p mail",
        "not known",
        "auto, batch, isend",
    ),
    "layout": (dict(batch_layout="spiral"), "--cp-batch-layout spiral", "not known", "auto, contiguous, zigzag"),
    "all-gather without ulysses": (
        dict(context_parallel_size=2, algorithm=RING, allgather_kv=True),
        "--use-ulysses-allgather-kv",
        "needs --context-parallel-algo ulysses_cp_algo",
        "leave it out",
    ),
}
SETUP_RULES = {
    "world": (
        config(2, RING),
        dict(world_size=6, tensor_parallel_size=2, pipeline_parallel_size=2),
        "world size 6",
        "--tensor-model-parallel-size 2 x --context-parallel-size 2 x --pipeline-model-parallel-size 2",
        "multiple of 8",
    ),
    "heads of ulysses": (
        config(3),
        {},
        "--num-attention-heads 8",
        "--tensor-model-parallel-size 1 x --context-parallel-size 3",
        "can be 1 or 2",
    ),
    "heads with tensor parallelism": (
        config(4),
        dict(tensor_parallel_size=4),
        "--num-attention-heads 8",
        "= 16",
        "megatron_cp_algo",
    ),
    "heads of hybrid": (
        config(9, HYBRID, ulysses_degree=3),
        {},
        "--num-attention-heads 8",
        "--ulysses-degree-in-cp 3",
        "megatron_cp_algo",
    ),
    "groups": (
        config(1),
        dict(num_query_groups=3),
        "--num-query-groups 3",
        "must divide --num-attention-heads 8",
        "1, 2, 4 or 8",
    ),
    "length": (
        config(4),
        dict(seq_length=1022),
        "--seq-length 1022",
        "divisible by --context-parallel-size 4",
        "--gather-size-calculator dynamic",
    ),
    "interval": (
        config(2, kv_cache_policy="full", kv_cache_interval=4),
        {},
        "--context-parallel-cache-interval 4",
        "smaller than --num-layers 4",
        "0 to 3",
    ),
    "all-gather needs groups": (
        config(2, allgather_kv=True),
        {},
        "--use-ulysses-allgather-kv",
        "one KV head per",
        "--num-query-groups 1",
    ),
    "all-gather with many groups": (
        config(2, allgather_kv=True),
        dict(num_query_groups=4, tensor_parallel_size=2),
        "--num-query-groups 4",
        "must equal --tensor-model-parallel-size 2",
        "--num-query-groups 2",
    ),
    "sequence parallel": (
        config(2, RING),
        dict(seq_length=1022, tensor_parallel_size=2, sequence_parallel=True),
        "--seq-length 1022",
        "--context-parallel-size 2 x --tensor-model-parallel-size 2",
        "1020",
    ),
    "fallback of an odd length": (
        config(4, kv_cache_policy="full"),
        dict(seq_length=1023, gather_size_calculator="dynamic"),
        "--gather-size-calculator dynamic",
        "--context-parallel-kv-cache-policy full",
        "--seq-length 1020",
    ),
}


@pytest.mark.parametrize("name", CONFIG_RULES)
def test_configuration_rule(name):
    values, *says = CONFIG_RULES[name]
    with pytest.raises(ValueError) as error:
        ContextParallelConfig(**values)
    assert all(part in str(error.value) for part in says), str(error.value)


@pytest.mark.parametrize("name", SETUP_RULES)
def test_setup_rule(name):
    given, changes, *says = SETUP_RULES[name]
    with pytest.raises(ValueError) as error:
        resolve(given, setup(**changes))
    assert all(part in str(error.value) for part in says), str(error.value)


@pytest.mark.parametrize("name", SETUP_RULES)
def test_way_out_of_a_length_or_world_error_works(name):
    """What the message suggests as a number is accepted."""
    given, changes, *_ = SETUP_RULES[name]
    ways = {
        "world": dict(world_size=16),
        "length": dict(seq_length=1020),
        "groups": dict(num_query_groups=4),
        "sequence parallel": dict(seq_length=1020),
        "fallback of an odd length": dict(seq_length=1020),
        "all-gather needs groups": dict(num_query_groups=1),
        "all-gather with many groups": dict(num_query_groups=2),
        "interval": dict(num_layers=5),
        "heads of ulysses": dict(gather_size_calculator="dynamic", seq_length=1023),
        "heads with tensor parallelism": dict(num_attention_heads=16),
        "heads of hybrid": dict(num_attention_heads=9),
    }
    resolve(given, setup(**(changes | ways[name])))


@pytest.mark.parametrize(
    ("given", "changes", "says"),
    [
        (config(8, HYBRID, ulysses_degree=4), dict(num_attention_heads=6), "--ulysses-degree-in-cp can be 2,"),
        (config(8, HYBRID, ulysses_degree=2), dict(num_attention_heads=9), "--ulysses-degree-in-cp can be nothing"),
    ],
)
def test_degrees_that_a_message_offers_pass_the_other_rules(given, changes, says):
    with pytest.raises(ValueError, match=says):
        resolve(given, setup(**changes))


def test_configuration_is_frozen_and_takes_keywords_alone():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config(2).window_size = 2
    with pytest.raises(TypeError):
        ContextParallelConfig(2)


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_hierarchy_multiplies_to_the_size(size, algorithm):
    if algorithm == HYBRID and size not in (4, 6, 8):
        with pytest.raises(ValueError, match="--ulysses-degree-in-cp"):
            config(size, algorithm, ulysses_degree=2)
        return
    ulysses, window, windows = config(size, algorithm, ulysses_degree=2 if algorithm == HYBRID else None).hierarchy
    assert ulysses * window * windows == size


@pytest.mark.parametrize(("interval", "layers"), [(0, [1, 2, 3, 4, 5]), (1, [1, 3, 5]), (2, [1, 4])])
def test_cache_interval_counts_layers_from_one(interval, layers):
    given = config(2, kv_cache_policy="full", kv_cache_interval=interval)
    assert [layer for layer in range(1, 6) if given.kv_cache_policy_for(layer)] == layers


def test_heads_of_a_tensor_parallel_rank_and_what_megatron_refuses():
    assert [heads_of_rank(64, 8, tp) for tp in (1, 8, 16)] == [(64, 8), (8, 1), (4, 1)]
    with pytest.raises(
        ValueError, match="heads 10 must be divisible by --tensor-model-parallel-size 4; choose 1, 2, 5"
    ):
        heads_of_rank(10, 10, 4)
    with pytest.raises(ValueError, match="groups 6 must be a multiple or a divisor of .* 4; choose 1, 2, 3 or 6"):
        heads_of_rank(12, 6, 4)
