"""The environment of the commands: a torch that is there is taken, an index asked for, a large download said."""

import os
import re
import subprocess
import sys
from pathlib import Path

import environment
import pytest
import yaml

from mindspeed_cp.patches import versions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pip(monkeypatch):
    """The commands given to pip, and the constraints they were given."""
    calls = []

    def call(*arguments):
        limits = arguments[arguments.index("--constraint") + 1] if "--constraint" in arguments else None
        calls.append((arguments, Path(limits).read_text(encoding="utf-8") if limits else ""))

    monkeypatch.setattr(environment, "pip", call)
    monkeypatch.delenv(environment.INDEX_VARIABLE, raising=False)
    return calls


def pretend(monkeypatch, torch, in_environment=False):
    """This Python imports this version of torch, and belongs to the system or to an environment."""
    monkeypatch.setattr(environment, "torch_of", lambda python: torch)
    monkeypatch.setattr(sys, "prefix", "/made" if in_environment else sys.base_prefix)


def sees_system_packages(folder):
    return "include-system-site-packages = true" in (folder / "pyvenv.cfg").read_text(encoding="utf-8")


def test_a_torch_of_the_system_is_seen_from_the_new_environment(monkeypatch, tmp_path, capsys):
    pretend(monkeypatch, versions.LOWEST_TORCH)
    environment.make(tmp_path / "new", with_pip=False)
    assert sees_system_packages(tmp_path / "new")
    assert f"with torch {versions.LOWEST_TORCH} of {sys.executable}, taken as it is" in capsys.readouterr().out


@pytest.mark.parametrize("torch", [None, "1.13.1", "99.0.0"])
def test_without_a_torch_that_was_tried_the_environment_stands_alone(monkeypatch, tmp_path, capsys, torch):
    pretend(monkeypatch, torch)
    environment.make(tmp_path / "new", with_pip=False)
    assert not sees_system_packages(tmp_path / "new")
    assert (f"torch {torch} of {sys.executable} is left alone" in capsys.readouterr().out) == (torch is not None)


def test_a_torch_of_another_environment_is_imported_from_there(monkeypatch, tmp_path):
    """With a stub of torch and real interpreters: what pip and the scripts would see."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", theirs], check=True)
    python = theirs / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip())
    (packages / "torch").mkdir()
    (packages / "torch" / "__init__.py").touch()
    (packages / "torch-stub.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {versions.LOWEST_TORCH}\n"
    (packages / "torch-stub.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")
    make = f"import environment, pathlib; environment.make(pathlib.Path({str(ours)!r}), with_pip=False)"
    clean = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    subprocess.run([python, "-c", make], check=True, env=clean)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert environment.torch_of(str(ours / "bin" / "python")) == versions.LOWEST_TORCH
    assert not sees_system_packages(ours)


def test_an_installed_torch_is_what_pip_has_to_keep(monkeypatch, pip, capsys):
    pretend(monkeypatch, "2.9.1+cpu")
    environment.install("train")
    ((arguments, constraints),) = pip
    assert arguments[-2:] == ("--editable", ".[train]")
    assert "torch==2.9.1+cpu" in constraints.splitlines() and f"torch=={versions.TORCH}" not in constraints
    assert f"megatron-core=={versions.DEFAULT}" in constraints.splitlines()
    assert "not been tried" not in capsys.readouterr().out


def test_an_installed_torch_that_was_not_tried_is_kept_and_said(monkeypatch, pip, capsys):
    pretend(monkeypatch, "99.0.0")
    environment.install("train")
    assert "torch==99.0.0" in pip[0][1] and "torch 99.0.0 has not been tried" in capsys.readouterr().out


def test_an_index_of_cpu_wheels_gives_torch_and_nothing_else(monkeypatch, pip):
    pretend(monkeypatch, None)
    monkeypatch.setenv(environment.INDEX_VARIABLE, "file:///wheels")
    environment.install("train")
    first, second = pip
    assert first[0] == ("install", "--no-deps", "-i", "file:///wheels", f"torch=={versions.TORCH}")
    assert (
        "file:///wheels" not in second[0] and f"torch=={environment.importlib.metadata.version('torch')}" in second[1]
    )


@pytest.mark.parametrize(
    "needs, large",
    [
        (["sympy>=1.13", 'nvidia-cudnn-cu13==9.20; platform_system == "Linux"'], True),
        (["sympy>=1.13", "jinja2"], False),
    ],
    ids=["cuda", "cpu"],
)
def test_a_large_download_is_said_with_two_ways_around_it(monkeypatch, pip, capsys, needs, large):
    pretend(monkeypatch, None)
    monkeypatch.setattr(environment, "needs_of", lambda requirement: needs)
    environment.install("train")
    said = capsys.readouterr().out
    assert all((part in said) == large for part in ("3 GB", "6 GB", "TORCH_INDEX_URL=", "PYTHON="))
    assert f"torch=={versions.TORCH}" in pip[-1][1].splitlines()


def test_an_old_python_is_refused_with_those_that_will_do(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    with pytest.raises(SystemExit):
        environment.main(["train"])
    assert "Python 3.9 is too old; set PYTHON to one of 3.10, 3.11" in capsys.readouterr().err


def test_a_python_of_another_version_hands_over_to_that_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    started = []

    def execv(*arguments):
        started.append(arguments)
        raise SystemExit

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(environment, "_table", lambda: versions)
    with pytest.raises(SystemExit):
        environment.main(["dev"])
    python = str(tmp_path / ".venv" / "bin" / "python")
    assert started == [(python, [python, str(ROOT / "scripts" / "environment.py"), "dev"])]


@pytest.mark.parametrize("python", versions.PYTHONS)
def test_every_python_has_one_pin_of_every_package(monkeypatch, python):
    monkeypatch.setattr(sys, "version_info", (*versions.minor(python), 0))
    text = environment.CONSTRAINTS.read_text(encoding="utf-8")
    for name in set(re.findall(r"^([\w-]+)==", text, re.M)):
        lines = [line.partition(";") for line in text.splitlines() if line.startswith(f"{name}==")]
        (held,) = [requirement.strip() for requirement, _, marker in lines if environment._holds(marker)]
        assert environment.pinned(name) == held
    assert environment.pinned("torch") == f"torch=={versions.TORCH}"
    assert environment.pinned("megatron-core") == f"megatron-core=={versions.DEFAULT}"
    row = next(row for row in versions.MEGATRONS if row.version == versions.oldest_for(python))
    assert versions.minor(row.pythons[0]) <= versions.minor(python) <= versions.minor(row.pythons[1])


def test_the_commands_make_their_environment_this_way():
    for script, extra in (("quickstart.sh", "train"), ("test.sh", "dev")):
        text = (ROOT / "scripts" / script).read_text(encoding="utf-8")
        assert f'"${{PYTHON:-python3}}" scripts/environment.py {extra}' in text.splitlines()
        assert "venv .venv" not in text


def test_ci_has_a_job_for_every_python_and_every_megatron():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    assert tuple(workflow["jobs"]["python"]["strategy"]["matrix"]["python"]) == versions.PYTHONS
    tested = workflow["jobs"]["megatron"]["strategy"]["matrix"]["megatron"]
    assert tuple(tested) == tuple(
        row.version for row in versions.MEGATRONS if row.in_ci and row.version != versions.DEFAULT
    )


def test_ci_runs_on_pythons_that_the_megatron_has_wheels_for():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    (python,) = [step["with"]["python-version"] for step in workflow["jobs"]["megatron"]["steps"] if "with" in step]
    assert all(
        versions.minor(low) <= versions.minor(python) <= versions.minor(high)
        for low, high in (row.pythons for row in versions.MEGATRONS if row.in_ci)
    )


def test_setup_and_metadata_name_the_lowest_that_was_tried():
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    lowest = ".".join(map(str, versions.minor(versions.LOWEST_TORCH)))
    assert f'"torch>={lowest}"' in text and f'"megatron-core>={versions.OLDEST}"' in text
    assert f'python_requires=">={versions.PYTHONS[0]}"' in text
    for python in versions.PYTHONS:
        assert f'"Programming Language :: Python :: {python}"' in text
