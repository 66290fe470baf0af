"""Every flag of the embedded trainer refuses nonsense in one line with flag, value, rule and way out, and status 2."""

import argparse
import re
import sys

import pytest
from bench import measuring
from trainer.arguments import build_parser, parse_args
from trainer.failures import readable_flags
from trainer.rules import HelpFormatter
from trainer_files import write_checkpoint, write_dataset

from mindspeed_cp.planner import given

pytestmark = pytest.mark.cpu_only
TEXT = ["a", "", "nan", "1.5", "1e3", "[1]"]
FROM_ONE, FROM_ZERO = ["0", "-2", *TEXT], ["-1", *TEXT]
REAL = ["a", "", "nan", "inf", "-inf", "-1", "-1e-3", "1,2"]
ABOVE_ZERO, BELOW_ONE = [*REAL, "0"], [*REAL, "1", "1.5"]
CHOICE = ["a", "", "0", "--"]
BELOW_A_FILE = "a_file/folder"  # no folder can be made here, not even by root

# Flag -> values that mean nothing. A new flag belongs here, or test_every_flag_has_nonsense is red.
NONSENSE = {
    **dict.fromkeys(("--cp-topology", "--cp-mla-exchange", "--cp-linear-exchange"), CHOICE),
    **dict.fromkeys(("--cp-in-flight", "--cp-ulysses-chunks"), FROM_ONE),
    "--cp-trust": ["", " ", ","],
    **dict.fromkeys(
        (
            "--num-layers", "--hidden-size", "--ffn-hidden-size", "--num-attention-heads", "--kv-channels",
            "--num-query-groups", "--seq-length", "--max-position-embeddings", "--rotary-base", "--micro-batch-size",
            "--global-batch-size", "--train-iters", "--lr-decay-iters", "--recompute-num-layers",
            "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--make-vocab-size-divisible-by",
            "--save-interval", "--keep-last", "--exit-interval", "--eval-interval", "--log-interval",
        ),
        [*FROM_ONE, "99999999999"],
    ),
    **dict.fromkeys(("--lr-warmup-iters", "--seed", "--eval-iters"), [*FROM_ZERO, "99999999999"]),
    **dict.fromkeys(("--context-parallel-size", "--cp-window-size", "--ulysses-degree-in-cp"), FROM_ONE),
    "--context-parallel-cache-interval": FROM_ZERO,
    "--fix-sub-seq-length": ["-2", *TEXT],
    "--num-virtual-stages-per-pipeline-rank": ["1", *FROM_ONE],
    **dict.fromkeys(("--max-seqlen-per-dp-cp-rank", "--cp-ranks-per-node"), FROM_ONE),
    "--vocab-size": ["1", "257", *FROM_ONE],
    "--rotary-percent": [*ABOVE_ZERO, "1.5"],
    **dict.fromkeys(("--norm-epsilon", "--init-method-std"), ABOVE_ZERO),
    "--distributed-timeout-minutes": [*ABOVE_ZERO, "1e9"],
    **dict.fromkeys(("--attention-dropout", "--hidden-dropout", "--adam-beta1", "--adam-beta2"), BELOW_ONE),
    **dict.fromkeys(("--lr", "--min-lr", "--weight-decay", "--clip-grad"), REAL),
    "--window-size": ["-5,0", "a", "1", "1,2,3", "1.5,0", "nan,0", "", ","],
    "--split": ["a", "", "-90,10,0", "0,0,0", "0,1,0", "nan,1,0", "90,10,0,0", "90;10", "1e3,1"],
    **dict.fromkeys(
        (
            "--position-embedding-type", "--normalization", "--lr-decay-style", "--recompute-granularity",
            "--recompute-method", "--context-parallel-algo", "--cp-attention-mask-type", "--cp-kv-exchange", "--cp-p2p",
            "--context-parallel-kv-cache-policy", "--cp-kernel", "--cp-batch-layout",
            "--sequence-packing-scheduler",
        ),
        CHOICE,
    ),
    "--gather-size-calculator": ["a", "", "no.module:Class", "a:b:c"],
    "--cp-config": ["no_such.yaml", "a_file", "."],
    "--data-path": ["no/such", "", " "],
    **dict.fromkeys(("--save", "--tensorboard-dir", "--data-cache-path"), ["", " ", "a_file", BELOW_A_FILE]),
    "--log-file": ["", ".", f"{BELOW_A_FILE}.jsonl"],
    "--load": ["", "no/such", "a_file", "."],
}  # fmt: skip
BASE = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --train-iters 8 --use-flash-attn"
NEEDS = {
    "--save-interval": "--save checkpoints",
    "--keep-last": "--save checkpoints",
    "--num-query-groups": "--group-query-attention",
    "--num-virtual-stages-per-pipeline-rank": "--pipeline-model-parallel-size 2",
    "--recompute-num-layers": "--recompute-granularity full",
    "--recompute-method": "--recompute-granularity full",
    "--context-parallel-cache-interval": "--context-parallel-kv-cache-policy full --context-parallel-size 2",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a dataset and a file of no use."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_bytes(b"\xff\xfe no text")
    write_dataset(tmp_path / "topics")
    return tmp_path


def with_values():
    """The flags that take a value, by their first name."""
    return {
        action.option_strings[0]: action
        for action in build_parser()._actions
        if action.option_strings and action.nargs != 0 and action.dest != "help"
    }


def refusal(argv, capsys, world_size=4):
    """The one line in which ``argv`` is refused."""
    with pytest.raises(SystemExit) as exit_, readable_flags():
        parse_args(["--data-path", "topics", *BASE.split(), *argv], world_size=world_size)
    line = capsys.readouterr().err
    assert exit_.value.code == 2
    assert line.startswith("pretrain_gpt.py: error: ") and line.count("\n") == 1 and line.endswith("\n"), line
    return line


def test_every_flag_has_nonsense():
    known = set(with_values())
    # A flag that comes with another part of the package may be listed before it is there.
    assert known <= set(NONSENSE) and set(NONSENSE) - known <= {"--cp-batch-layout", "--fix-sub-seq-length"}


def test_a_length_may_be_written_with_k_or_m_wherever_one_is_given():
    named = re.compile(r"--(?:seq-length|max-position-embeddings|max-seqlen.*|window|lengths)$")
    parsers = {
        "trainer": build_parser(), "planner": given.parser(), "bench": measuring.parser_of("", seq_length=8192),
    }  # fmt: skip
    for name, parser in parsers.items():
        flags = [flag for action in parser._actions for flag in action.option_strings if named.match(flag)]
        assert flags, name
        for flag in flags:
            found = vars(parser.parse_args([flag, "128k"]))
            assert found[flag.strip("-").replace("-", "_")] == 131072, (name, flag)


@pytest.mark.parametrize("flag", list(with_values()))
def test_nonsense_is_refused_in_one_line_with_flag_value_and_way_out(flag, folder, capsys):
    for value in NONSENSE[flag]:
        line = refusal([*NEEDS.get(flag, "").split(), flag, value], capsys)
        assert flag in line and (value.strip() in line), line
        assert ";" in line or "did you mean" in line, f"no way out: {line}"
        if f"; use {flag} " in line:  # what is offered is taken
            offered = re.search(rf"; use {flag} (.*?)\.\n", line).group(1).split(",  or ")[0]
            assert build_parser().parse_args([flag, offered])


def test_a_switch_takes_no_value(folder, capsys):
    switches = [action for action in build_parser()._actions if action.nargs == 0 and action.dest != "help"]
    for flag in (action.option_strings[0] for action in switches):
        assert f"{flag} takes no value" in refusal([f"{flag}=1"], capsys)
        assert "7 stands alone and belongs to no flag" in refusal([flag, "7"], capsys)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--lr", ["--lr needs a value"]),
        ("--num-layer 3", ["--num-layer is not a flag", "use --num-layers"]),
        ("--ffn-hidden-size 33 --tensor-model-parallel-size 2", ["--ffn-hidden-size 33", "use --ffn-hidden-size 34"]),
        ("--lr 1e-4 --min-lr 1e-3", ["--min-lr 0.001", "--lr 0.0001", "use --min-lr 0"]),
        ("--lr-warmup-iters 8", ["--lr-warmup-iters 8", "use --lr-warmup-iters 0"]),
        ("--recompute-granularity full --recompute-num-layers 9", ["--recompute-num-layers 9", "2 layers"]),
        ("--recompute-num-layers 1", ["--recompute-num-layers 1", "--recompute-granularity full"]),
        ("--recompute-method block --recompute-activations", ["--recompute-method block", "granularity full"]),
        ("--recompute-granularity full --recompute-activations", ["--recompute-activations", "leave one"]),
        ("--save-interval 2", ["--save-interval 2", "--save FOLDER"]),
        ("--seq-length 3 --context-parallel-size 4 --context-parallel-algo megatron_cp_algo", ["--seq-length 3", "8"]),
        ("--position-embedding-type rope --kv-channels 5", ["--kv-channels 4"]),
        (
            "--num-layers 4 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --seq-length 63 "
            "--global-batch-size 4",
            ["--num-virtual-stages-per-pipeline-rank 2", "--seq-length"],
        ),
        (
            "--num-layers 4 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
            "--global-batch-size 2",
            ["micro batches", "use --global-batch-size 4"],
        ),
        ("--eval-iters 2 --split 100,0,0", ["--split 100,0,0", "validation"]),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together_are_refused_in_one_line(flags, says, folder, capsys):
    line = refusal(flags.split(), capsys)
    assert all(part in line for part in says), line


def test_other_ranks_complain_later_than_rank_0_and_name_themselves(folder, capsys, monkeypatch):
    slept = []
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setattr("trainer.rules.time.sleep", slept.append)
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--lr", "nan"])
    assert capsys.readouterr().err.startswith("rank 2: pretrain_gpt.py: error: --lr nan") and slept


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("ending", "change", "says"),
    [
        (".idx", lambda data: b"", "is empty"),
        (".idx", lambda data: b"NOTANIDX" + data[8:], "wrong magic"),
        (".idx", lambda data: data[:20], "ends within its header"),
        (".idx", lambda data: data[:-9], "is truncated"),
        (".idx", lambda data: data[:9] + b"\x02" + data[10:], "version 2"),
        (".idx", lambda data: data[:17] + b"\x09" + data[18:], "type code 9"),
        (".bin", lambda data: data[:-1], "holds 199 bytes, and topics.idx counts 200"),
        (".bin", lambda data: b"", "holds 0 bytes"),
    ],
)
def test_a_damaged_dataset_is_named_with_what_is_wrong_and_since_when(ending, change, says, folder, capsys):
    damage(folder / f"topics{ending}", change)
    line = refusal([], capsys)
    assert f"topics{ending}" in line and says in line and "last changed 20" in line and "prepare_data.py" in line, line


def test_a_dataset_without_documents_and_one_of_another_vocabulary_are_refused(folder, capsys):
    damage(folder / "topics.bin", lambda data: b"\xff\x03" + data[2:])
    assert "--vocab-size 258 is too small" in (line := refusal([], capsys)) and "use --vocab-size 1024" in line
    write_dataset(folder / "topics", lengths=())
    assert "counts no documents" in refusal([], capsys)


def truncate_shard(newest):
    damage(newest / "__1_0.distcp", lambda data: data[:-7])


def remove_shard(newest):
    (newest / "__1_0.distcp").unlink()


def remove_record(newest):
    for name in ("checkpoint.json", "common.pt"):
        (newest / name).unlink()


def garble_record(newest):
    (newest / "checkpoint.json").write_text("{", encoding="utf-8")


def write_latest(text):
    return lambda newest: (newest.parent / "latest.txt").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (write_latest(""), "latest.txt is empty"),
        (write_latest("../../etc"), "is not a checkpoint"),
        (write_latest("iter_0000009"), "names iter_0000009, which does not exist"),
        (truncate_shard, "__1_0.distcp has "),
        (remove_shard, "__1_0.distcp is missing"),
        (remove_record, "is incomplete: its run ended while it was written"),
        (garble_record, "checkpoint.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_the_last_good_one(harm, says, folder, capsys):
    args = parse_args(["--data-path", "topics", *BASE.split()], world_size=4)
    good = write_checkpoint("ck", 2, args)
    newest = write_checkpoint("ck", 4, args)
    spoilt = write_checkpoint("ck", 3, args)
    damage(spoilt / ".metadata", lambda data: b"0" + data[1:])  # of the right size: only its bytes tell
    (newest.parent / "latest.txt").write_text("iter_0000004", encoding="utf-8")
    harm(newest)
    line = refusal(["--load", "ck"], capsys)
    assert says in line, line
    best = "iter_0000004" if "latest" in says or "not a checkpoint" in says or "names" in says else good.name
    assert f"echo {best} > ck/latest.txt" in line and "saved at 20" in line, line


def test_a_checkpoint_of_another_model_or_of_more_steps_is_refused(folder, capsys):
    args = parse_args(["--data-path", "topics", *BASE.split()], world_size=4)
    write_checkpoint("ck", 4, args)
    for flags, kept in (
        ("--hidden-size 64", "--hidden-size 32"),
        ("--num-layers 4", "--num-layers 2"),
        ("--swiglu --ffn-hidden-size 128", "no --swiglu"),
        ("--disable-bias-linear", "no --disable-bias-linear"),
    ):
        line = refusal(["--load", "ck", *flags.split()], capsys)
        assert flags.split()[0] in line and f"trained with {kept}" in line, line
    line = refusal(["--load", "ck", "--train-iters", "3"], capsys)
    assert "--train-iters 3" in line and "4 steps" in line


@pytest.mark.parametrize(
    "body", ["raise RuntimeError('two\\nlines')", "import sys; sys.exit(3)", "import no_such_part", "("]
)
def test_a_calculator_module_that_fails_or_leaves_is_refused_in_one_line(body, folder, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    (folder / "own_calculator.py").write_text(body, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "own_calculator", raising=False)
    flags = "--context-parallel-size 2 --gather-size-calculator own_calculator:Class"
    assert "--gather-size-calculator own_calculator:Class cannot be imported" in refusal(flags.split(), capsys)


@pytest.mark.parametrize("value", [b"[2]", b"{a: 2}", b"two", b"2.5", b"\xe9"])
def test_a_file_of_settings_with_other_than_numbers_is_refused_in_one_line(value, folder, capsys):
    (folder / "cp.yaml").write_bytes(b"parallel_config:\n  context_parallel: " + value + b"\n")
    assert "--cp-config cp.yaml" in refusal(["--cp-config", "cp.yaml"], capsys)


def test_the_same_command_starts_and_restarts(folder):
    argv = ["--data-path", "topics", *BASE.split(), "--save", "ck", "--load", str(folder / "ck")]
    assert parse_args(argv, world_size=4).resume is None
    write_checkpoint("ck", 2, args := parse_args(argv, world_size=4))
    assert parse_args(argv, world_size=4).resume.iteration == 2
    unfinished = write_checkpoint("ck", 4, args)
    (unfinished / "checkpoint.json").unlink()
    (unfinished / "common.pt").unlink()
    (folder / "ck/latest.txt").write_text("iter_0000002", encoding="utf-8")
    assert parse_args(argv, world_size=4).resume.iteration == 2


def test_a_checkpoint_of_the_first_version_without_a_record_is_taken(folder):
    argv = ["--data-path", "topics", *BASE.split(), "--load", "ck"]
    path = write_checkpoint("ck", 2, parse_args(argv[:-2], world_size=4))
    (path / "checkpoint.json").unlink()
    found = parse_args(argv, world_size=4).resume
    assert found.iteration == 2 and not found.files


def test_a_first_save_that_was_interrupted_leaves_the_folder_as_good_as_empty(folder):
    argv = ["--data-path", "topics", *BASE.split(), "--save", "ck", "--load", "ck"]
    path = write_checkpoint("ck", 2, parse_args(argv, world_size=4))
    for name in ("checkpoint.json", "common.pt"):
        (path / name).unlink()
    (folder / "ck/latest.txt").unlink()
    assert parse_args(argv, world_size=4).resume is None


def test_help_names_each_default_once_and_fits(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in text and "(default: False)" not in text and "checkpoints you trust" in text
    assert len(text.partition("Train a GPT")[0]) < 120
    formatter = HelpFormatter("pretrain_gpt.py")
    assert "(default: 0.02)" in text
    for action in with_values().values():
        line = formatter._get_help_string(action).lower()
        assert "(default:" not in line or line.count("default:") == 1, line


def test_help_of_argparse_would_name_defaults_twice():
    # What the formatter is there for: argparse's own adds "(default: None)" to a flag without one.
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ffn", help="default: four times the width")
    assert "(default: None)" in parser.format_help()


def test_a_length_may_be_written_as_4k():
    assert build_parser().parse_args(["--seq-length", "4k"]).seq_length == 4096
    assert build_parser().parse_args(["--seq-length", "1m"]).seq_length == 1 << 20
