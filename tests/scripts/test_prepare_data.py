"""A user's own text becomes a dataset, documents kept, and the README's commands train on it."""

import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pairs
import pytest
from compare_runs import main as compare_runs
from distributed import run_ranks
from trainer.files import check_dataset, end_of_document
from trainer.texts import bytes_encoder, documents, encoder_of, files_of, texts_of
from trainer_runs import IMPORTED, run_argvs

from mindspeed_cp.planner.documents import read_lengths

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.cpu_only


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"body": "drei vier"}\n\n{"body": ""}\n{"body": "fünf"}\n')
    (tmp_path / "folder" / "deep" / "c.txt").write_text("six")
    (tmp_path / "folder" / "readme.md").write_text("no text of ours")
    return tmp_path


def test_documents_are_files_and_lines_and_paragraphs_where_asked(texts):
    files = files_of([str(texts / name) for name in ("a.txt", "b.jsonl", "folder")])
    assert list(documents(texts_of(files, "body"), False)) == ["one\n\ntwo\n", "drei vier", "fünf", "six"]
    assert list(documents(texts_of(files, "body"), True))[:3] == ["one", "two\n", "drei vier"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda home: "nothing.txt", "nothing.txt does not exist"),
        (lambda home: "folder/readme.md", "neither .txt nor .jsonl"),
        (lambda home: (home / "empty").mkdir() or "empty", "folder without .txt or .jsonl"),
        (lambda home: (home / "x.jsonl").write_text('{"body": "a"}\n{"b": 1}\n') and "x.jsonl", "line 2 .* it has b"),
        (lambda home: (home / "x.jsonl").write_text("{no\n") and "x.jsonl", "line 1 is not JSON"),
        (lambda home: (home / "x.txt").write_bytes(b"ab\xff") and "x.txt", "not UTF-8 text .byte 2"),
    ],
)
def test_what_is_no_text_is_named_with_its_line(change, words, texts):
    name = str(texts / change(texts))
    with pytest.raises(ValueError, match=words):
        list(documents(texts_of(files_of([name]), "body"), False))


class FakeTokenizer:
    """Of the package tokenizers, which is not needed to test that it is asked."""

    @classmethod
    def from_file(cls, path):
        assert path.endswith("tokenizer.json")
        return cls()

    def get_vocab_size(self):
        return 70_000

    def token_to_id(self, name):
        return {"<end>": 7}[name]

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return types.SimpleNamespace(ids=[60_000 + len(word) for word in text.split()])


def test_a_tokenizer_on_disk_is_used_with_its_own_end(texts, monkeypatch):
    with pytest.raises(ValueError, match="is not a folder"):
        encoder_of(str(texts / "nothing"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        encoder_of(str(texts))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "tokenizers" or None)
    monkeypatch.setitem(sys.modules, "tokenizers", types.SimpleNamespace(Tokenizer=FakeTokenizer))
    (texts / "tokenizer.json").write_text("{}")
    encoder = encoder_of(str(texts))
    assert (encoder.eod, encoder.vocab_size) == (70_000, 70_001)  # without an end token one is added
    (texts / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    encoder = encoder_of(str(texts))
    assert (encoder.encode("ab abc"), encoder.eod, encoder.vocab_size) == ([60_002, 60_003], 7, 70_000)


def _written(rank, cases):
    """What prepare_data.py does with each line of flags: (status, what it prints, complains)."""
    import contextlib
    import io

    import prepare_data

    found = []
    for flags in cases:
        said, complained = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            status = prepare_data.main(flags)
        found.append((status, said.getvalue(), complained.getvalue()))
    return found


def test_own_text_becomes_a_dataset_and_the_demo_never_bears_its_name(texts):
    own, wrong = str(texts / "own"), str(texts / "b.jsonl")
    empty = texts / "empty.txt"
    empty.write_text(" \n")
    cases = [
        ["--input", str(texts / "a.txt"), wrong, "--json-key", "body", "--output", own],
        ["--output", wrong],
        ["--input", wrong, "--output", own],
        ["--input", str(empty), "--output", str(texts / "none")],
    ]
    ((made, named, keyless, hollow),) = run_ranks(1, _written, cases, fresh=True, imported=IMPORTED)
    assert made[0] == 0 and "own.idx: 3 documents, 26 tokens\n" in made[1] and "train on it with" in made[1]
    ends = [len(text.encode()) + 1 for text in ("one\n\ntwo\n", "drei vier", "fünf")]
    assert read_lengths(own + ".idx").tolist() == ends and end_of_document(own) == bytes_encoder().eod
    check_dataset(own, 258)
    assert named[0] == 2 and f"use --output {own[:-3]}b, and --input for your text" in named[2]
    assert keyless[0] == 2 and "has no text under --json-key text; it has body" in keyless[2]
    assert not list(texts.glob("*.part*"))  # and what was there before is whole
    assert hollow[0] == 2 and "every document is empty" in hollow[2] and not (texts / "none.idx").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "b.jsonl",
            r"is a .jsonl file, not the prefix of a dataset; make one .* --input \S*b.jsonl --output data/b, then",
        ),
        ("folder", r"is a folder, not the prefix of a dataset; make one of it .* --input \S*folder"),
        ("own.bin", r"is a .bin file, not the prefix of a dataset; use --data-path \S*own\."),
        ("nothing", r"nothing.bin does not exist; make it of your text .* --input FILE --output \S*nothing"),
    ],
)
def test_the_trainer_says_what_it_was_given(name, words, texts):
    (texts / "own.bin").touch()
    with pytest.raises(ValueError, match=words):
        check_dataset(str(texts / name), 258)


def test_a_note_that_names_no_end_is_an_error(texts):
    (texts / "own.json").write_text("{}")
    with pytest.raises(ValueError, match="own.json names no end-of-document token"):
        end_of_document(str(texts / "own"))


def users_text(folder):
    """The commands of the README, and what a user has: the text, the scripts."""
    lines = [{"text": f"Line {n} of a text that nobody else has, {n * n} words long."} for n in range(200)]
    (folder / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "scripts").symlink_to(ROOT / "scripts")
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(r"^```bash own-text\n(.*?)^```", page, re.M | re.S)[1]


def recorded(commands, folder):
    """The words of every command that bash would start, whose programs are replaced by one that writes them down."""
    (folder / "bin").mkdir()
    for name in ("python", "torchrun"):
        program = folder / "bin" / name
        program.write_text(f"#!/bin/bash\nprintf '%q ' {name} \"$@\" >> {folder}/words\necho >> {folder}/words\n")
        program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-ec", commands], cwd=folder, env=environment, check=True)
    return [shlex.split(line) for line in (folder / "words").read_text().splitlines()]


def test_the_readmes_three_commands_train_on_a_users_text_with_the_same_losses(tmp_path, capsys):
    """In forked ranks, which have imported everything; with --full as a user starts them."""
    commands = re.sub(r"\b(?=data/|runs/|my.jsonl)", f"{tmp_path}/", users_text(tmp_path))
    words = recorded(commands, tmp_path)
    assert [line[:2] for line in words] == [
        ["python", "scripts/prepare_data.py"], ["torchrun", "--nproc-per-node"], ["torchrun", "--nproc-per-node"],
        ["python", "scripts/compare_runs.py"],
    ]  # fmt: skip
    (made,) = run_ranks(1, _written, [words[0][2:]], fresh=True, imported=IMPORTED)[0]
    assert made[0] == 0
    for _, _, ranks, script, *flags in words[1:3]:
        assert script == "scripts/pretrain_gpt.py"
        (records,) = run_argvs(int(ranks), {"own text": flags}).values()
        assert len(records) == 5
    assert compare_runs(words[3][2:]) == 0
    assert (tmp_path / "runs" / "loss.png").stat().st_size > 5_000 and "cp=4" in capsys.readouterr().out


@pytest.mark.skipif(not pairs.whole(), reason="new processes for every rank: --full")
def test_the_readmes_three_commands_run_as_a_user_starts_them(tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "MINDSPEED_CP_DEVICE": "cpu"}
    command = ["bash", "-ec", users_text(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs" / "loss.png").stat().st_size > 5_000 and "cp=4" in done.stdout
    assert done.stdout.count("+-- context parallelism ---") == 1 and "documents kept apart (" in done.stdout
