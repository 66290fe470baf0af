"""What the planner reads and writes besides flags: documents, measured clusters, a picture."""

import json
import re
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from mindspeed_cp import ContextParallelConfig
from mindspeed_cp.plan import main
from mindspeed_cp.planner import calibrate, given
from mindspeed_cp.planner.cluster import CLUSTERS, Cluster
from mindspeed_cp.planner.documents import boundaries, read_lengths
from mindspeed_cp.planner.timing import timed
from mindspeed_cp.planner.trace import Problem

ROOT = Path(__file__).resolve().parents[2]
LAYER = ["--model", "gpt3-1.3b", "--cp", "4", "--cluster", "a100"]


def write_index(path, lengths, count=None):
    """An index as Megatron writes it."""
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(lengths) if count is None else count, len(lengths) + 1)
    places = np.arange(2 * len(lengths) + 1, dtype="<i8")  # of sequences, then numbers of documents
    path.write_bytes(head + np.array(lengths, dtype="<i4").tobytes() + places.tobytes())
    return str(path)


def test_lengths_of_a_dataset_are_read(tmp_path):
    path = write_index(tmp_path / "data.idx", [5, 0, 7, 3])
    assert read_lengths(path).tolist() == [5, 7, 3]
    ends = boundaries(path, 64)
    assert ends[0] == 0 and ends[-1] == 64 and {b - a for a, b in zip(ends, ends[1:-1])} <= {5, 7, 3}


def test_a_dataset_that_the_projects_own_script_wrote_is_read(tmp_path):
    from trainer_runs import prepare_data

    lengths = read_lengths(prepare_data(tmp_path) + ".idx")
    assert len(lengths) > 50 and lengths.sum() > 100_000


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: path.write_bytes(b"nothing of the kind, but long enough for one"), "wrong magic"),
        (lambda path: write_index(path, [5], count=9), "is truncated"),
        (lambda path: write_index(path, [0]), "counts no documents"),
        (lambda path: None, "cannot be read"),
    ],
)
def test_what_is_no_index_is_said(damage, words, tmp_path):
    damage(tmp_path / "data.idx")
    with pytest.raises(ValueError, match=words):
        read_lengths(str(tmp_path / "data.idx"))


@pytest.mark.parametrize(
    "source", ["lognormal", "lognormal:1", "normal:1,2", "uniform:-1,5", "pareto:a,b", "uniform:nan,inf"]
)
def test_an_unknown_distribution_names_those_that_are_known(source):
    with pytest.raises(ValueError, match=f"--documents {source} is not known; give the .idx .* lognormal:6.5,1.3"):
        boundaries(source, 64)


def test_lengths_beyond_all_bounds_fill_the_row():
    assert boundaries("lognormal:1000,1.3", 64) == (0, 64)


def test_every_row_of_a_micro_batch_has_documents_of_its_own():
    first, second = boundaries("uniform:10,100", 512, rows=2)
    assert first[0] == second[0] == 0 and first[-1] == second[-1] == 512 and first != second


def test_rows_packed_by_length_hold_documents_of_about_one_length():
    row, mixed = boundaries("lognormal:4,1.3", 4096, by_length=True), boundaries("lognormal:4,1.3", 4096)
    for ends in (row, mixed, *boundaries("pareto:100,0.9", 512, rows=2, by_length=True)):
        assert ends[0] == 0 and ends[-1] in (512, 4096) and all(a < b for a, b in zip(ends, ends[1:]))
    spread = [np.diff(ends[:-1]).std() / np.diff(ends[:-1]).mean() for ends in (row, mixed)]
    assert spread[0] < 0.5 * spread[1]


def test_packing_takes_time_in_proportion_to_the_documents():
    start = time.process_time()
    row = boundaries("uniform:64,512", 1 << 22, by_length=True)
    assert len(row) > 10_000 and time.process_time() - start < 20  # 100 s if every document adds up all before it


def test_packing_without_documents_is_an_error(capsys):
    assert main("--model llama2-7b --cp 2 --seq-length 1k --pack".split()) != 0
    assert "--pack distributes documents over rows, and there are none; add --documents" in capsys.readouterr().err


def test_documents_favour_the_balanced_layout_which_sends_less():
    problem = Problem(8192, 16, 16, 128, 128, cu_seqlens=boundaries("pareto:100,0.9", 8192))
    setting = {"context_parallel_size": 4, "algorithm": "megatron_cp_algo", "kv_exchange": "direct"}
    balanced, zigzag, auto = (
        timed(ContextParallelConfig(**setting, batch_layout=layout), problem, CLUSTERS["a100"])
        for layout in ("balanced", "zigzag", "auto")
    )
    whole = timed(ContextParallelConfig(**setting | {"kv_exchange": "ring"}), problem, CLUSTERS["a100"])
    assert balanced.compute < 0.95 * zigzag.compute and balanced.intra_bytes < 0.95 * whole.intra_bytes
    assert (auto.compute, auto.intra_bytes) == (balanced.compute, balanced.intra_bytes)


def test_a_window_is_planned_with_the_work_and_the_bytes_of_its_rows(capsys):
    arguments = ["--model", "gpt3-125m", "--cp", "4", "--seq-length", "8k", "--cluster", "a100", "--json"]
    found = []
    for more in ([], ["--window", "1k"]):
        assert main([*arguments, *more]) == 0
        every = json.loads(capsys.readouterr().out)["candidates"]
        found.append(next(each for each in every if each["setting"].startswith("Ring") and "direct" in each["setting"]))
    whole, windowed = found
    # Pairs of query and key: all that precede, or 1,024 of them.
    assert windowed["compute_seconds"] < 0.4 * whole["compute_seconds"]
    # A chunk needs the one before it, and none is forwarded.
    assert windowed["intra_bytes"] < 0.7 * whole["intra_bytes"]


def test_a_calibration_is_read_back_and_plans(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "kernel_rate", lambda device, seq: {256: 1e10, 2048: 2e10}[seq])
    monkeypatch.setattr(calibrate, "product_rate", lambda device, rows: 5e10)
    monkeypatch.setattr(calibrate, "memory_rate", lambda device: 4e9)
    monkeypatch.setattr(calibrate, "memory_of", lambda device: 8e9)
    monkeypatch.setattr(calibrate.self_test, "run", lambda device, world: {"ranks": world, "rates": {"ring": 1e9}})
    path = str(tmp_path / "here.yaml")
    assert main(["--calibrate", path]) == 0
    assert "here.yaml): of 0.05 TFLOP/s large products reach 100%, attention 47%" in capsys.readouterr().out
    found = calibrate.read_cluster(path)
    rates = [2048 / found.attention_seconds(2048, tokens, 128) for tokens in (256, 2048)]
    assert rates == pytest.approx([1e10, 2e10])  # the curve goes through what was measured
    assert found.product_seconds(5e10, 128, 4096) == pytest.approx(1) and found.half_rows == 0
    assert (found.links, found.memory, found.memory_bandwidth, found.intra_bandwidth) == (1, 8e9, 4e9, 1e9)
    assert main([*LAYER[:4], "--cluster", path, "--seq-length", "2048"]) == 0


@pytest.mark.parametrize("page", ["docs/choosing.md", "docs/zh-CN/choosing.md"])
def test_every_preset_has_its_source_in_the_docs(page):
    rows = dict(re.findall(r"^\| (\S+) \|(.*)$", (ROOT / page).read_text(encoding="utf-8"), re.M))
    for name, cluster in CLUSTERS.items():
        assert f" {cluster.flops / 1e12:.4g}e12 |" in rows[name]
        assert "Ascend/msmodeling" in rows[name] or "arxiv.org" in rows[name] or "nvidia.com" in rows[name]
        assert f"{cluster.links} x {cluster.intra_bandwidth / 1e9:.0f} GB/s" in rows[name]
        assert f"| {cluster.memory / 1e9:.0f} GB |" in rows[name] and f"| {cluster.devices_per_node} |" in rows[name]
        assert f"| {cluster.inter_bandwidth / 1e9:.0f} GB/s |" in rows[name]


def test_this_machine_is_measured_where_it_is_named_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "measured", lambda device: Cluster(4, 2e10, 1e9, 1e9))
    arguments = [*LAYER[:4], "--seq-length", "2048", "--cluster", "this-machine", "--inter-bandwidth", "5e8"]
    assert main(arguments) == 0
    words = (
        "\nMeasured here, now: of 0.02 TFLOP/s large products reach 50%, attention 50%; 80% of 1 GB/s within and 0.5 "
    )
    assert words in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cluster"]["name"] == "this-machine"


def test_the_kernel_of_this_machine_has_a_rate():
    assert 1e8 < calibrate.kernel_rate("cpu") < 1e15


@pytest.mark.parametrize("text", ["flops: fast", "speed: 1", "- 1", "flops: 0\ndevices_per_node: 1", None])
def test_a_file_that_is_no_cluster_is_said(text, tmp_path):
    path = tmp_path / "cluster.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"--cluster .*cluster.yaml.*; choose one of ascend-910b, "):
        calibrate.read_cluster(str(path))


def test_the_picture_is_written(tmp_path, capsys):
    path = tmp_path / "plan.svg"
    few = ["--model", "gpt3-1.3b", "--cp", "2", "--cluster", "a100", "--seq-length", "512"]
    assert main([*few, "--plot", str(path)]) == 0
    text = path.read_text()
    assert "<svg" in text and path.stat().st_size > 10_000
    assert main([*few, "--plot", str(tmp_path / "none" / "plan.svg")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_what_a_plan_needs_is_named(capsys):
    assert main([]) == 2
    assert "--model, --hf-config or Megatron's flags, --seq-length not given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "preset", "words"),
    [
        (None, "ascend-910b", "no accelerator is here"),
        ("Ascend910B2", "ascend-910b", "Ascend910B2 is here"),
        ("NVIDIA H100 80GB HBM3", "h100", "NVIDIA H100 80GB HBM3 is here"),
        ("NVIDIA L40S", "ascend-910b", "NVIDIA L40S, which is here, is not a preset: give --flops"),
    ],
)
def test_the_cluster_may_be_left_out_and_the_first_line_says_which_is_taken(device, preset, words, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "device_here", lambda: device)
    assert main([*LAYER[:4], "--seq-length", "2k"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"Planned for {preset}: --cluster is not given, and ") and words in first


def test_memory_is_a_number_of_bytes(capsys):
    arguments = ["--model", "gpt3-125m", "--devices", "2", "--seq-length", "512", "--cluster", "a100"]
    assert main([*arguments, "--memory", "80"]) == 0
    assert "--memory 80 is read as 80 GB." in capsys.readouterr().out
    for memory in ("nan", "0.5"):
        assert main([*arguments, "--memory", memory]) == 2
        assert f"--memory {memory} must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64e9", 64e9),
        ("64GB", 64e9),
        ("80GiB", 80 * 2**30),
        ("320T", 320e12),
        ("989 TFLOPS", 989e12),
        ("25GB/s", 25e9),
        ("200Gbit/s", 25e9),
        ("10us", 1e-5),
        ("1.5ms", 1.5e-3),
        ("0.5", 0.5),
    ],
)
def test_quantities_have_units(text, value):
    assert given.quantity(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "GB", "64XB", "64gb", "1,5GB"])
def test_a_quantity_that_is_none_is_named_with_the_way_to_write_it(text, capsys):
    with pytest.raises(SystemExit):
        main(["--memory", text])
    assert f"argument --memory: {text!r} is not a number with a unit; write 64GB" in capsys.readouterr().err
