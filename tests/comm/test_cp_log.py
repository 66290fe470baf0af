"""--cp-log: bytes, waits and imbalance in the log of the embedded trainer and of Megatron's training."""

import inspect
import io
import json
import re
import sys
import time
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from kept_groups import of_megatron
from trainer_runs import IMPORTED, prepare_data, tiny

from mindspeed_cp.comm import meter as meter_module
from mindspeed_cp.comm.link import Link
from mindspeed_cp.comm.meter import Watch, measuring, wait_for
from mindspeed_cp.comm.step_log import Imbalance, IntervalFigures
from mindspeed_cp.patches.training import train_step, training_log

pytestmark = pytest.mark.cpu_only
RING = "--context-parallel-size 2 --context-parallel-algo megatron_cp_algo --train-iters 4 --log-interval 2"
ULYSSES = RING.replace("megatron_cp_algo", "ulysses_cp_algo")
CASES = {
    "off": RING,
    "ring": f"{RING} --cp-log",
    "ulysses": f"{ULYSSES} --cp-log",
    "contiguous": f"{RING} --cp-batch-layout contiguous --cp-log",
    "late": f"{RING} --global-batch-size 1 --cp-log",
    **{
        layout: f"{RING} --seq-length 512 --reset-attention-mask --cp-batch-layout {layout} --cp-log"
        for layout in ("zigzag", "balanced")
    },
}
DELAY = 0.03  # seconds that rank 1 sleeps before each of its messages, in the case "late"
LINE = re.compile(
    r"step +(\d+)  context parallelism of (\d+) steps: rank 0 sent (.+) bytes \| waited ([\d.]+) ms a step, ([\d.]+)% "
    r"of it \| largest over mean wait ([\d.]+), rank (\d) waits least \| largest over mean attention area ([\d.]+)\n"
)
FIGURES = IntervalFigures(10, {"kv": 300, "dkv": 150}, 4.0, 1.0, Imbalance(1.5, 3), Imbalance(1.25, 0))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Name of the case -> (records, what rank 0 printed, TensorBoard's names)."""
    folder = tmp_path_factory.mktemp("runs")
    prefix = prepare_data(folder, "paragraphs")
    cases = {name: tiny(prefix, f"{flags} --tensorboard-dir {folder / name}") for name, flags in CASES.items()}
    return run_ranks(2, _run, cases, fresh=True, imported=IMPORTED)[0]


def _run(rank, cases):
    from trainer.arguments import parse_args
    from trainer.loop import pretrain

    results, groups = {}, of_megatron()
    for name, argv in cases.items():
        text, written = io.StringIO(), []
        board = SimpleNamespace(SummaryWriter=partial(_Writer, written))
        with (
            redirect_stdout(text),
            _late() if name == "late" and rank == 1 else nullcontext(),
            patch.dict(sys.modules, {"torch.utils.tensorboard": board}),
            groups.reused(),
        ):
            records = pretrain(parse_args(argv, world_size=2))
        results[name] = records, text.getvalue(), written
    return results


@contextmanager
def _late():
    post = Link.post

    def late(self, *args, **kwargs):
        time.sleep(DELAY)
        return post(self, *args, **kwargs)

    with patch.object(Link, "post", late):
        yield


class _Writer:
    """TensorBoard's, as far as it is used."""

    def __init__(self, written, folder=""):
        self.written = written

    def add_scalar(self, *scalar):
        self.written.append(scalar)

    def close(self):
        pass


def lines(text):
    """The fields of every line of --cp-log."""
    return [match.groups() for match in LINE.finditer(text)]


@pytest.mark.parametrize("name", ["ring", "ulysses"])
def test_the_bytes_of_the_line_are_those_that_were_counted(runs, name):
    records, text, written = runs[name]
    found = lines(text)
    assert [(int(step), int(steps)) for step, steps, *_ in found] == [(2, 2), (4, 2)]
    for step, _, sent, *_ in found:
        said = {purpose: int(size) for purpose, size in (part.split() for part in sent.split(", "))}
        traffic = [record["cp_bytes_of_rank_0"] for record in records[int(step) - 2 : int(step)]]
        assert said == {purpose: sum(step[purpose] for step in traffic) for purpose in traffic[0]}
        assert said == records[int(step) - 1]["context_parallelism"]["bytes"]
        scalars = {name: value for name, value, iteration in written if iteration == int(step)}
        assert {purpose: 2 * scalars[f"context-parallel/{purpose} bytes"] for purpose in said} == said


def test_a_ring_that_cuts_in_a_zigzag_is_even_and_one_that_cuts_in_two_is_not(runs):
    assert {fields[-1] for fields in lines(runs["ring"][1])} == {"1.00"}
    areas = 32 * 33 / 2, 32 * 33 / 2 + 32 * 32  # of the first and the second half of 64 tokens
    assert {fields[-1] for fields in lines(runs["contiguous"][1])} == {f"{areas[1] * 2 / sum(areas):.2f}"}


def test_the_balanced_layout_of_packed_documents_is_even_in_every_step(runs):
    zigzag, balanced = ([float(fields[-1]) for fields in lines(runs[name][1])] for name in ("zigzag", "balanced"))
    assert min(zigzag) >= 1.1 and max(balanced) <= 1.05


@pytest.mark.parametrize("name", [name for name in CASES if name != "off"])
def test_waits_are_within_the_steps(runs, name):
    for record in runs[name][0][1::2]:
        figures = record["context_parallelism"]
        assert 0 < figures["wait_seconds"] <= figures["step_seconds"]
        assert 1 <= figures["waits"]["ratio"] <= 2


def test_a_late_rank_shows_as_waits_of_the_other(runs):
    for record, (*_, ratio, least, _) in zip(runs["late"][0][1::2], lines(runs["late"][1]), strict=True):
        figures = record["context_parallelism"]
        # In each of two layers the ring of two has one message forward, and two backward.
        assert figures["wait_seconds"] > 2 * 2 * 3 * DELAY * 0.8
        assert figures["wait_seconds"] > 0.2 * figures["step_seconds"]
        assert float(ratio) > 1.3 and least == "1"


def test_what_is_on_says_that_it_is_logged_and_off_says_nothing(runs):
    records, text, written = runs["off"]
    assert "zigzag, causal, kernel" in text and lines(text) == []
    assert all("context_parallelism" not in record for record in records)
    assert not [name for name, *_ in written if name.startswith("context-parallel/")]
    assert "zigzag, causal, logged, kernel" in runs["ring"][1]
    assert [record["loss"] for record in runs["ring"][0]] == [record["loss"] for record in records]


class _Work:
    def __init__(self, seconds=0.0):
        self.seconds, self.awaited = seconds, 0

    def wait(self):
        time.sleep(self.seconds)
        self.awaited += 1


def test_without_a_log_no_clock_is_read_and_no_area_is_computed(monkeypatch):
    def never():
        raise AssertionError("measured where nobody watches")

    monkeypatch.setattr(meter_module.time, "perf_counter", never)
    monkeypatch.setattr(torch.cuda, "Event", never)
    work = _Work()
    for device in ("cpu", "cuda"):
        wait_for(work, torch.device(device))
    meter_module.note_area(never)
    assert work.awaited == 2


def test_a_wait_of_the_cpu_takes_the_time_of_the_host():
    with measuring(Watch()) as watch:
        wait_for(_Work(0.02), torch.device("cpu"))
    seconds = watch.seconds
    wait_for(_Work(), torch.device("cpu"))  # nobody watches any more
    assert 0.02 <= seconds == watch.seconds


class _Event:
    """A device's event; time on its stream passes when the host says so."""

    now, ended = 0.0, 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = _Event.now

    def query(self):
        return self.at <= _Event.ended

    def synchronize(self):
        _Event.ended = max(_Event.ended, self.at)

    def elapsed_time(self, after):
        assert after.query()
        return after.at - self.at


class _WorkOnStream:
    def wait(self):
        _Event.now += 250.0  # milliseconds


def test_a_wait_of_an_accelerator_takes_the_time_of_its_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    with measuring(Watch()) as watch:
        for _ in range(3):
            wait_for(_WorkOnStream(), torch.device("cuda"))
            _Event.now += 1000.0  # computation, which hides what it can
    assert len(watch._on_stream) == 3
    _Event.ended = 250.0
    watch._collect()
    assert len(watch._on_stream) == 2  # what has ended is let go
    assert watch.seconds == pytest.approx(0.75)


def test_the_imbalance_is_that_of_the_most_uneven_group():
    assert Imbalance.of([[1], [1], [30], [10]], [[0, 1], [2, 3]]) == Imbalance(1.5, 3)
    assert Imbalance.of([[0], [0]], [[0, 1]]) == Imbalance(1.0, 0)


def test_uneven_steps_do_not_make_up_for_each_other():
    assert Imbalance.of([[30, 10], [10, 30]], [[0, 1]]) == Imbalance(1.5, 0)


def training_logs():
    """Version from which on it is so -> a function with the signature of Megatron's training_log."""
    table = json.loads(
        Path(__file__).resolve().parents[1].joinpath("helpers/megatron_signatures.json").read_text(encoding="utf-8")
    )
    known = table["patches"]["megatron.training.training.training_log"]["signatures"]
    return {version: eval(f"lambda {text[1:-1]}: iteration + 0.5") for version, text in known.items()}


class _Log:
    def __init__(self):
        self.steps = self.intervals = 0

    @contextmanager
    def step(self):
        yield
        self.steps += 1

    def interval(self):
        self.intervals += 1
        return FIGURES


@pytest.fixture
def megatron(monkeypatch):
    """A stand-in for megatron.training with --log-interval 5; what its writer gets."""
    written = []
    training = SimpleNamespace(
        get_args=lambda: SimpleNamespace(log_interval=5), get_tensorboard_writer=lambda: _Writer(written)
    )
    monkeypatch.setitem(sys.modules, "megatron.training", training)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    return written


@pytest.mark.parametrize("original", training_logs().values(), ids=training_logs())
def test_megatrons_training_logs_each_interval(original, megatron, capsys):
    names = [name for name, one in inspect.signature(original).parameters.items() if one.default is one.empty]
    state = SimpleNamespace(log=_Log(), told="what is on")
    for iteration in range(1, 11):
        found = train_step(state, lambda loss, **more: (loss, more), iteration, config=1)
        assert found == (iteration, {"config": 1})
        given = [iteration if name == "iteration" else None for name in names]
        assert training_log(state, original, *given) == iteration + 0.5
    assert (state.log.steps, state.log.intervals) == (10, 2)
    printed = capsys.readouterr().out.splitlines()
    # What is on stands once more under the first line.
    assert [line.partition(" | ")[0] for line in printed] == [" iteration 5", "what is on", " iteration 10"]
    assert "of 10 steps: rank 0 sent kv 300, dkv 150 bytes | waited 100.0 ms a step, 25.0% of it" in printed[0]
    assert [scalar for scalar in megatron if scalar[2] == 10] == [
        ("context-parallel/kv bytes", 30.0, 10),
        ("context-parallel/dkv bytes", 15.0, 10),
        ("context-parallel/wait seconds", 0.1, 10),
        ("context-parallel/wait share", 0.25, 10),
        ("context-parallel/wait imbalance", 1.5, 10),
        ("context-parallel/area imbalance", 1.25, 10),
    ]


def test_megatrons_training_says_nothing_without_the_flag(megatron, capsys):
    assert train_step(SimpleNamespace(log=None), lambda loss: loss, 3) == 3
    assert training_log(SimpleNamespace(log=None), lambda iteration: iteration + 0.5, 5) == 5.5
    assert (capsys.readouterr().out, megatron) == ("", [])
