"""One number names a version; a release joins what changes/ and the changelog say, and a tag publishes it."""

import re
import shutil
from pathlib import Path

import pytest
import release
import yaml

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.cpu_only
LOG = """# Changelog

## [Unreleased]

Further changes lie in [changes/](changes/README.md), one file each.

### Added

* a

### Fixed

* b

## [0.9.0] - 2026-01-01

### Added

* old
"""


@pytest.fixture
def tree(tmp_path):
    for folder in ("changes", "mindspeed_cp"):
        (tmp_path / folder).mkdir()
    (tmp_path / "CHANGELOG.md").write_text(LOG)
    (tmp_path / "mindspeed_cp/version.py").write_text('"""One number."""\n\n__version__ = "0.9.0"\n')
    shutil.copy(ROOT / "changes/README.md", tmp_path / "changes")
    (tmp_path / "changes/two-links.added.md").write_text("* c\n  more of c\n")
    (tmp_path / "changes/a-flag.removed.md").write_text("* d\n")
    return tmp_path


def test_a_release_joins_the_changelog_and_the_files_of_changes(tree):
    release.release(tree, "0.10.0", "2026-12-01")
    log = (tree / "CHANGELOG.md").read_text()
    new = "### Added\n\n* a\n* c\n  more of c\n\n### Fixed\n\n* b\n\n### Removed\n\n* d\n"
    assert (
        log == f"# Changelog\n\n{release.UNRELEASED}\n## [0.10.0] - 2026-12-01\n\n{new}\n" + LOG[LOG.index("## [0.9") :]
    )
    assert release.section_of(tree, "0.10.0") == new
    assert [path.name for path in (tree / "changes").iterdir()] == ["README.md"]
    assert '__version__ = "0.10.0"' in (tree / "mindspeed_cp/version.py").read_text()
    assert release.joined(tree) == "\n"


@pytest.mark.parametrize("version", ["0.9.0", "0.8.9", "0.10", "v1.0.0"])
def test_a_version_is_later_than_the_last(tree, version):
    with pytest.raises(ValueError, match="must be three numbers and later than 0.9.0"):
        release.release(tree, version, "2026-12-01")
    assert (tree / "CHANGELOG.md").read_text() == LOG


@pytest.mark.parametrize(("name", "text"), [("x.md", "* a\n"), ("x.news.md", "* a\n"), ("x.added.md", "a\n")])
def test_a_file_of_changes_says_its_kind_and_is_a_list(tree, name, text):
    (tree / "changes" / name).write_text(text)
    with pytest.raises(ValueError, match=f"changes/{name} must be"):
        release.joined(tree)


def test_what_is_not_released_can_be_joined():
    assert all(len(line) <= 130 for path in release.fragments(ROOT) for line in path.read_text("utf-8").splitlines())
    assert re.match(r"### \w+\n\n\* ", release.joined(ROOT))
    assert release.UNRELEASED in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_workflow_of_a_tag_builds_installs_and_publishes_the_version_of_the_tag():
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads "on" as true
    commands = "\n".join(step.get("run", "") for step in workflow["jobs"]["release"]["steps"])
    assert all(part in commands for part in ("python -m build", "dist/*.whl", "dist/*.tar.gz", "release.py --notes"))
