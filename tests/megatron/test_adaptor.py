"""Importing the adaptor: what it changes, what undo leaves (nothing), and what it says when something is wrong."""

import re
import subprocess
import sys

import pytest
from adaptor_runs import COPY_OF_ROPE, observe
from trainer_runs import REPOSITORY, environment

pytestmark = pytest.mark.cpu_only


@pytest.fixture(scope="module")
def megatron_first():
    return observe("megatron_first")


@pytest.fixture(scope="module")
def failed_imports():
    return observe("failed_imports")


def test_importing_the_package_alone_changes_nothing():
    assert observe("package_alone") == {"changed": [], "megatron": False, "aliases": False, "adaptor": False}


@pytest.mark.megatron
def test_copies_of_a_megatron_imported_before_the_adaptor_are_rebound(megatron_first):
    assert megatron_first["was_a_copy"] and megatron_first["is_a_copy"] and megatron_first["is_replaced"]


def test_a_megatron_imported_before_the_adaptor_is_said_once_with_the_number_of_copies(megatron_first):
    (message,) = megatron_first["late"]
    assert "megatron.core.transformer.dot_product_attention" in message and "toy_script.split" in message
    assert f"{len(megatron_first['copies'])} copies of patched names were rebound" in message
    assert "put import mindspeed_cp.megatron_adaptor first" in message and megatron_first["late_again"] == []
    assert {"toy_script.split", f"{COPY_OF_ROPE[1]}.{COPY_OF_ROPE[2]}"} <= set(megatron_first["copies"])


def test_other_ranks_do_not_say_it():
    assert observe("on_another_rank", RANK="1") == []


def test_a_script_that_asked_for_the_version_alone_is_not_told_to_import_the_adaptor_first():
    assert observe("version_first") == []


@pytest.mark.parametrize(
    "command", [["scripts/pretrain_gpt.py", "--help"], ["-m", "mindspeed_cp.run", "SCRIPT"]], ids=["trainer", "runner"]
)
def test_our_own_programs_import_the_adaptor_first(command, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from megatron.core.models.gpt import GPTModel\nprint('usage')\n")
    result = subprocess.run(
        [sys.executable, *(str(script) if word == "SCRIPT" else word for word in command)],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0 and "usage" in result.stdout, result.stderr
    assert "imported before" not in result.stderr


@pytest.mark.megatron
def test_the_targets_reported_as_applied_are_those_that_were_replaced(megatron_first):
    reported = [target for target in megatron_first["targets"] if target in megatron_first["patched"]]
    assert len(reported) > 60 and reported == megatron_first["replaced"]


@pytest.mark.megatron
def test_undo_restores_every_attribute_to_the_identical_object(megatron_first):
    assert all(megatron_first["targets_restored"])
    assert megatron_first["left_after_undo"] == [] and megatron_first["applied_after_undo"] == []
    assert megatron_first["finders_after_undo"]


@pytest.mark.megatron
def test_apply_after_undo_changes_the_same_again_and_undo_restores_it(megatron_first):
    assert megatron_first["changed_again"] == megatron_first["changed"] != []
    assert megatron_first["left_after_second_undo"] == []


@pytest.mark.megatron
def test_with_context_parallel_size_1_training_is_bitwise_that_of_megatron():
    result = observe("without_context_parallelism")
    assert result["equal"] and result["patched"] and result["finite"]
    assert result["nonzero"] > result["count"] / 2 > 1000


@pytest.mark.megatron
def test_running_the_module_lists_every_patch_with_reason_and_status(megatron_first):
    lines = run_module("--all").splitlines()
    counts = re.fullmatch(r"megatron-core \S+, torch \S+, (\d+) of (\d+) patches applied", lines[0])
    rows = [(line, reason.strip()) for line, reason in zip(lines, lines[1:]) if reason.startswith("    ")]
    statuses = dict(line.split(None, 1) for line, _ in rows)
    assert set(megatron_first["targets"]) <= set(statuses)
    applied = [target for target, status in statuses.items() if status == "applied"]
    assert sorted(applied) == sorted(set(megatron_first["patched"]))
    assert statuses["megatron.training.arguments.validate_args"].startswith("no Megatron-LM checkout")
    assert all(len(reason) > 10 for _, reason in rows)
    assert [int(count) for count in counts.groups()] == [len(megatron_first["patched"]), len(rows)]


def test_the_table_of_patches_fits_a_screen(megatron_first):
    lines = run_module().splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    assert "  DotProductAttention.__init__" in "\n".join(lines) and "--all" in lines[-1]
    assert any(re.search(r"checkout: 0 of \d+ \(no Megatron-LM checkout", line) for line in lines)


def run_module(*arguments):
    """Output of ``python -m mindspeed_cp.megatron_adaptor`` in a window of 100 columns; nothing may come before it."""
    result = subprocess.run(
        [sys.executable, "-m", "mindspeed_cp.megatron_adaptor", *arguments],
        env={**environment(), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert result.stdout.startswith("megatron-core ")
    return result.stdout


def test_a_missing_megatron_is_said_with_the_command_that_installs_it(failed_imports):
    message, changed = failed_imports["missing"]
    assert "there is no megatron.core" in message and "pip install megatron-core==0.16.1" in message
    assert changed == []


def test_a_wrong_device_variable_is_refused_before_megatron_is_imported(failed_imports):
    message, changed = failed_imports["variable"]
    assert "MINDSPEED_CP_DEVICE=gpu" in message and "use MINDSPEED_CP_DEVICE=cpu" in message and "unset" in message
    assert changed == [] and not failed_imports["megatron_imported"]


def test_a_name_that_is_gone_names_its_path_and_the_version_and_changes_nothing(failed_imports):
    message, changed = failed_imports["gone"]
    assert "megatron.core.parallel_state.destroy_model_parallel" in message
    assert f"megatron-core {failed_imports['version']}" in message and "No patch was applied" in message
    assert changed == []


def test_a_method_that_only_a_base_class_still_has_names_its_path_and_the_version(failed_imports):
    message, changed = failed_imports["inherited"]
    assert "megatron.core.transformer.dot_product_attention.DotProductAttention.forward" in message
    assert f"megatron-core {failed_imports['version']}" in message and "No patch was applied" in message
    assert "has no 'forward' of its own" in message and "inherits it from Module" in message
    assert changed == []


def test_an_untried_version_warns_and_names_the_tried_ones(failed_imports):
    (message,) = failed_imports["untried"]
    assert "megatron-core 0.99.0 has not been tried" in message
    assert all(version in message for version in ("0.12.1", "0.16.1", *failed_imports["tried"]))


def test_with_an_accelerator_no_stand_in_is_applied_and_the_report_says_why(failed_imports):
    rows = failed_imports["with_cuda"]
    why = "CUDA is there (MINDSPEED_CP_DEVICE=cpu switches the stand-in on)"
    assert rows["torch.cuda.current_device"] == rows["torch.Tensor.cuda"] == rows["torch.compile"] == why
    assert rows["megatron.core.parallel_state.initialize_model_parallel"] == "applied"
