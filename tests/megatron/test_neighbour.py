"""MindSpeed beside this project, whoever comes first; a toy shows the order, tests/ascend the real one."""

from types import SimpleNamespace

import pytest
from adaptor_runs import observe

from mindspeed_cp.megatron import neighbour
from mindspeed_cp.patches.versions import MEGATRONS, minor

pytestmark = pytest.mark.cpu_only
RING, ULYSSES = "megatron_cp_algo", "ulysses_cp_algo"
FUSED = "mindspeed.core.fused_attention"


@pytest.fixture(scope="module")
def orders():
    return observe("every_order", "neighbour_runs", MINDSPEED_CP_DEVICE="cpu")


@pytest.mark.megatron
def test_what_mindspeed_had_patched_with_its_flags_becomes_ours_around_its_other_features(orders):
    assert orders["theirs"] == "mindspeed.core.context_parallel.adaptor"
    assert orders["ours"] == ("applied", FUSED, "megatron", ULYSSES)


@pytest.mark.megatron
def test_repatch_does_both_and_names_the_algorithm(orders):
    assert orders["repatch"] == ("applied", FUSED, "megatron", RING) == orders["again"]
    assert orders["shown"] == 2  # what MindSpeed was shown is taken back


@pytest.mark.megatron
def test_no_flag_is_defined_twice_and_mindspeeds_default_stays(orders):
    assert orders["flags"] == (RING, "direct", "causal")


@pytest.mark.megatron
def test_where_mindspeeds_dataset_ends_documents_is_known_here(orders):
    assert orders["ends"] == [3, 8]


@pytest.mark.megatron
def test_an_algorithm_of_mindspeed_alone_is_left_to_it_and_said(orders):
    said, applied = orders["kept"]
    assert said.startswith("--context-parallel-algo adaptive_cp_algo is MindSpeed's own: context parallelism is left")
    assert "toy_mindspeed" in said and said.count("\n") == 1 and applied == 0


@pytest.mark.megatron
def test_after_undo_mindspeed_has_its_context_parallelism_again(orders):
    assert orders["undone"] == "mindspeed.core.context_parallel.adaptor"


@pytest.mark.megatron
def test_a_mindspeed_that_comes_later_patches_first_all_the_same():
    (was_there, before), after = observe("ours_first", "neighbour_runs", MINDSPEED_CP_DEVICE="cpu")
    assert not was_there and before[0] == "applied" and before[1].startswith("megatron.")
    assert after == ("applied", FUSED, "megatron", RING)


def made(**more):
    """A Neighbour and what it called, in order."""
    calls = []
    here = neighbour.Neighbour(
        give_way=lambda: calls.append("give way"),
        come_back=lambda: calls.append("come back"),
        configure=lambda settings: calls.append(settings["context_parallel_algo"]),
        add_flags=lambda parser: calls.append("flags"),
        say=lambda: calls.append("say"),
        hand=lambda ends: calls.append(ends),
    )
    settings = SimpleNamespace(**{"context_parallel_size": "2", "context_parallel_algo": RING, **more})
    return here, settings, calls


def test_mindspeed_sees_a_size_of_one_while_it_patches_and_only_then():
    here, settings, calls = made()
    here.patches(lambda shown: calls.append(shown.context_parallel_size), settings)
    assert calls == ["give way", 1, RING, "come back"] and settings.context_parallel_size == "2"


def test_a_failure_of_mindspeed_leaves_its_settings_as_they_were():
    here, settings, _ = made()
    with pytest.raises(ZeroDivisionError):
        here.prepares(lambda shown: 1 / 0, settings)
    assert settings.context_parallel_size == "2" and not here.leaves_out(_of("attention_forward"))


def _of(name, module="mindspeed.core.transformer.flash_attention.reset_attention_mask.adaptor"):
    return type(name, (), {"__module__": module, "__name__": name})


@pytest.mark.parametrize(
    ("function", "out"),
    [
        (_of("gpt_forward_wrapper"), True),
        (_of("attention_init", "mindspeed.core.transformer.attention"), True),
        (_of("get_batch_on_this_cp_rank_wrapper", "mindspeed_llm.training.utils"), True),
        (_of("get_batch_on_this_tp_rank", "mindspeed_llm.training.utils"), False),
        (_of("collate_wrapper", "mindspeed.core.transformer.flash_attention.reset_attention_mask.utils"), False),
        (None, False),
    ],
)
def test_what_reads_packed_documents_in_mindspeeds_layout_is_left_out_with_context_parallelism(function, out):
    here, settings, _ = made()
    seen = []
    here.patches(lambda shown: seen.append(here.leaves_out(function)), settings)
    alone, one, _ = made(context_parallel_size=1)
    alone.patches(lambda shown: seen.append(alone.leaves_out(function)), one)
    assert seen == [out, False]


def test_tensor_parallelism_in_two_dimensions_is_refused_with_a_way_out():
    here, settings, _ = made(tp_2d=True, tp_y=2)
    with pytest.raises(ValueError, match="--tp-2d with --tp-y 2 .* set MINDSPEED_CP=off, or leave --tp-2d out"):
        here.patches(lambda shown: None, settings)


@pytest.mark.parametrize(
    ("lines", "front"),
    [
        ("import torch\nfrom mindspeed_llm import megatron_adaptor\n", "mindspeed_llm"),
        ("import mindspeed.megatron_adaptor\n", "mindspeed"),
        ("import mindspeed_cp.megatron_adaptor\n", ""),
    ],
)
def test_mindspeed_is_activated_as_the_script_does(tmp_path, lines, front):
    script = tmp_path / "train.py"
    script.write_text(lines)
    assert neighbour.front_named_in(str(script)) == front
    assert neighbour.front_named_in(str(tmp_path / "nowhere.py")) == ""


@pytest.mark.parametrize("size", ["1", "2"])
def test_models_that_split_sequences_themselves_are_left_to_mindspeed(tmp_path, monkeypatch, size):
    script = tmp_path / "pretrain_vlm.py"
    script.write_text("import mindspeed.megatron_adaptor\nfrom mindspeed_mm.training import pretrain\n")
    monkeypatch.setattr("sys.argv", [str(script)])
    here, settings, calls = made(context_parallel_size=size)
    here.patches(lambda shown: calls.append(shown.context_parallel_size), settings)
    assert calls == ["give way", size, "say"]
    assert here.line().startswith(
        "MindSpeed-MM's models split sequences themselves: context parallelism is left to Mind"
    )


def test_a_megatron_without_a_tried_branch_is_said_with_those_that_have_one():
    assert neighbour.untried("0.16.1") == neighbour.untried("0.12.1") == ""
    said = neighbour.untried("0.19.1")
    assert "megatron-core 0.19.1 has not been tried" in said and "core_r0.16.0 (megatron-core 0.16)" in said


def test_every_branch_of_mindspeed_belongs_to_a_megatron_that_was_tried():
    tried = {minor(row.version) for row in MEGATRONS}
    assert {branch.megatron for branch in neighbour.BRANCHES} <= tried


@pytest.mark.megatron
def test_a_value_of_the_variable_that_is_none_is_refused():
    with pytest.raises(Exception, match="MINDSPEED_CP=on is not known; use MINDSPEED_CP=off"):
        observe("every_order", "neighbour_runs", MINDSPEED_CP_DEVICE="cpu", MINDSPEED_CP="on")


def test_flags_of_mindspeed_have_an_owner_without_a_device_and_without_a_patch():
    owners, has_patched, has_device = observe("flags_of_features", "neighbour_runs")
    assert owners == {"--context-parallel-algo": "MindSpeed", "--attention-mask-type": "MindSpeed"}
    assert not has_device and not has_patched
