"""The doctor on broken installations: every one is a problem or a warning, with a line that says what to do."""

import importlib.machinery
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mindspeed_cp
from mindspeed_cp.doctor import command, device, installed
from mindspeed_cp.doctor.finding import Finding, has_problem
from mindspeed_cp.patches import fit
from mindspeed_cp.patches.versions import DEFAULT, MEGATRONS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.cpu_only


def only(findings, level):
    (found,) = [finding for finding in findings if finding.level == level]
    return found


@pytest.fixture
def releases(monkeypatch):
    """package -> version that is installed, as a dict to change."""
    found = {"torch": "2.13.0+cpu", "torch_npu": "2.13.0"}
    monkeypatch.setattr(installed, "release", found.get)
    monkeypatch.setattr(installed, "ASCEND", ROOT / "no driver")
    return found


@pytest.fixture
def cann(tmp_path):
    (tmp_path / "ascend_toolkit_install.info").write_text("package_name=toolkit\nversion=8.5.0\n")
    return {"ASCEND_TOOLKIT_HOME": str(tmp_path)}


def test_a_torch_npu_of_another_torch_is_a_problem(releases, cann):
    assert not has_problem(installed.ascend(cann, False))
    assert "CANN 8.5.0" in [finding.text for finding in installed.ascend(cann, False)]
    releases["torch_npu"] = "2.7.1.post2"
    found = only(installed.ascend(cann, False), "problem")
    assert found.text == "torch_npu 2.7.1.post2 does not match torch 2.13.0+cpu"
    assert found.todo == "pip install torch==2.7.1"


def test_torch_npu_without_cann_is_a_problem_but_where_the_cpu_is_asked_for(releases):
    for broken in ({}, {"ASCEND_TOOLKIT_HOME": "/nowhere"}):
        found = only(installed.ascend(broken, False), "problem")
        assert "no CANN" in found.text and "set_env.sh" in found.todo and "MINDSPEED_CP_DEVICE=cpu" in found.todo
    assert not has_problem(installed.ascend({"MINDSPEED_CP_DEVICE": "cpu"}, False))
    assert not has_problem(installed.ascend({}, True))


def test_cann_without_torch_npu_is_a_problem(releases, cann):
    del releases["torch_npu"]
    assert only(installed.ascend(cann, False), "problem").todo.startswith("pip install torch_npu==2.13.0 ")


def test_a_torch_that_does_not_load_stops_the_checks_that_need_it(tmp_path):
    """As torch_npu without CANN does: torch loads every installed back end, and the doctor itself still starts."""
    (tmp_path / "torch.py").write_text(  # torch_npu sets the variable while it loads
        "import os\nprint('Warning')\nos.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'\n"
        "raise RuntimeError('Failed to load the backend extension: torch_npu.')"
    )
    (tmp_path / "torch_npu-2.13.0.dist-info").mkdir()
    (tmp_path / "torch_npu-2.13.0.dist-info" / "METADATA").write_text("Name: torch_npu\nVersion: 2.13.0\n")
    done = subprocess.run(
        [sys.executable, "-m", "mindspeed_cp.doctor", "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    (findings,) = json.loads(done.stdout)["sections"].values()
    assert findings[-1]["text"] == "torch does not load: Failed to load the backend extension: torch_npu."
    assert "set_env.sh" in findings[-1]["todo"]


@pytest.mark.parametrize(
    "version, level, text",
    [
        (DEFAULT, "ok", "installed"),
        ("0.99.0", "warning", "too new"),
        ("0.11.0", "problem", "too old"),
        ("0.15.0", "warning", "between the tried versions"),
    ],
)
def test_a_megatron_is_judged_by_the_table_of_versions(version, level, text):
    found = Finding(*fit.megatron_finding(version, "3.11", "installed"))
    assert (found.level, found.text.endswith(text)) == (level, True)
    assert found.todo.startswith(f"pip install megatron-core=={DEFAULT} ") or level == "ok"


def test_a_megatron_for_another_python_is_named():
    newest = MEGATRONS[-1].version
    found = Finding(*fit.megatron_finding(newest, "3.11.7", "installed"))
    assert found.level == "problem" and "for Python 3.12 to 3.13, and this is 3.11.7" in found.text
    assert found.todo == f"use Python 3.12 to 3.13, or pip install megatron-core=={DEFAULT}"
    assert fit.megatron_finding("0.12.1", "3.13", "installed")[0] == "warning"


def test_a_missing_megatron_says_what_to_install_for_this_python(monkeypatch):
    monkeypatch.setattr(fit, "core_folder", lambda: None)
    found = Finding(*fit.findings()[-1])
    assert found.level == "problem" and "no megatron.core" in found.text
    assert found.todo.startswith(f"pip install megatron-core=={DEFAULT}, or export PYTHONPATH=")
    assert fit.newest_for("3.9") == fit.newest_for("3.13") == DEFAULT


@pytest.mark.parametrize("torch, level", [(None, "problem"), ("2.5.1", "problem"), ("2.99.0", "warning")])
def test_a_torch_outside_the_table_is_named(torch, level):
    ((found, _, todo),) = fit.torch_findings(torch)
    assert found == level and todo.startswith("pip install torch==")


def test_the_megatron_that_an_import_would_find_is_the_one_that_is_judged(tmp_path, monkeypatch):
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise AssertionError('not imported')")
    (core / "package_info.py").write_text("__version__ = '0.99.0rc1'")
    (core.parent / "training").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "mindspeed_cp.patches.fit"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    level, text, _ = json.loads(done.stdout)[-1]
    assert (level, text) == ("warning", f"megatron-core 0.99.0, the checkout {tmp_path}: too new")


def test_a_stale_library_is_to_be_removed(tmp_path, monkeypatch):
    assert fit.helper_findings(tmp_path) == []
    other = tmp_path / "helpers_cpp.cpython-39-riscv64-linux-gnu.so"
    other.touch()
    ((level, text, _),) = fit.helper_findings(tmp_path)
    assert level == "note" and "another Python" in text
    with monkeypatch.context() as patch:
        patch.setattr(fit.shutil, "which", lambda tool: None)
        ((level, _, todo),) = fit.helper_findings(tmp_path)
    assert level == "problem" and todo.startswith("install make and g++")
    ours = tmp_path / f"helpers_cpp{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    ours.write_bytes(b"half a library")
    ((level, text, todo),) = fit.helper_findings(tmp_path)
    assert (level, todo) == ("problem", f"rm {ours}; Megatron compiles it again at the next start")
    assert "does not load" in text


def test_a_library_older_than_its_source_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "_why_not", lambda path: "")
    ours, source = tmp_path / f"helpers_cpp{importlib.machinery.EXTENSION_SUFFIXES[0]}", tmp_path / "helpers.cpp"
    ours.touch()
    assert fit.helper_findings(tmp_path) == []
    source.touch()
    os.utime(ours, (1, 1))
    assert "older than helpers.cpp" in fit.helper_findings(tmp_path)[0][1]


def record(**changes):
    row = {"target": "megatron.core.x", "reason": "r", "status": "applied"}
    other = {**row, "status": "no NPU is in use"}
    return {"imported_before": [], "patches": {"core": [row], "npu": [other, other]}} | changes


def test_patches_are_counted_with_the_reasons_of_those_that_are_not_applied(monkeypatch):
    monkeypatch.setattr(device, "ask", lambda *arguments: record())
    _, findings = device.adaptor()
    assert [finding.text for finding in findings] == [
        "patches of core: 1 of 1 applied",
        "patches of npu: 0 of 2 applied, 2 not needed: no NPU is in use",
    ]
    assert not has_problem(findings)


def test_a_checkout_whose_training_code_does_not_import_is_a_problem(monkeypatch):
    row = {"target": "megatron.training.x", "reason": "r"}
    rows = [{**row, "status": "applied"}, {**row, "status": "megatron.training cannot be imported: no 'override'"}]
    monkeypatch.setattr(device, "ask", lambda *arguments: record(patches={"training": rows}))
    found = only(device.adaptor()[1], "problem")
    assert "no 'override'" in found.text and "megatron.training" in found.todo


def test_megatron_that_python_imports_at_its_start_is_a_problem(monkeypatch):
    monkeypatch.setattr(device, "ask", lambda *arguments: record(imported_before=["megatron.core.models.gpt"]))
    found = only(device.adaptor()[1], "problem")
    assert "imported before the adaptor (megatron.core.models.gpt)" in found.text and "sitecustomize" in found.todo


@pytest.mark.parametrize(
    "error, todo",
    [
        ("PatchError: cannot patch megatron.core.a.b in megatron-core 0.99: no attribute", "try_megatron.sh"),
        (
            "ImportError: there is no megatron.core; run pip install megatron-core==0.16.1, or ...",
            "pip install megatron",
        ),
        ("SyntaxError", "python -m mindspeed_cp.megatron_adaptor"),
    ],
)
def test_an_adaptor_that_does_not_start_is_a_problem(monkeypatch, error, todo):
    def fails(*arguments):
        raise RuntimeError(error)

    monkeypatch.setattr(device, "ask", fails)
    found, (only_one,) = device.adaptor()
    assert found is None and only_one.level == "problem" and todo in only_one.todo


def test_every_kernel_is_the_chosen_one_or_has_its_reason(monkeypatch):
    from mindspeed_cp.kernels import KERNELS, cpu

    findings = list(device.kernels("cpu", "no accelerator can be used"))
    assert [re.search(rf"\b{name}\b", finding.text) is not None for name, finding in zip(KERNELS, findings[1:])]
    assert [finding.level for finding in findings[:2]] == ["ok", "ok"]
    monkeypatch.setattr(cpu, "unavailable", lambda: "no operator")
    assert only(device.kernels("cpu", ""), "problem").todo == "use --cp-kernel blockwise"


@pytest.mark.parametrize("level, status", [("problem", 1), ("warning", 0), ("ok", 0)])
def test_the_exit_status_and_the_last_line_tell_problems(monkeypatch, capsys, level, status):
    monkeypatch.setattr(command, "examine", lambda given: ({"Installed": [Finding(level, "text", "do this")]}, {}))
    assert command.main([]) == status
    shown = capsys.readouterr().out
    verdict, prove = shown.splitlines()[-2:]
    assert (verdict == "All is well.") == (level == "ok") and "   -> do this\n" in shown
    assert prove.endswith("python -m mindspeed_cp.prove SCRIPT ARGS")
    assert command.main(["--json"]) == status
    assert json.loads(capsys.readouterr().out)["healthy"] == (status == 0)


def test_a_launch_is_judged_with_the_variables_that_it_sets(monkeypatch):
    for name in ("fitting", "optional"):
        monkeypatch.setattr(installed, name, lambda: [])
    monkeypatch.setattr(installed, "ascend", lambda environment, npu_works: [])
    monkeypatch.setattr(installed, "loads_torch", lambda: None)
    monkeypatch.setattr(device, "npu_works", lambda: False)
    monkeypatch.setattr(device, "adaptor", lambda: (None, []))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for setting, warned in (("", True), ("OMP_NUM_THREADS=2 ", False)):
        given = ["--no-self-test", "--launch", f"{setting}torchrun --standalone no_script.py"]
        sections, _ = command.examine(command.parser().parse_args(given))
        assert any("OMP_NUM_THREADS is not set" in found.text for found in sections["Environment"]) is warned
        assert list(sections)[-1] == "Launch"


def test_the_public_names_come_when_they_are_asked_for():
    code = "import sys, mindspeed_cp; assert 'torch' not in sys.modules; print(mindspeed_cp.comm.count_bytes.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "count_bytes\n", done.stderr
    assert all(getattr(mindspeed_cp, name).__name__ == name for name in mindspeed_cp.__all__)
    assert set(mindspeed_cp.__all__) <= set(dir(mindspeed_cp))
    with pytest.raises(AttributeError, match="nothing"):
        _ = mindspeed_cp.nothing


def test_a_report_has_versions_and_problems_and_no_values_of_variables(monkeypatch, capsys):
    monkeypatch.setenv("MINDSPEED_CP_DEVICE", "secret/place")
    found = {"Installed": [Finding("ok", "fine")], "Environment": [Finding("problem", "wrong", "mend it")]}
    monkeypatch.setattr(command, "examine", lambda given: (found, {}))
    assert command.main(["--report"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("```text\nPython 3.") and said.endswith("```\n")
    assert f"torch {installed.release('torch')}" in said and "MINDSPEED_CP_DEVICE" in said
    assert "Installed: 1 checks are well\nEnvironment: problem: wrong" in said and "secret" not in said
