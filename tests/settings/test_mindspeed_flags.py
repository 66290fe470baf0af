"""How scripts of MindSpeed and of Megatron name an algorithm, and MindSpeed's flags that change nothing here."""

import argparse

import pytest
from flags import MODEL, make_parser, parse

from mindspeed_cp import ContextParallelConfig
from mindspeed_cp.arguments import FrameworkSettings, add_context_parallel_arguments, config_from_args, validate
from mindspeed_cp.arguments.mindspeed_flags import WithoutEffect
from mindspeed_cp.settings.notices import ContextParallelWarning
from mindspeed_cp.settings.setting import declarations

RING, ULYSSES, HYBRID, GATHER = "megatron_cp_algo", "ulysses_cp_algo", "hybrid_cp_algo", "kvallgather_cp_algo"
CP4 = ("--context-parallel-size", "4", "--use-flash-attn")


def megatron_parser():
    """A parser with Megatron's own flags of context parallelism."""
    parser = argparse.ArgumentParser(prog="pretrain_gpt.py", parents=[make_parser_without_ours()], add_help=False)
    parser.add_argument("--cp-comm-type", nargs="+", type=str, default=["p2p"])
    parser.add_argument("--hierarchical-context-parallel-sizes", nargs="+", type=int, default=None)
    parser.add_argument("--position-embedding-type", choices=["learned_absolute", "rope"], default="rope")
    return add_context_parallel_arguments(parser)


def make_parser_without_ours():
    parser = argparse.ArgumentParser(add_help=False)
    own = make_parser()
    for action in own._actions:
        if action.container.title in ("options", "optional arguments") and action.dest != "help":
            parser._add_action(action)
    return parser


def from_megatron(*flags):
    return megatron_parser().parse_args([*MODEL, *CP4, *flags])


def said(args, recwarn):
    validate(args, world_size=4)
    return [str(warning.message) for warning in recwarn if issubclass(warning.category, ContextParallelWarning)]


@pytest.mark.parametrize(
    ("flags", "algorithm", "degree"),
    [
        ("", ULYSSES, None),
        ("--cp-comm-type p2p", RING, None),
        ("--cp-comm-type a2a", ULYSSES, None),
        ("--cp-comm-type all_gather", GATHER, None),
        ("--cp-comm-type allgather", GATHER, None),
        ("--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2", HYBRID, 2),
        ("--cp-comm-type a2a+p2p --ulysses-degree-in-cp 2", HYBRID, 2),
        ("--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 1 4", RING, None),
        ("--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 4 1", ULYSSES, None),
        ("--cp-comm-type p2p p2p all_gather --context-parallel-algo megatron_cp_algo", RING, None),
        ("--cp-comm-type p2p p2p p2p p2p", RING, None),
        ("--cp-comm-type all_gather allgather", GATHER, None),
        ("--context-parallel-algo hybrid_cp_algo --hierarchical-context-parallel-sizes 2 2", HYBRID, 2),
        ("--cp-comm-type p2p --context-parallel-algo ulysses_cp_algo", ULYSSES, None),
        ("--cp-comm-type a2a --context-parallel-algo megatron_cp_algo", RING, None),
    ],
)
def test_the_communication_type_names_the_algorithm_when_no_algorithm_is_given(flags, algorithm, degree):
    args = from_megatron(*flags.split())
    config = config_from_args(args)
    assert (config.algorithm, config.ulysses_degree) == (algorithm, degree)
    validate(args, world_size=4)
    assert (args.context_parallel_algo, args.ulysses_degree_in_cp) == (algorithm, degree)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            "--num-layers 3 --cp-comm-type p2p a2a",
            ["--cp-comm-type names 2 ways", "--num-layers is 3", "one for each layer", "--cp-layer-algo"],
        ),
        ("--cp-comm-type ring", ["--cp-comm-type ring", "choose one of p2p, a2a, all_gather, a2a+p2p"]),
        ("--cp-comm-type a2a+p2p", ["--hierarchical-context-parallel-sizes 2 2", "--ulysses-degree-in-cp"]),
        (
            "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 4",
            ["--hierarchical-context-parallel-sizes 2 4", "--context-parallel-size 4", "use"],
        ),
        ("--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2 1", ["must be two numbers"]),
        (
            "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2 --ulysses-degree-in-cp 4",
            ["disagree", "--ulysses-degree-in-cp 2"],
        ),
    ],
)
def test_a_communication_type_that_is_no_one_algorithm_is_refused_with_a_way_out(flags, says):
    with pytest.raises(ValueError) as error:
        config_from_args(from_megatron(*flags.split()))
    assert [part for part in says if part not in str(error.value)] == []


def test_the_communication_type_of_a_namespace_that_no_parser_made_counts_unless_it_is_megatrons_default():
    args = parse(*CP4)
    for kinds, algorithm in ((["all_gather"], GATHER), (["p2p"], ULYSSES), ("p2p", ULYSSES), (None, ULYSSES)):
        args.cp_comm_type = kinds
        assert config_from_args(args).algorithm == algorithm


@pytest.mark.parametrize(
    ("cp", "heads", "tp", "node", "degree"),
    [
        (4, 8, 1, "", 2),
        (16, 32, 1, "", 8),  # a node of 8, where nobody says it
        (16, 32, 1, "4", 4),
        (16, 32, 2, "", 4),  # four ranks, two devices apart
        (16, 12, 1, "16", 4),
        (9, 9, 1, "", 3),
        (8, None, 1, "", 4),
        (4, 9, 1, "", None),
        (5, 10, 1, "", None),
        (8, 8, 1, "1", None),
    ],
)
def test_hybrid_without_a_degree_gets_the_largest_that_fits_and_says_so(cp, heads, tp, node, degree, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", node)
    args = parse("--context-parallel-algo", HYBRID, "--context-parallel-size", str(cp), "--use-flash-attn")
    args.num_attention_heads, args.tensor_model_parallel_size = heads, tp
    if degree is None:
        with pytest.raises(ValueError, match="--ulysses-degree-in-cp is not given, and .* needs it"):
            validate(args, world_size=cp * tp)
        return
    with pytest.warns(
        ContextParallelWarning, match=f"{degree} is the largest .* give --ulysses-degree-in-cp to change"
    ):
        config, _ = validate(args, world_size=cp * tp)
    assert config.ulysses_degree == args.ulysses_degree_in_cp == degree


@pytest.mark.parametrize("algorithm", [HYBRID, ULYSSES])
@pytest.mark.parametrize("name", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_a_parallel_size_of_0_is_named_whatever_divides_by_it(algorithm, name):
    args = parse("--context-parallel-size", "4", "--context-parallel-algo", algorithm)
    setattr(args, name, 0)
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} 0 must be a whole number of at least 1; 1 "):
        validate(args)


def test_a_configuration_and_a_degree_that_is_given_stay_as_they_are(recwarn):
    with pytest.raises(ValueError, match="--ulysses-degree-in-cp is not given"):
        ContextParallelConfig(context_parallel_size=8, algorithm=HYBRID)
    assert said(from_megatron("--context-parallel-algo", HYBRID, "--ulysses-degree-in-cp", "2"), recwarn) == []
    for settings in ({"num_attention_heads": 4}, {}):
        chosen = FrameworkSettings.read({"context_parallel_size": 4, "context_parallel_algo": HYBRID, **settings})
        assert chosen.resolve().config.ulysses_degree == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--cp-comm-type a2a --context-parallel-algo megatron_cp_algo", "--cp-comm-type a2a is ignored"),
        ("--cp-comm-type p2p --context-parallel-algo ulysses_cp_algo", "--cp-comm-type p2p is ignored"),
        (
            "--context-parallel-algo megatron_cp_algo --hierarchical-context-parallel-sizes 2 2",
            "--hierarchical-context-parallel-sizes 2 2 is ignored",
        ),
    ],
)
def test_a_communication_type_that_the_named_algorithm_overrules_is_a_warning(flags, says, recwarn):
    (notice,) = said(from_megatron(*flags.split()), recwarn)
    assert says in notice


def test_a_communication_type_that_says_what_the_algorithm_says_is_no_warning(recwarn):
    assert said(from_megatron("--cp-comm-type", "p2p", "--context-parallel-algo", RING), recwarn) == []
    assert said(from_megatron("--context-parallel-algo", RING), recwarn) == []


@pytest.mark.parametrize("accepted", declarations(WithoutEffect), ids=lambda each: each.flag)
def test_a_flag_of_mindspeed_without_effect_is_accepted_and_said_once(accepted, recwarn):
    flag, value = accepted.flag, ["16384"] if accepted.whole else []
    plain, carrying = from_megatron(), from_megatron(flag, *value)
    assert config_from_args(plain) == config_from_args(carrying)
    (notice,) = said(carrying, recwarn)
    assert notice.startswith(" ".join([flag, *value])) and "changes nothing here" in notice


def test_mindspeeds_own_default_of_a_flag_without_effect_says_nothing(recwarn):
    assert said(from_megatron("--fix-sub-seq-length", "-1"), recwarn) == []


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--context-parallel-algo", "adaptive_cp_algo", "megatron_cp_algo with --cp-kv-exchange direct"),
        ("--context-parallel-algo", "hybrid_adaptive_cp_algo", "hybrid_cp_algo with --ulysses-degree-in-cp"),
        ("--context-parallel-algo", "mamba_cp_algo", "take ulysses_cp_algo"),
        ("--position-embedding-type", "alibi", "--position-embedding-type rope"),
    ],
)
def test_a_value_whose_meaning_is_missing_is_refused_with_the_reason_and_the_nearest_way(capsys, flag, value, says):
    with pytest.raises(SystemExit) as exit_:
        from_megatron(flag, value)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"pretrain_gpt.py: error: {flag} {value} is not supported: ") and says in error
    args = from_megatron()
    setattr(args, flag.removeprefix("--").replace("-", "_"), value)
    with pytest.raises(ValueError, match=f"{flag} {value} is not supported"):
        validate(args, world_size=4)
