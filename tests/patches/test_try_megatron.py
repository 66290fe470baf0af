"""The watch for new versions of Megatron: the table of signatures, and the report of scripts/try_megatron.sh."""

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

from mindspeed_cp.patches import versions

ROOT = Path(__file__).resolve().parents[2]
SPLIT = "megatron.core.utils.get_batch_on_this_cp_rank"
MOVED = "megatron.core.ssm.layer.Layer.forward"
LOST = "megatron.legacy.fused_kernels.load"
REASON = "a rank gets the tokens of the chosen layout"
TABLE = {
    "versions": ["0.12.1", "0.16.1"],
    "patches": {
        SPLIT: {"reason": REASON, "signatures": {"0.12.1": "(batch)", "0.16.1": "(batch, cp_group=None)"}},
        MOVED: {"reason": "of a moved class", "signatures": {"0.12.1": "(self, x, *, scale=1.0)"}},
        LOST: {"reason": "the kernels are CUDA", "signatures": {"0.12.1": "(args)"}},
    },
}
SOURCES = {
    "core/package_info.py": "MAJOR = 0\nMINOR = 99\nPATCH = 1\n",
    "core/utils.py": "def get_batch_on_this_cp_rank(batch: dict, is_hybrid_cp: bool, cp_group=None):\n    pass\n",
    "core/ssm/layer/__init__.py": "from megatron.core.ssm.layer.new import New as Layer\n",
    "core/ssm/layer/new.py": "try:\n    import x\nexcept ImportError:\n    x = 1\n\n\nclass New:\n"
    "    def forward(self, x, *, scale: float = 1.0):\n        pass\n",
}


@pytest.fixture
def scripts():
    """The modules megatron_signatures and try_megatron of tests/check."""
    import megatron_signatures
    import try_megatron

    return megatron_signatures, try_megatron


@pytest.fixture
def newer(tmp_path):
    """The folder of a Megatron whose batch split has another parameter, and that lost a name."""
    for name, text in SOURCES.items():
        path = tmp_path / "megatron" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_a_changed_signature_is_shown_beside_the_old_one_with_the_reason_of_its_patch(scripts, newer):
    assert scripts[0].differences(newer, TABLE) == [
        SPLIT,
        f"  patched because {REASON}",
        "  0.16.1  (batch, cp_group=None)",
        "  0.99.1  (batch, is_hybrid_cp, cp_group=None)",
        LOST,
        "  patched because the kernels are CUDA",
        "  0.16.1  (args)",
        "  0.99.1  is not there",
    ]


def test_the_table_says_what_each_version_has(scripts):
    known = scripts[0].known
    assert [known(TABLE, SPLIT, one) for one in ("0.11.0", "0.12.1", "0.15.3", "0.16.1", "0.17.0")] == [
        "is not there",
        "(batch)",
        "(batch)",
        "(batch, cp_group=None)",
        "(batch, cp_group=None)",
    ]


def test_the_table_has_every_tried_version(scripts):
    assert {row.version for row in versions.MEGATRONS} <= set(scripts[0].read_table()["versions"])


@pytest.mark.megatron
def test_the_installed_megatron_has_the_signatures_of_the_table(scripts):
    signatures, table = scripts[0], scripts[0].read_table()
    folder = Path(importlib.util.find_spec("megatron.core").origin).parents[2]
    version = signatures.version_of(folder)
    if version not in table["versions"]:
        pytest.skip(f"megatron-core {version} has not been tried")
    targets = [target for target in table["patches"] if target.startswith("megatron.core.")]  # what every wheel has
    assert {target: signatures.signature(folder, target) for target in targets} == {
        target: signatures.known(table, target, version) for target in targets
    }


def test_what_broke_is_reported_and_the_status_is_1(scripts, newer, monkeypatch, capsys):
    error = (
        "mindspeed_cp.patches.manager.PatchError: cannot patch megatron.core.x in megatron-core 0.99.1 (its reason: y)"
    )
    broken = [sys.executable, "-c", f"import sys; print('words'); sys.exit({error!r})"]
    step = scripts[1].run("import", broken, newer)
    assert step.result.startswith("FAILED with status 1") and list(step.failed) == [error]
    monkeypatch.setattr(scripts[1], "steps", lambda *chosen: iter([scripts[1].Step("table", "passed"), step]))
    assert scripts[1].main([str(newer)]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("# Megatron 0.99.1\n") and error in shown
    monkeypatch.setattr(scripts[1], "steps", lambda *chosen: iter([scripts[1].Step("table", "passed")]))
    assert scripts[1].main([str(newer)]) == 0


def test_a_wheel_without_training_script_says_so(scripts, newer):
    (step,) = scripts[1].steps(newer, ["table"], False)
    assert "not run" in step.result and "checkout" in step.result


def test_the_nightly_workflow_tries_the_newest_wheel_and_main():
    job = yaml.safe_load((ROOT / ".github/workflows/nightly.yml").read_text())["jobs"]["newest-megatron"]
    assert job["strategy"]["matrix"]["megatron"] == ["newest", "main"]
    assert "scripts/try_megatron.sh" in job["steps"][-1]["run"] and job["steps"][-1]["shell"] == "bash"
