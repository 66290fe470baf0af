"""The package installs under its own name alone, works from a bare checkout, and its metadata say what it needs."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
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
    return run(PROBE, cwd, **environment)


def run(source, cwd, **environment):
    """Lines that ``source`` prints in a process of its own."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", source], cwd=cwd, env=clean | environment, check=True, text=True, capture_output=True
    ).stdout.splitlines()


def copy_of_the_repository(folder):
    """A copy to build in, links as links: building leaves folders behind."""
    names = (".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "tests", "scripts")
    shutil.copytree(REPOSITORY, folder, symlinks=True, ignore=shutil.ignore_patterns(*names))
    return folder


def build(source, out, call):
    """One call of setuptools' build backend, as pip and ``python -m build`` make it; returns the file it made."""
    script = f"import sys; from setuptools import build_meta; print(build_meta.{call})"
    made = subprocess.run(
        [sys.executable, "-c", script, str(out)], cwd=source, check=True, capture_output=True, text=True
    ).stdout
    return out / made.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    source = copy_of_the_repository(tmp_path_factory.mktemp("source") / "copy")
    return build(source, tmp_path_factory.mktemp("sdist"), "build_sdist(sys.argv[1])")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel of a release: built from the sdist, as ``python -m build`` does."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return build(source, tmp_path_factory.mktemp("wheel"), "build_wheel(sys.argv[1])")


def test_sdist_holds_files_and_no_links(sdist):
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = {member.name.partition("/")[2] for member in members}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "mindspeed_cp/patches/machine/cpu.py"} <= names
    assert not [name for name in names if name.split("/")[0] in ("patches", "arguments", "tests", "scripts")]


def test_wheel_puts_everything_under_one_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"mindspeed_cp"}
    for name in ("patches/manager.py", "arguments/flags.py", "kernels/cpu.py", "planner/models.txt", "py.typed"):
        assert f"mindspeed_cp/{name}" in names
    packaged = {name for name in names if name.endswith(".py")}
    sources = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "mindspeed_cp").rglob("*.py")}
    sources |= {
        f"mindspeed_cp/{path.relative_to(REPOSITORY)}"
        for folder in ("patches", "arguments")
        for path in (REPOSITORY / folder).rglob("*.py")
    }
    assert packaged == sources


def test_the_import_names_are_links_in_the_repository():
    for name in ("patches", "arguments"):
        link = REPOSITORY / "mindspeed_cp" / name
        assert link.is_symlink() and link.readlink() == Path("..", name)


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_an_editable_install_gives_the_import_names_and_no_generic_one(tmp_path, mode):
    source = copy_of_the_repository(tmp_path / "copy")
    (tmp_path / "out").mkdir()
    made = build(source, tmp_path / "out", f"build_editable(sys.argv[1], {{'editable_mode': '{mode}'}})")
    with zipfile.ZipFile(made) as archive:
        archive.extractall(tmp_path / "site")
    # The environment of the tests may have an installation of its own.
    alone = "import site, sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in str(f)]; "
    alone += "[sys.modules.pop(name) for name in list(sys.modules) if '__editable__' in name]; "
    generic = "import importlib.util as u; print([n for n in ('patches', 'arguments', 'tests') if u.find_spec(n)])"
    install = f"site_dir = {str(tmp_path / 'site')!r}; sys.path.insert(0, site_dir); site.addsitedir(site_dir)"
    files = run(f"{alone}{install}\n{PROBE}\n{generic}", tmp_path)
    assert files.pop() == "[]"
    assert all(Path(file).is_relative_to(source) for file in files)


def test_a_checkout_that_lost_its_links_imports_and_refuses_to_build(tmp_path):
    """Windows without core.symlinks, and some tools for archives, put a file with the link's text there."""
    source = copy_of_the_repository(tmp_path / "copy")
    for name in ("patches", "arguments"):
        (source / "mindspeed_cp" / name).unlink()
        (source / "mindspeed_cp" / name).write_text(f"../{name}")
    assert all(Path(file).is_relative_to(source) for file in probe(tmp_path, PYTHONPATH=str(source)))
    with pytest.raises(subprocess.CalledProcessError) as error:
        build(source, tmp_path, "build_wheel(sys.argv[1])")
    assert "mindspeed_cp/patches must be a link to ../patches" in error.value.stderr


def test_the_type_checker_sees_every_file_once():
    found = set()
    for folder, _, names in os.walk(REPOSITORY / "mindspeed_cp", followlinks=True):
        found |= {Path(folder, name).resolve() for name in names if name.endswith(".py")}
    expected = [path for name in ("mindspeed_cp", "patches", "arguments") for path in (REPOSITORY / name).rglob("*.py")]
    assert found == {path.resolve() for path in expected} and len(expected) == len(found)


@pytest.mark.parametrize("from_repository", [False, True])
def test_installed_package_imports_from_anywhere(wheel, tmp_path, from_repository):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    files = probe(REPOSITORY if from_repository else tmp_path, PYTHONPATH=str(tmp_path))
    # From the repository's root the checkout comes first, as python -c always has it; its parts still belong together.
    root = REPOSITORY if from_repository else tmp_path
    assert all(Path(file).is_relative_to(root) for file in files)


def test_pip_installs_what_a_release_builds(wheel, tmp_path):
    flags = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, "--target", tmp_path, wheel], check=True)
    assert all(
        Path(file).is_relative_to(tmp_path / "mindspeed_cp") for file in probe(tmp_path, PYTHONPATH=str(tmp_path))
    )


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
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 350
    ]
    assert too_long == []


def test_constraints_pin_every_dependency_that_setup_names():
    setup = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    named = set(re.findall(r'^\s+"([A-Za-z][\w-]*)(?:[<>=!~][^"]*)?",', setup, re.MULTILINE))
    pinned = set(re.findall(r"^([\w-]+)==", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"torch", "megatron-core", "rich", "pytest"} <= named
    assert named <= pinned, f"not pinned: {named - pinned}"


def test_there_is_one_version_number(wheel):
    import mindspeed_cp

    setup = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    assert mindspeed_cp.__version__ not in setup and re.fullmatch(r"\d+\.\d+\.\d+", mindspeed_cp.__version__)
    assert wheel.name == f"mindspeed_cp-{mindspeed_cp.__version__}-py3-none-any.whl"
    assert f"\n## [{mindspeed_cp.__version__}] - " in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")


def test_python_agrees_between_the_files():
    setup = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert 'python_requires=">=3.10"' in setup and project["tool"]["ruff"]["target-version"] == "py310"


def test_setup_names_no_dependency_twice():
    setup = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    required = re.search(r"install_requires=\[(.*?)\]", setup, re.DOTALL)[1]
    names = re.findall(r'^\s+"([\w-]+)', required, re.MULTILINE)
    assert sorted(set(names)) == sorted(names) and "numpy" in names


def test_ci_calls_exactly_the_test_script():
    lines = (REPOSITORY / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == "bash scripts/test.sh" and len(lines) == 4
    assert "bash scripts/test.sh" in (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert os.access(REPOSITORY / ".ci/run", os.X_OK)


def test_license_is_apache_2():
    text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
