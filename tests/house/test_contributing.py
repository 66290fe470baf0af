"""CONTRIBUTING.md's diffs of a patch and of a Megatron version work; other tests carry out those of an algorithm, a
setting and a kernel.
"""

from types import SimpleNamespace

import contributing
import pytest

from mindspeed_cp.patches import fit, positions, versions
from mindspeed_cp.patches.rows import Row


def test_a_patch_is_a_decorated_function_beside_the_others_of_its_area():
    names = dict(vars(positions))
    exec(contributing.diff_of("a patch")["patches/positions.py"], names)
    row = names["my_position_ids"]
    assert (
        isinstance(row, Row) and row.targets[0].endswith(".BertModel.my_position_ids") and "first token" in row.reason
    )
    adaptor = SimpleNamespace(scope_of=lambda model: SimpleNamespace(alone=True))
    replaced = row.builder(adaptor)(lambda model, tokens: (model, tokens))
    assert replaced("model", "tokens") == ("model", "tokens")


def test_a_megatron_version_is_a_row(monkeypatch):
    row = contributing.row_of("a Megatron version", "patches/versions.py", versions)
    assert fit.megatron_finding(row.version, "3.12", "here")[0] == "warning"
    monkeypatch.setattr(fit, "MEGATRONS", (*versions.MEGATRONS, row))
    assert fit.megatron_finding(row.version, "3.12", "here") == ("ok", f"megatron-core {row.version}, here", "")


def test_a_diff_that_does_not_fit_the_files_is_an_error(tmp_path, monkeypatch):
    page = "\n## How to add a thing\n\n```diff\n+++ setup.py\n import nothing_of_the_kind\n+x = 1\n```\n\n## More\n"
    (tmp_path / "CONTRIBUTING.md").write_text(page)
    (tmp_path / "setup.py").write_text("import sys\n")
    monkeypatch.setattr(contributing, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="setup.py has no line that begins with 'import nothing_of_the_kind'"):
        contributing.diff_of("a thing")
    (tmp_path / "setup.py").write_text("\nimport nothing_of_the_kind\n")
    assert contributing.diff_of("a thing") == {"setup.py": "x = 1\n"}
    with pytest.raises(ValueError, match="no diff of how to add another"):
        contributing.diff_of("another")
