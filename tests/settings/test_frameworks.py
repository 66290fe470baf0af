"""Settings of frameworks and of a TransformerConfig, where no command line decides."""

from argparse import Namespace
from dataclasses import dataclass
from types import SimpleNamespace

import framework_runs
import pytest
from distributed import run_ranks
from framework_runs import CASES, GATHER, HYBRID, RING, ULYSSES
from model_cases import VERSION
from trainer_runs import IMPORTED

from mindspeed_cp.arguments import FrameworkSettings

pytestmark = [pytest.mark.megatron, pytest.mark.cpu_only]


@pytest.fixture(scope="module")
def outcomes():
    return run_ranks(4, framework_runs.decide, fresh=True, imported=IMPORTED)


@pytest.mark.parametrize("name", CASES)
def test_what_was_said_decides_and_attention_is_exact(outcomes, name):
    expected = CASES[name][1]
    for ranks in outcomes:
        if isinstance(expected, str):
            assert isinstance(ranks[name], str) and expected in ranks[name]
        else:
            assert ranks[name][:2] == expected and ranks[name][2] < 1e-10


@pytest.mark.skipif(VERSION >= (0, 20), reason="there multi-token prediction needs Transformer Engine")
def test_every_layer_communicates_as_its_entry_of_the_models_list_says(outcomes):
    """The layer of multi-token prediction, for which a list has no entry, has the settings of most."""
    for ranks in outcomes:
        assert ranks["layers"] == [(1, ["kv", "out", "q"]), (2, ["kv"]), (3, ["kv", "out", "q"])]


def test_what_newer_megatrons_exchange_themselves_is_refused_by_name(outcomes):
    for ranks in outcomes:
        layouts, dynamic = ranks["newer"]
        assert "linear_cp_layout contiguous and attention_cp_layout zigzag" in layouts
        assert "--cp-linear-exchange state" in layouts and "give both one value" in layouts
        assert "--dynamic-context-parallel" in dynamic and "--cp-batch-layout balanced" in dynamic


def test_a_models_configuration_takes_mindspeeds_names_as_its_own_does(outcomes):
    for ranks in outcomes:
        after_repatch, alone, set_later, differs = ranks["model"]
        for algorithm, degree, attribute, error in (after_repatch, alone, set_later):
            assert (algorithm, degree, attribute) == (HYBRID, 2, 2) and error < 1e-10
        assert f"context_parallel_algo {HYBRID} of a TransformerConfig differs from {RING}" in differs


def test_settings_may_come_again_before_the_groups_and_what_they_leave_open_stays_afterwards(outcomes):
    for rank, ranks in enumerate(outcomes):
        first, kept, algorithm, size, still, announced, models, ring, late = ranks["again"]
        assert first == kept == (GATHER, None) and ring == (RING, None)
        assert algorithm[:2] == still == (HYBRID, 2) and algorithm[2] < 1e-10, "the groups that exist follow"
        assert "configure before initialize_model_parallel" in size and "destroy_model_parallel first" in size
        assert announced == (1 if rank == 0 else 0), "the final one"
        assert "cp_comm_type all_gather" in models and "of an earlier one" in models
        assert late[:2] == (RING, None) and late[2] < 1e-10, "a default that groups were made with is nobody's choice"
        lines = [line for line in late[3].splitlines() if line.startswith("Context parallelism: ")]
        assert len(lines) == (1 if rank == 0 else 0), "the final one"
        assert all("Ring" in line and line.endswith("megatron_cp_algo is MindSpeed's default") for line in lines)


@dataclass
class Arguments:
    """As ms-swift's: a dataclass with everything in it."""

    context_parallel_size: int = 2
    cp_comm_type: str | None = None
    use_flash_attn: bool = True
    max_length: int = 2048
    learning_rate: float | None = None


@pytest.mark.parametrize(
    "source",
    [
        Arguments(),
        vars(Arguments()),
        Namespace(**vars(Arguments())),
        SimpleNamespace(**vars(Arguments())),
        {"context_parallel_size": "2", "use_flash_attn": "true", "of another world": object()},
    ],
    ids=["dataclass", "dict", "namespace", "simple namespace", "text"],
)
def test_every_kind_of_settings_is_read_and_what_is_missing_gets_the_flags_default(source):
    resolved = FrameworkSettings.read(source).resolve()
    assert (resolved.config.context_parallel_size, resolved.config.algorithm) == (2, ULYSSES)
    assert resolved.setup.use_flash_attn and resolved.config.attention_mask_type == "causal"


@pytest.mark.parametrize("name", ["attention_mask_type", "cp_attention_mask_type"])
def test_both_names_of_the_mask_type_are_read(name):
    settings = FrameworkSettings.read({"context_parallel_size": 2, name: "full"})
    assert settings.resolve().config.attention_mask_type == "full"


def test_every_field_of_a_configuration_comes_back_through_settings():
    values = {
        "context_parallel_size": 8,
        "context_parallel_algo": "hybrid_cp_algo",
        "ulysses_degree_in_cp": 2,
        "cp_window_size": 2,
        "context_parallel_kv_cache_policy": "half",
        "context_parallel_cache_interval": 3,
        "use_cp_send_recv_overlap": True,
        "cp_batch_layout": "zigzag",
        "attention_mask_type": "general",
        "use_flash_attn": True,
    }
    config = FrameworkSettings.read(values).resolve().config
    again = FrameworkSettings.read({"context_parallel_size": 8, "use_flash_attn": True}).keeping(config)
    assert again.resolve().config == config and config.kv_cache_interval == 3
    assert (config.batch_layout, config.attention_mask_type) == ("zigzag", "general")


@pytest.mark.parametrize(
    ("given", "layout"),
    [
        ({}, None),
        ({"cp_partition_mode": "contiguous"}, "contiguous"),
        ({"attention_cp_layout": "zigzag"}, "zigzag"),
        ({"cp_partition_mode": "contiguous", "attention_cp_layout": "zigzag"}, "contiguous"),
    ],
)
def test_how_a_framework_splits_batches_is_read(given, layout):
    settings = FrameworkSettings.read({"context_parallel_size": 2, **given})
    assert settings.resolve().declared_layout == layout


def test_a_layout_that_is_none_is_refused():
    with pytest.raises(ValueError, match="--cp-partition-mode spiral is not known; choose one of zigzag, contiguous"):
        FrameworkSettings.read({"cp_partition_mode": "spiral"})


def test_names_of_newer_megatrons_that_mean_nothing_here_are_said_once_each(recwarn):
    newer = {"use_flash_attn": True, "linear_cp_layout": "contiguous"}
    FrameworkSettings.read({"context_parallel_size": 2, **newer}).resolve()
    said = [str(warning.message) for warning in recwarn if "changes nothing here" in str(warning.message)]
    assert [notice.split(" changes")[0] for notice in said] == ["--linear-cp-layout contiguous"]
    recwarn.clear()
    FrameworkSettings.read({"linear_cp_layout": "zigzag", "dynamic_context_parallel": False}).resolve()
    assert not recwarn.list


ON_A_RING = {"context_parallel_size": 4, "context_parallel_algo": "megatron_cp_algo", "use_flash_attn": True}
PACKING = "dynamic_context_parallel"


@pytest.mark.parametrize(
    "given, layout, exchange, says",
    [
        ({PACKING: True, "max_seqlen_per_dp_cp_rank": 2048}, "balanced", "auto", "--dynamic-context-parallel: a doc"),
        ({"sequence_packing_scheduler": "default_dynamic_cp"}, "balanced", "auto", "--sequence-packing-scheduler: a"),
        ({PACKING: True, "cp_batch_layout": "zigzag"}, "zigzag", "auto", r"\(--cp-kv-exchange auto\)"),
        ({PACKING: True, "cp_kv_exchange": "ring"}, "balanced", "ring", r"\(--cp-batch-layout balanced\)"),
        ({PACKING: True, "cp_window_size": 2}, "balanced", "ring", "of the 4 context-parallel ranks"),
        ({PACKING: True, "context_parallel_algo": "kvallgather_cp_algo"}, "balanced", "ring", "pack_documents"),
        ({PACKING: True, "context_parallel_algo": "ulysses_cp_algo"}, "auto", "ring", "changes nothing with"),
    ],
)
def test_megatrons_names_for_packing_mean_documents_on_any_ranks(given, layout, exchange, says):
    with pytest.warns(match=says):
        config = FrameworkSettings.read({**ON_A_RING, **given}).resolve().config
    assert (config.batch_layout, config.kv_exchange) == (layout, exchange)


def test_megatrons_names_for_packing_change_nothing_on_one_rank(recwarn):
    for given in ({PACKING: True}, {"sequence_packing_scheduler": None}):
        assert FrameworkSettings.read(given).resolve().config.batch_layout == "auto"
    assert FrameworkSettings.read({**ON_A_RING, PACKING: False}).resolve().config.kv_exchange == "ring"
    assert not recwarn.list


def test_settings_that_are_neither_are_refused():
    with pytest.raises(ValueError, match="must be a namespace, a dict or a dataclass, not int"):
        FrameworkSettings.read(4)
