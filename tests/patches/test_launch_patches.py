"""The patches for a checkout, on stand-ins for megatron.training: no Megatron-LM needed. And the runner of unchanged
scripts.
"""

import argparse
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.patches import losses, training

REPOSITORY = Path(__file__).resolve().parents[2]


def flags(*given, **more):
    """A namespace as Megatron's parser makes it, with the flags that the adaptor adds."""

    def megatron(parser):
        for name in (
            "num-layers",
            "num-attention-heads",
            "seq-length",
            "tensor-model-parallel-size",
            "pipeline-model-parallel-size",
        ):
            parser.add_argument(f"--{name}", type=int, default=1)
        parser.add_argument("--context-parallel-size", type=int, default=1)
        for name in (
            "sequence-parallel",
            "use-legacy-models",
            "reset-position-ids",
            "reset-attention-mask",
            "use-flash-attn",
        ):
            parser.add_argument(f"--{name}", action="store_true")
        return parser

    parser = training.add_megatron_arguments(None, megatron, argparse.ArgumentParser())
    args = parser.parse_args("--num-layers 2 --num-attention-heads 8 --seq-length 61".split() + list(given))
    defaults = dict(
        world_size=args.context_parallel_size,
        ckpt_format="torch",
        max_position_embeddings=61,
        encoder_seq_length=None,
        decoder_seq_length=None,
        distributed_backend="gloo",
    )
    for name, value in {**defaults, **more}.items():
        setattr(args, name, value)
    return args


def as_megatron_checks(args, defaults=None):
    """The assertions of every version's validate_args that concern context parallelism."""
    if args.context_parallel_size > 1:
        assert args.seq_length % (2 * args.context_parallel_size) == 0
        assert not args.use_legacy_models
    assert args.max_position_embeddings >= args.seq_length
    args.encoder_seq_length = args.seq_length
    return args


def test_uneven_length_and_legacy_models_pass_and_stay_as_given():
    state, args = (
        Adaptor(),
        flags("--context-parallel-size", "4", "--context-parallel-algo", "megatron_cp_algo", "--use-legacy-models"),
    )
    with pytest.warns(UserWarning, match="--use-flash-attn is switched on"):
        assert training.validate_args(state, as_megatron_checks, args, {}) is args
    assert (args.seq_length, args.encoder_seq_length, args.max_position_embeddings, args.decoder_seq_length) == (
        61,
        61,
        61,
        None,
    )
    assert args.use_legacy_models and args.use_flash_attn
    assert state.config.algorithm == "megatron_cp_algo" and state.config.context_parallel_size == 4


def test_megatrons_other_assertions_still_hold():
    args = flags(
        "--context-parallel-size", "4", "--context-parallel-algo", "megatron_cp_algo", max_position_embeddings=60
    )
    with pytest.raises(AssertionError):
        training.validate_args(Adaptor(), as_megatron_checks, args)


def test_without_context_parallelism_the_original_gets_what_it_got():
    state, args, seen = Adaptor(), flags(), []
    before = dict(vars(args))
    assert training.validate_args(state, lambda *a, **k: seen.append((a, k)) or "result", args, {"x": 1}) == "result"
    assert seen == [((args, {"x": 1}), {})] and vars(args) == before and state.config is None


@pytest.mark.parametrize(
    "given, words",
    [
        ("--context-parallel-size 3 --context-parallel-algo ulysses_cp_algo", "--num-attention-heads 8"),
        ("--context-parallel-size 2 --context-parallel-algo hybrid_cp_algo", "--ulysses-degree-in-cp"),
        (
            "--context-parallel-size 2 --context-parallel-algo megatron_cp_algo --use-legacy-models",
            "--ckpt-format torch_dist",
        ),
    ],
    ids=["heads", "degree", "legacy checkpoint"],
)
def test_a_broken_rule_is_one_line_and_status_2(given, words, capsys):
    args = flags(*given.split(), ckpt_format="torch_dist")
    with pytest.raises(SystemExit) as stop:
        training.validate_args(Adaptor(), as_megatron_checks, args)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.count("\n") == 1 and words in text


RING_OF_2 = "--context-parallel-size 2 --context-parallel-algo megatron_cp_algo"


@pytest.mark.parametrize(
    "more, words",
    [
        ({"transformer_impl": "transformer_engine"}, "is not installed; use --transformer-impl local"),
    ],
    ids=["no Transformer Engine"],
)
def test_what_cannot_work_is_refused_with_a_way_out(more, words, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        training.validate_args(Adaptor(), as_megatron_checks, flags(*RING_OF_2.split(), **more))
    assert stop.value.code == 2 and words in capsys.readouterr().err
    # Without context parallelism it is Megatron's own matter.
    assert training.validate_args(Adaptor(), as_megatron_checks, flags(**more))


def test_dynamic_context_parallelism_takes_the_algorithm_at_size_1_too():
    state, given = Adaptor(), flags("--context-parallel-algo", "megatron_cp_algo", hybrid_context_parallel=True)
    training.validate_args(state, as_megatron_checks, given)
    assert (state.config.algorithm, state.config.context_parallel_size) == ("megatron_cp_algo", 1)


@pytest.mark.parametrize("more", [{"spec": ["a", "b"]}, {"transformer_impl": "local"}, {"installed": True}], ids=str)
def test_transformer_engine_is_asked_for_where_it_is_used_and_missing(more, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", object() if more.get("installed") else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    args = flags(*RING_OF_2.split(), **{"transformer_impl": "transformer_engine", **more})
    assert training.validate_args(Adaptor(), as_megatron_checks, args)


def test_resetting_flags_ask_for_documents_from_position_ids():
    state = Adaptor()
    ring = "--context-parallel-size 2 --context-parallel-algo megatron_cp_algo"
    args = flags(*f"{ring} --reset-position-ids --reset-attention-mask".split())
    training.validate_args(state, as_megatron_checks, args)
    assert state.settings.documents_from_position_ids


def test_resetting_the_mask_alone_asks_the_tokenizer_for_the_end_of_a_document(monkeypatch):
    state, tokenizer = Adaptor(), SimpleNamespace(get_tokenizer=lambda: SimpleNamespace(eod=7))
    args = flags(*"--context-parallel-size 2 --context-parallel-algo megatron_cp_algo --reset-attention-mask".split())
    training.validate_args(state, as_megatron_checks, args)
    assert not state.settings.documents_from_position_ids
    monkeypatch.setitem(sys.modules, "megatron.training", tokenizer)  # Megatron makes it after the flags
    assert state.settings.end_of_document() == 7


def test_flags_are_as_given_again_when_megatrons_validation_raises():
    args = flags(*"--context-parallel-size 4 --context-parallel-algo megatron_cp_algo --use-legacy-models".split())

    def fails(args):
        raise AssertionError("something else")

    with pytest.raises(AssertionError, match="something else"), pytest.warns(UserWarning):
        training.validate_args(Adaptor(), fails, args)
    assert (args.seq_length, args.max_position_embeddings, args.use_legacy_models) == (61, 61, True)


def test_a_length_that_leaves_ranks_without_tokens_is_refused_before_the_start(capsys):
    ring = "--context-parallel-size 4 --context-parallel-algo megatron_cp_algo --use-flash-attn"
    args = flags(*ring.split(), seq_length=3)
    with pytest.raises(SystemExit):
        training.validate_args(Adaptor(), as_megatron_checks, args)
    assert "3 tokens leaves context-parallel rank 3 of 4 without any" in capsys.readouterr().err


def test_stages_between_the_first_and_the_last_are_said_to_get_no_mask():
    ring = "--context-parallel-size 2 --context-parallel-algo megatron_cp_algo --use-flash-attn --reset-attention-mask"
    for stages, warned in (("2", 0), ("3", 1)):
        args = flags(*ring.split(), "--pipeline-model-parallel-size", stages, world_size=2 * int(stages))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training.validate_args(Adaptor(), as_megatron_checks, args)
        assert sum("more than two pipeline stages" in str(entry.message) for entry in caught) == warned


def test_documents_without_a_mask_are_said_to_differ_from_megatrons_own_size_1():
    documents = (
        "--context-parallel-algo megatron_cp_algo --reset-position-ids --reset-attention-mask --use-flash-attn".split()
    )
    for size, mask, warned in (("2", False, 1), ("2", True, 0), ("1", False, 0)):
        args = flags("--context-parallel-size", size, *documents, create_attention_mask_in_dataloader=mask)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training.validate_args(Adaptor(), as_megatron_checks, args)
        messages = [
            str(entry.message) for entry in caught if "--no-create-attention-mask-in-dataloader" in str(entry.message)
        ]
        assert len(messages) == warned, (size, mask, messages)
    args = flags(
        "--context-parallel-size", "2", *documents[:2], "--use-flash-attn", create_attention_mask_in_dataloader=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training.validate_args(Adaptor(), as_megatron_checks, args)


def test_loss_of_unequal_counts_is_the_mean_over_all_tokens(monkeypatch):
    # Two ranks with 3 and 1 tokens; Megatron divides each loss by the rank's own count and averages over the ranks.
    counts, sums = (torch.tensor(3), torch.tensor(1)), (torch.tensor(6.0), torch.tensor(10.0))
    scope = SimpleNamespace(size=2, group=None)
    monkeypatch.setattr(losses.dist, "all_reduce", lambda total, group: total.copy_(sum(counts)))
    shares = []
    for count, value in zip(counts, sums):
        scaled, num_tokens, report = losses._weighted(scope, value, count, "report")
        assert num_tokens is count and report == "report"
        shares.append(scaled / num_tokens.clamp(min=1))
    assert float(sum(shares)) / 2 == pytest.approx((6.0 + 10.0) / 4)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "mindspeed_cp.run", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
    )


def test_runner_gives_the_script_its_own_surroundings(tmp_path):
    (tmp_path / "neighbour.py").write_text("VALUE = 7\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, neighbour\nassert __name__ == '__main__' and sys.modules['__main__'].neighbour is neighbour\n"
        "assert 'mindspeed_cp.megatron_adaptor' in sys.modules\n"
        "print(sys.argv[1:], os.path.basename(sys.argv[0]), os.path.dirname(__file__) == sys.path[0], "
        "neighbour.VALUE)\n"
        "sys.exit(5)\n"
    )
    result = run(script, "--flag", "value")
    assert result.returncode == 5, result.stderr
    assert result.stdout.splitlines()[-1] == "['--flag', 'value'] script.py True 7"


def test_spawned_processes_get_the_adaptor_too(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "def ask(queue):\n    queue.put('mindspeed_cp.megatron_adaptor' in sys.modules)\n"
        "if __name__ == '__main__':\n    context = multiprocessing.get_context('spawn')\n    queue = context.Queue()\n"
        "    child = context.Process(target=ask, args=(queue,))\n    child.start()\n    print(queue.get(timeout=100))\n"
    )
    result = run(script)
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "True", result.stderr


@pytest.mark.parametrize(
    "arguments, status, words",
    [((), 2, "with context parallelism"), (("--help",), 0, "usage"), (("nowhere.py",), 2, "nowhere.py does not exist")],
    ids=["nothing", "help", "missing"],
)
def test_runner_says_what_it_wants(arguments, status, words):
    result = run(*arguments)
    assert result.returncode == status and words in result.stdout + result.stderr
