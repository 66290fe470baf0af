"""--cp-layer-algo: its grammar, what a layer has then, every rule of it, and Megatron's lists that mean the same."""

import pytest

from mindspeed_cp import ContextParallelConfig, TrainingSetup, resolve
from mindspeed_cp.arguments import FrameworkSettings, compared_config, validate
from mindspeed_cp.arguments.algorithm import choice_of_comm_type
from mindspeed_cp.arguments.declared import flags_of
from mindspeed_cp.arguments.launch import read_flags
from mindspeed_cp.comm.groups import hierarchies
from mindspeed_cp.megatron.decision import of_size, regrouped
from mindspeed_cp.settings.layers import LayerRange, ranges_of

RING, ULYSSES, HYBRID, GATHER = "megatron_cp_algo", "ulysses_cp_algo", "hybrid_cp_algo", "kvallgather_cp_algo"


def config(layers=None, size=4, algorithm=RING, **changes):
    return ContextParallelConfig(context_parallel_size=size, algorithm=algorithm, layer_algorithms=layers, **changes)


def setup(**changes):
    return TrainingSetup(**({"num_attention_heads": 8, "num_layers": 8, "seq_length": 1024} | changes))


def parsed(flags):
    line = f"--num-attention-heads 8 --seq-length 1024 --context-parallel-size 4 --use-flash-attn {flags}"
    return read_flags(line.split())[0]


def algorithms(found, count=8):
    """The first letter of each layer's algorithm, layers from the first on."""
    return "".join(found.of_layer(number).algorithm[0] for number in range(1, count + 1))


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ("0-3:ulysses_cp_algo,4-:kvallgather_cp_algo", "uuuukkkk"),
        ("2:ulysses_cp_algo", "mmummmmm"),
        (" 1 : ulysses_cp_algo , 6- : kvallgather_cp_algo ", "mummmmkk"),
        ("1-/2:ulysses_cp_algo", "mumumumu"),
        ("5-/6:ulysses_cp_algo", "mmmmmumm"),
        ("1-5/2:ulysses_cp_algo,0:kvallgather_cp_algo", "kumumumm"),
        ("3-:cp-kv-exchange=direct", "mmmmmmmm"),
    ],
)
def test_layers_count_from_0_and_those_that_are_not_named_have_the_runs_algorithm(layers, found):
    assert algorithms(config(layers)) == found


def test_an_entry_has_the_runs_settings_but_for_those_that_it_names_or_cannot_use():
    run = config(
        "0:ulysses_cp_algo,1:hybrid_cp_algo:cp-kv-exchange=mesh,2:cp-kv-exchange=ring:cp-window-size=2",
        kv_exchange="direct", ulysses_degree=2, kv_cache_policy="half", send_recv_overlap=True, ulysses_chunks=2,
    )  # fmt: skip
    shown = [
        (each.hierarchy, each.kv_exchange, each.send_recv_overlap, each.ulysses_chunks, each.kv_cache_policy)
        for each in map(run.of_layer, range(1, 5))
    ]
    assert shown == [
        ((4, 1, 1), "ring", False, 2, "half"),
        ((2, 2, 1), "mesh", True, 2, "half"),
        ((1, 2, 2), "ring", True, 1, "half"),
        ((1, 4, 1), "direct", True, 1, "half"),
    ]
    assert all(each.layer_algorithms is None for each in run.layer_configs)
    assert hierarchies(run) == [(1, 4, 1), (4, 1, 1), (2, 2, 1), (1, 2, 2)]


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ("0-3", ["LAYERS:ALGORITHM", '--cp-layer-algo "0-3:ulysses_cp_algo,4-:megatron_cp_algo"']),
        ("0-3:ulysses_cp_algo,", ["(empty): an entry is LAYERS:ALGORITHM"]),
        ("all:ulysses_cp_algo", ["all:ulysses_cp_algo: all names no layers", "5-/6 (every sixth from 5)"]),
        ("3-1:ulysses_cp_algo", ["the last layer of 3-1 comes before the first", "write 1-3"]),
        ("0-/0:ulysses_cp_algo", ["the step behind / of 0-/0 must be at least 1"]),
        ("0-3:ulysses_cp_algo,3-:megatron_cp_algo", ["0-3 and 3- both name layer 3", "each layer once"]),
        ("1-/2:ulysses_cp_algo,4-/3:megatron_cp_algo", ["both name layer 7"]),
        ("0:my_cp_algo", ["--context-parallel-algo my_cp_algo is not known"]),
        ("0:ulysses_cp_algo:megatron_cp_algo", ["the algorithm is there twice"]),
        ("0:cp-window-size=2:cp-window-size=2", ["cp-window-size is there twice"]),
        ("0:cp-log=true", ["cp-log=true is no setting of a layer", "cp-kv-exchange", "or give --cp-log for all"]),
        ("0:use-cp-send-recv-overlap=yes", ["use use-cp-send-recv-overlap=true or use-cp-send-recv-overlap=false"]),
        ("0:cp-kv-exchange=pigeon", ["--cp-kv-exchange pigeon is not known"]),
        ("0:ulysses_cp_algo:cp-window-size=2", ["0: cp-window-size means nothing to Ulysses", "leave it out there"]),
        ("0:hybrid_cp_algo", ["--cp-layer-algo 0: --ulysses-degree-in-cp is not given", "choose 2"]),
        ("1-:cp-window-size=3", ["--cp-layer-algo 1-: --cp-window-size 3", "choose 1 or 2"]),
        ("2:cp-kv-exchange=direct:cp-window-size=2", ["--cp-layer-algo 2: --cp-kv-exchange direct forwards nothing"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_way_out(layers, says):
    with pytest.raises(ValueError) as error:
        config(layers)
    assert [part for part in says if part not in str(error.value)] == []


@pytest.mark.parametrize(
    ("layers", "changes", "says"),
    [
        ("8:ulysses_cp_algo", {}, ["names layer 8, and --num-layers is 8", "0 to 7"]),
        ("2-9:ulysses_cp_algo", {}, ["names layer 9", "2- goes on to the end"]),
        ("9:ulysses_cp_algo", {"mtp_num_layers": 1}, ["--mtp-num-layers 1, which come behind them", "0 to 8"]),
        ("0-2:ulysses_cp_algo", {"num_attention_heads": 6}, ["--cp-layer-algo 0-2: --num-attention-heads 6 must be"]),
        ("0-2:ulysses_cp_algo", {"seq_length": 1021}, ["--seq-length 1021 must be divisible", "aligned Ulysses"]),
        ("0:ulysses_cp_algo:cp-ulysses-chunks=4", {}, ["--cp-layer-algo 0: --cp-ulysses-chunks 4 must"]),
    ],
)  # fmt: skip
def test_the_model_decides_what_its_layers_can_have(layers, changes, says):
    with pytest.raises(ValueError) as error:
        resolve(config(layers), setup(**changes))
    assert [part for part in says if part not in str(error.value)] == []


def test_rules_of_an_algorithm_hold_where_some_layer_has_it_and_nowhere_else():
    odd = setup(num_attention_heads=6, seq_length=1021)
    resolve(config("0-3:kvallgather_cp_algo,4-7:megatron_cp_algo", algorithm=ULYSSES), odd)
    resolve(config("8:ulysses_cp_algo"), setup(mtp_num_layers=1))
    with pytest.raises(ValueError, match="--num-attention-heads 6"):
        resolve(config("0-3:kvallgather_cp_algo,4-6:megatron_cp_algo", algorithm=ULYSSES), odd)


def test_a_setting_that_some_layer_reads_is_not_called_ignored(recwarn):
    config("0:megatron_cp_algo", algorithm=ULYSSES, window_size=2, in_flight=2)
    config("0:hybrid_cp_algo", ulysses_degree=2, ulysses_chunks=2)
    assert not recwarn.list
    with pytest.warns(match="--cp-window-size 2 is ignored"):
        config("0:kvallgather_cp_algo", algorithm=ULYSSES, window_size=2)
    with pytest.warns(match="--cp-layer-algo 1: --cp-in-flight 2 is ignored: a plain ring forwards one step"):
        config("0:cp-kv-exchange=mesh,1:cp-in-flight=2")
    with pytest.warns(match="--cp-layer-algo says nothing at --context-parallel-size 1"):
        assert config("0:ulysses_cp_algo", size=1).entries == ()


@pytest.mark.parametrize(
    ("layers", "run", "degree", "kind"),
    [
        ("0-3:ulysses_cp_algo", RING, 1, "zigzag"),
        ("0-3:megatron_cp_algo", ULYSSES, 1, "zigzag"),
        ("0:hybrid_cp_algo:ulysses-degree-in-cp=4,1:hybrid_cp_algo:ulysses-degree-in-cp=2", ULYSSES, 2, "zigzag"),
        ("0:hybrid_cp_algo:ulysses-degree-in-cp=4", RING, 1, "zigzag"),
        ("0:cp-ulysses-chunks=2", ULYSSES, 8, "contiguous"),
    ],
)
def test_the_layout_of_a_batch_is_in_balance_for_every_ring(layers, run, degree, kind):
    found = config(layers, size=8, algorithm=run)
    assert (found.batch_degree, found.layout_kind) == (degree, kind)


@pytest.mark.parametrize(
    ("kinds", "algorithm", "layers"),
    [
        (["p2p", "a2a", "p2p", "a2a"], RING, "1,3:ulysses_cp_algo"),
        (["a2a", "p2p"] * 3, ULYSSES, "1-5/2:megatron_cp_algo"),
        (["all_gather", "p2p", "p2p", "a2a+p2p"], RING, "0:kvallgather_cp_algo,3:hybrid_cp_algo"),
        (["p2p", "p2p"], RING, None),
    ],
)
def test_a_list_of_communication_types_means_the_same(kinds, algorithm, layers):
    choice = choice_of_comm_type(kinds, 4, [2, 2], num_layers=len(kinds))
    expected = "1:ulysses_cp_algo,3:ulysses_cp_algo" if layers == "1,3:ulysses_cp_algo" else layers
    assert (choice.algorithm, choice.layers) == (algorithm, expected)
    if layers is not None:
        found = config(choice.layers, algorithm=choice.algorithm, ulysses_degree=choice.ulysses_degree)
        names = {"p2p": RING, "a2a": ULYSSES, "all_gather": GATHER, "a2a+p2p": HYBRID}
        assert [found.of_layer(number).algorithm for number in range(1, len(kinds) + 1)] == [names[k] for k in kinds]


def test_the_flag_and_the_list_may_not_say_different_things():
    flags = "--num-layers 2 --cp-comm-type p2p a2a"
    with pytest.raises(ValueError, match="both say which algorithm a layer has; leave one"):
        validate(parsed(f"{flags} --cp-layer-algo 0:ulysses_cp_algo"), world_size=4)
    args = parsed(flags)
    first, _ = validate(args, world_size=4)
    assert first.layer_algorithms == args.cp_layer_algo == "1:ulysses_cp_algo"
    assert validate(args, world_size=4)[0] == first, "what was written back says the same"


def test_the_command_line_chooses_a_degree_for_the_layers_that_need_one():
    flags = "--context-parallel-size 8 --num-layers 4 --context-parallel-algo megatron_cp_algo"
    with pytest.warns(match="--ulysses-degree-in-cp is not given: 4 is the largest"):
        found, _ = validate(parsed(f"{flags} --cp-layer-algo 1-:hybrid_cp_algo"), 8, 8)
    assert found.of_layer(2).hierarchy == (4, 2, 1)


def test_a_framework_says_it_and_all_ranks_compare_it():
    given = {"context_parallel_size": 4, "context_parallel_algo": RING, "use_flash_attn": True}
    found = FrameworkSettings.read({**given, "cp_layer_algo": "1-/2:ulysses_cp_algo"}).resolve().config
    assert algorithms(found) == "mumumumu"
    assert compared_config(found)["--cp-layer-algo"] == "1-/2:ulysses_cp_algo"
    assert "--cp-layer-algo 1-/2:ulysses_cp_algo" in flags_of(found)
    assert (
        FrameworkSettings.read({"use_flash_attn": True}).keeping(found).resolve(context_parallel_size=4).config == found
    )


def test_what_is_on_names_the_layers_together():
    said = config("0:ulysses_cp_algo,1-3:cp-kv-exchange=mesh,5-/6:ulysses_cp_algo", kv_exchange="direct").describe()
    assert said == (
        "Ring, cp=4, zigzag, causal, direct exchange, layers 0 and 5-/6: Ulysses, layers 1-3: Ring, mesh exchange"
    )
    assert config("3:ulysses_cp_algo").describe().endswith(", layer 3: Ulysses")


def test_another_size_keeps_what_fits_into_it():
    """Megatron's dynamic context parallelism gives micro-batches groups of several sizes."""
    run = config(
        "0:ulysses_cp_algo,1:hybrid_cp_algo:ulysses-degree-in-cp=4:cp-kv-exchange=mesh,2:cp-window-size=4",
        size=16, kv_exchange="auto",
    )  # fmt: skip
    small = of_size(run, 4, None)
    assert [small.of_layer(number).hierarchy for number in range(1, 5)] == [(4, 1, 1), (4, 1, 1), (1, 4, 1), (1, 4, 1)]
    half = of_size(run, 8, setup())
    assert [half.of_layer(number).hierarchy for number in range(1, 5)] == [(8, 1, 1), (4, 2, 1), (1, 4, 2), (1, 8, 1)]
    assert half.of_layer(2).kv_exchange == "mesh" and half.of_layer(4).kv_exchange == "auto"


def test_groups_of_one_level_follow_layers_that_are_set_later():
    from mindspeed_cp import ContextParallelGroups

    groups = ContextParallelGroups((1, 4, 1), 1, (0, 1, 2, 3))
    found = regrouped(groups, config("1:ulysses_cp_algo", algorithm=GATHER))
    assert [each.hierarchy for each in (found, *found.others)] == [(1, 4, 1), (4, 1, 1)]
    assert found.of(config(algorithm=ULYSSES)) is found.others[0] and found.of(config()) is found
    assert regrouped(groups, config("1:hybrid_cp_algo", ulysses_degree=2)) is None


def test_an_entry_of_all_layers_leaves_none_to_the_run():
    every, alone = config(f"0-:{ULYSSES}"), config(algorithm=ULYSSES)
    assert every.layer_configs == (alone,) and every.layout_kind == alone.layout_kind == "contiguous"
    assert every.describe().startswith("Ulysses, cp=4, contiguous")
    with pytest.raises(ValueError, match="^--cp-layer-algo 0-: --ulysses-degree-in-cp 3 must divide"):
        config("0-:hybrid_cp_algo:ulysses-degree-in-cp=3")
    with pytest.raises(ValueError, match="^--ulysses-degree-in-cp is not given"):
        config(f"0-:{ULYSSES}", algorithm="hybrid_cp_algo")


def test_only_ascii_digits_number_layers():
    with pytest.raises(ValueError, match="names no layers"):
        LayerRange.read("\u0663-")


def test_ranges_are_as_few_as_they_can_be():
    assert [str(each) for each in ranges_of([5, 11, 17])] == ["5-17/6"]
    assert [str(each) for each in ranges_of([0, 1, 2, 7])] == ["0-2", "7"]


@pytest.mark.parametrize("value", [["0:ulysses_cp_algo"], {}, 5, b"0:ulysses_cp_algo"])
def test_what_is_no_text_is_refused(value):
    with pytest.raises(ValueError, match="--cp-layer-algo .* must be text; use --cp-layer-algo"):
        ContextParallelConfig(context_parallel_size=4, algorithm="megatron_cp_algo", layer_algorithms=value)


def test_a_stepped_range_ends_at_the_last_layer_that_it_names():
    entries = {"layer_algorithms": "0-9/8:ulysses_cp_algo"}
    config = ContextParallelConfig(context_parallel_size=4, algorithm="megatron_cp_algo", **entries)
    resolve(config, TrainingSetup(num_attention_heads=8, num_layers=9))
    with pytest.raises(ValueError, match=r"names layer 8, .* and 0-/8 goes on to the end"):
        resolve(config, TrainingSetup(num_attention_heads=8, num_layers=8))


def test_an_entry_inherits_the_windows_of_a_run_that_has_one():
    config = ContextParallelConfig(
        context_parallel_size=8,
        algorithm="hybrid_cp_algo",
        ulysses_degree=2,
        window_size=4,
        layer_algorithms="0:megatron_cp_algo",
    )
    assert config.of_layer(1).hierarchy == (1, 4, 2) and config.of_layer(2).hierarchy == (2, 4, 1)
