"""The flags: names, defaults, choices, help, one readable line for wrong values, and what they become."""

import argparse

import pytest
import torch
from flags import make_parser, parse

from mindspeed_cp.arguments import (
    add_context_parallel_arguments,
    config_from_args,
    readable_errors,
    setup_from_args,
    validate,
)
from mindspeed_cp.arguments.flags import GROUP_TITLE
from mindspeed_cp.settings.algorithms import ALGORITHMS
from mindspeed_cp.settings.notices import ContextParallelWarning

DEFAULTS = {
    "--context-parallel-size": 1,
    "--context-parallel-algo": "ulysses_cp_algo",
    "--ulysses-degree-in-cp": None,
    "--cp-window-size": 1,
    "--cp-attention-mask-type": "causal",
    "--use-cp-send-recv-overlap": False,
    "--context-parallel-kv-cache-policy": None,
    "--context-parallel-cache-interval": 0,
    "--use-ulysses-allgather-kv": False,
    "--cp-kv-exchange": "ring",
    "--cp-in-flight": 1,
    "--cp-topology": "auto",
    "--cp-ulysses-chunks": 1,
    "--cp-p2p": "auto",
    "--cp-batch-layout": "auto",
    "--cp-keep-attention": False,
    "--cp-log": False,
    "--cp-kernel": None,
    "--gather-size-calculator": "default",
    "--use-flash-attn": False,
    "--use-fused-ring-attention-update": False,
    "--cp-config": None,
}


@pytest.mark.parametrize(("flag", "default"), DEFAULTS.items())
def test_flag_has_the_documented_default_and_says_it_in_help(flag, default):
    action = make_parser()._option_string_actions[flag]
    assert action.default == default
    assert "Default: " in action.help and "Rule: " in action.help
    if action.choices:
        assert all(choice in action.help for choice in action.choices)


def test_all_flags_stand_in_one_group():
    parser = make_parser()
    groups = [group for group in parser._action_groups if group.title == GROUP_TITLE]
    assert len(groups) == 1
    names = {name for action in groups[0]._group_actions for name in action.option_strings}
    assert set(DEFAULTS) <= names
    assert GROUP_TITLE in parser.format_help()


def test_algorithm_choices_are_the_table():
    assert make_parser()._option_string_actions["--context-parallel-algo"].choices == list(ALGORITHMS)


def test_flags_that_the_parser_has_are_left_alone_and_adding_twice_changes_nothing():
    parser = argparse.ArgumentParser()
    parser.add_argument("--context-parallel-size", type=int, default=7)
    parser.add_argument("--use-flash-attn", action="store_true")
    before = dict(parser._option_string_actions)
    add_context_parallel_arguments(parser)
    after = dict(parser._option_string_actions)
    assert all(after[name] is action for name, action in before.items())
    add_context_parallel_arguments(parser)
    assert parser._option_string_actions == after
    assert parser.parse_args([]).context_parallel_size == 7


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--context-parallel-algo", "ring", "choose one of ulysses_cp_algo, megatron_cp_algo"),
        ("--context-parallel-size", "0", "at least 1"),
        ("--context-parallel-size", "two", "whole number"),
        ("--cp-window-size", "-1", "at least 1"),
        ("--cp-attention-mask-type", "window", "choose one of causal, full"),
        ("--context-parallel-kv-cache-policy", "all", "choose one of full, half"),
        ("--context-parallel-cache-interval", "-2", "at least 0"),
        ("--cp-kv-exchange", "mail", "choose one of ring, direct"),
        ("--cp-batch-layout", "spiral", "choose one of auto, contiguous, zigzag"),
        ("--cp-kernel", "tpu", "choose one of cpu, cuda"),
        ("--gather-size-calculator", "my_module", "package.module:Class"),
    ],
)
def test_wrong_value_exits_with_status_2_and_one_readable_line(capsys, flag, value, says):
    with pytest.raises(SystemExit) as exit_:
        parse(flag, value)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.count("\n") == 1 and error.startswith("pretrain_gpt.py: error: ")
    assert f"{flag} {value}" in error and says in error


def test_broken_rule_becomes_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as exit_, readable_errors("pretrain_gpt.py"):
        validate(parse("--context-parallel-size", "3"), world_size=3)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and "--num-attention-heads 8" in error


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--attention-mask-type", "general"),
        ("--cp-attention-mask-type", "full"),
        ("--attention-mask-type", "full"),
        ("--cp-attention-mask-type", "general"),
    ],
)
def test_both_names_of_the_mask_flag_reach_the_configuration(flag, value):
    assert config_from_args(parse(flag, value)).attention_mask_type == value


def test_every_flag_reaches_the_configuration():
    config = config_from_args(
        parse(
            *"--context-parallel-size 8 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2 "
            "--cp-window-size 2 "
            "--cp-attention-mask-type full --use-cp-send-recv-overlap --context-parallel-kv-cache-policy half "
            "--context-parallel-cache-interval 1".split()
        )
    )
    assert config.hierarchy == (2, 2, 2)
    assert (config.attention_mask_type, config.send_recv_overlap, config.kv_cache_policy, config.kv_cache_interval) == (
        "full",
        True,
        "half",
        1,
    )
    assert (
        config_from_args(
            parse(*"--context-parallel-size 2 --context-parallel-algo megatron_cp_algo --cp-kv-exchange direct".split())
        ).kv_exchange
        == "direct"
    )
    layout = config_from_args(parse("--context-parallel-size", "2", "--cp-batch-layout", "zigzag")).batch_layout
    assert layout == "zigzag"
    assert config_from_args(parse("--context-parallel-size", "2", "--use-ulysses-allgather-kv")).allgather_kv
    assert config_from_args(parse("--context-parallel-size", "2", "--cp-keep-attention")).keep_attention


@pytest.mark.parametrize(
    ("recompute", "recomputes"),
    [
        ({}, None),
        ({"recompute_granularity": None}, False),
        ({"recompute_granularity": "full"}, True),
        ({"recompute_granularity": "selective"}, True),
        ({"recompute_granularity": "selective", "recompute_modules": ["mlp", "core_attn"]}, True),
        ({"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, False),
        ({"recompute_granularity": None, "recompute_activations": True}, True),
    ],
)
def test_the_setup_knows_whether_attention_is_recomputed(recompute, recomputes):
    args = parse()
    for name, value in recompute.items():
        setattr(args, name, value)
    assert setup_from_args(args, world_size=1).recomputes_attention is recomputes


def test_setup_reads_model_and_machine():
    setup = setup_from_args(
        parse("--group-query-attention", "--num-query-groups", "2", "--use-flash-attn"), world_size=4
    )
    assert (
        setup.num_attention_heads,
        setup.num_query_groups,
        setup.num_layers,
        setup.seq_length,
        setup.world_size,
    ) == (8, 2, 4, 1024, 4)
    assert setup_from_args(parse("--num-query-groups", "2")).num_query_groups is None  # without --group-query-attention


def test_flash_attention_is_switched_on_and_says_so():
    args = parse("--context-parallel-size", "2")
    with pytest.warns(ContextParallelWarning, match="--use-flash-attn is switched on"):
        _, setup = validate(args, world_size=2)
    assert args.use_flash_attn is setup.use_flash_attn is True and not setup.asked_for_flash
    assert setup_from_args(parse("--use-flash-attn")).asked_for_flash


def test_unaligned_with_kv_cache_falls_back_and_names_both_flags():
    args = parse(
        *"--context-parallel-size 2 --gather-size-calculator dynamic --context-parallel-kv-cache-policy full "
        "--use-flash-attn".split()
    )
    with pytest.warns(
        ContextParallelWarning, match="--gather-size-calculator dynamic.*--context-parallel-kv-cache-policy full"
    ):
        _, setup = validate(args, world_size=2)
    assert args.gather_size_calculator == "default" and not setup.unaligned


def test_default_flags_warn_of_nothing(recwarn):
    args = parse()
    args.cp_comm_type = ["p2p"]
    validate(args, world_size=1)
    assert not [warning for warning in recwarn if issubclass(warning.category, ContextParallelWarning)]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:Calculator", "cannot be imported"),
        ("argparse:Namespace", "must be a class with a method calculate"),
    ],
)
def test_own_calculator_is_checked_before_training(name, says):
    args = parse("--context-parallel-size", "2", "--gather-size-calculator", name)
    with pytest.raises(ValueError, match=f"--gather-size-calculator {name} {says}.*choose default or dynamic"):
        validate(args, world_size=2)


def test_own_calculator_is_accepted():
    args = parse(
        "--context-parallel-size",
        "2",
        "--use-flash-attn",
        "--gather-size-calculator",
        "mindspeed_cp:DynamicGatherSizeCalculator",
    )
    assert validate(args, world_size=2)[1].unaligned


def test_arguments_in_a_checkpoint_are_read_back_as_plain_values(tmp_path):
    """Megatron saves its namespace, and from 0.17 on reads it without executing anything."""
    args = parse("--context-parallel-size", "2", "--context-parallel-algo", "megatron_cp_algo")
    torch.save(vars(args), tmp_path / "common.pt")
    assert torch.load(tmp_path / "common.pt", weights_only=True) == vars(args)
    assert args.cp_given == ["context_parallel_algo", "context_parallel_size"]
