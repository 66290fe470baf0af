"""The package installs under its own name alone, works from a bare checkout, and its metadata say what it needs."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info < (3, 11):  # noqa: UP036  tomli comes with pytest there
    import tomli as tomllib
else:
    import tomllib

REPOSITORY = Path(__file__).resolve().parents[2]
PROBE = (
    "import mindspeed_cp, mindspeed_cp.patches, mindspeed_cp.arguments, mindspeed_cp.arguments.flags; "
    "print(mindspeed_cp.__file__, mindspeed_cp.patches.__file__, mindspeed_cp.arguments.__file__, sep='\\n')"
)


def tracked_sources():
    skipped = {".venv", "build", "dist", "runs", "fake_torch_npu"}
    return [
        path
        for path in REPOSITORY.rglob("*.py")
        if not skipped & set(path.relative_to(REPOSITORY).parts)
        and not any(part.startswith(".") for part in path.relative_to(REPOSITORY).parts)
    ]


def probe(cwd, **environment):
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", PROBE], cwd=cwd, env=clean | environment, check=True, text=True, capture_output=True
    ).stdout.splitlines()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy: building leaves folders behind."""
    import shutil

    source, out = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "tests", "scripts")
    shutil.copytree(REPOSITORY, source, ignore=ignored)
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])",
            str(out),
        ],
        cwd=source,
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def test_wheel_puts_everything_under_one_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"mindspeed_cp"}
    for name in (
        "patches/manager.py",
        "arguments/flags.py",
        "kernels/cpu.py",
        "comm/meter.py",
        "algorithms/ring.py",
        "planner/models.txt",
        "py.typed",
    ):
        assert f"mindspeed_cp/{name}" in names
    packaged = {name for name in names if name.endswith(".py")}
    sources = {
        f"mindspeed_cp/{path.relative_to(folder)}"
        for folder in (REPOSITORY / "mindspeed_cp",)
        for path in folder.rglob("*.py")
    }
    sources |= {
        f"mindspeed_cp/{path.relative_to(REPOSITORY)}"
        for folder in ("patches", "arguments")
        for path in (REPOSITORY / folder).rglob("*.py")
    }
    assert packaged == sources


@pytest.mark.parametrize("from_repository", [False, True])
def test_installed_package_imports_from_anywhere(wheel, tmp_path, from_repository):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    files = probe(REPOSITORY if from_repository else tmp_path, PYTHONPATH=str(tmp_path))
    # From the repository's root the checkout comes first, as python -c always has it; its parts still belong together.
    root = REPOSITORY if from_repository else tmp_path
    assert all(Path(file).is_relative_to(root) for file in files)


def test_bare_checkout_imports(tmp_path):
    assert all(Path(file).is_relative_to(REPOSITORY) for file in probe(tmp_path, PYTHONPATH=str(REPOSITORY)))


def test_importing_the_package_changes_nothing_outside_it(tmp_path):
    check = (
        "import sys, torch; before = torch.cuda.current_device; import mindspeed_cp; "
        "assert torch.cuda.current_device is before; assert not any(n.split('.')[0] == 'megatron' for n in sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=True
    )


def test_no_source_imports_patches_or_arguments_by_their_top_level_name():
    wrong = re.compile(r"^\s*(from (patches|arguments)[. ]|import (patches|arguments)\b)", re.MULTILINE)
    assert [str(path) for path in tracked_sources() if wrong.search(path.read_text(encoding="utf-8"))] == []


def test_files_stay_readable():
    too_long = [
        (path.name, count)
        for path in tracked_sources()
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 450
    ]
    assert too_long == []


def test_constraints_pin_every_dependency_that_setup_names():
    setup = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    named = set(re.findall(r'^\s+"([A-Za-z][\w-]*)(?:[<>=!~][^"]*)?",', setup, re.MULTILINE))
    pinned = set(re.findall(r"^([\w-]+)==", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"torch", "megatron-core", "rich", "pytest"} <= named
    assert named <= pinned, f"not pinned: {named - pinned}"


def test_version_and_python_agree_between_the_files():
    import mindspeed_cp

    setup = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert f'version="{mindspeed_cp.__version__}"' in setup
    assert 'python_requires=">=3.10"' in setup and project["tool"]["ruff"]["target-version"] == "py310"


def test_ci_calls_exactly_the_test_script():
    lines = (REPOSITORY / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == "bash scripts/test.sh" and len(lines) == 4
    assert "bash scripts/test.sh" in (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert os.access(REPOSITORY / ".ci/run", os.X_OK)


def test_license_is_apache_2():
    text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
