"""Who computes attention at context-parallel size 1, and what is said about it."""

import pytest
import torch

from mindspeed_cp import ContextParallelConfig
from mindspeed_cp.arguments import FrameworkSettings
from mindspeed_cp.megatron.adaptor import Adaptor
from mindspeed_cp.megatron.alone import Scores, alone, memory_of
from mindspeed_cp.megatron.following import configure, configure_from
from mindspeed_cp.settings.training_setup import TrainingSetup

CARD = 64 << 30
LONG = Scores(batch=1, heads=32, queries=32768, keys=32768, itemsize=2)
SHORT = LONG._replace(queries=1024, keys=1024)


def decide(scores, **changes):
    return alone(scores, **{**dict(asked=True, device="npu", packed=False, memory=CARD), **changes})


def test_the_flag_means_the_kernel_on_an_npu_and_where_scores_do_not_fit():
    assert decide(SHORT) == decide(LONG) == decide(LONG, device="cuda") == (True, "")
    assert decide(SHORT, device="cuda", packed=True).fused
    assert decide(SHORT, device="cuda") == decide(SHORT, device="cpu") == (False, "")


@pytest.mark.parametrize("device", ["cpu", "cuda", "npu"])
@pytest.mark.parametrize("packed", [False, True])
def test_without_the_flag_nothing_changes_and_large_scores_are_named(device, packed):
    assert decide(SHORT, asked=False, device=device, packed=packed) == (False, "")
    fused, line = decide(LONG, asked=False, device=device, packed=packed)
    assert not fused
    assert "68.7 GB of scores" in line and "68.7 GB;" in line and line.endswith("add --use-flash-attn.")


def test_the_line_begins_above_a_tenth_of_the_memory():
    assert decide(LONG, asked=False, memory=LONG.num_bytes * 10) == (False, "")
    assert decide(LONG, asked=False, memory=LONG.num_bytes * 10 - 1).line


def test_a_call_that_the_kernel_refuses_stays_with_the_module_and_says_why():
    why = "attention_bias is not one of the kernel's arguments"
    assert decide(SHORT, refusal=why) == (False, f"--use-flash-attn changes nothing here: {why}.")
    assert decide(SHORT, device="cpu", refusal=why) == (False, "")  # the module would have computed it anyhow
    fused, line = decide(LONG, refusal=why)
    assert not fused and why in line and "68.7 GB of scores" in line and "add --use-flash-attn" not in line


def test_scores_larger_than_the_memory_are_an_error_that_offers_what_helps():
    for asked, refusal in ((False, ""), (True, "it has a bias")):
        with pytest.raises(ValueError, match="68.7 GB of scores.*--context-parallel-size") as caught:
            decide(LONG, asked=asked, refusal=refusal, memory=LONG.num_bytes - 1)
        assert ("add --use-flash-attn, or" in str(caught.value)) is not asked
    assert decide(LONG, memory=LONG.num_bytes - 1).fused


def test_scores_are_those_of_the_tensors():
    query, key = torch.empty(5, 2, 8, 4, dtype=torch.bfloat16), torch.empty(7, 2, 2, 4, dtype=torch.bfloat16)
    assert Scores.of(query, key) == (2, 8, 5, 7, 2)
    assert Scores.of(query[:, 0], key[:, 0]) == (1, 8, 5, 7, 2)
    assert Scores.of(query, key).num_bytes == 2 * 8 * 5 * 7 * 2


@pytest.mark.filterwarnings("ignore::mindspeed_cp.settings.notices.ContextParallelWarning")
@pytest.mark.parametrize("asked", [True, False])
def test_whoever_configures_says_whether_the_flag_was_asked_for(asked):
    def found(take, *given, **more):
        take(adaptor := Adaptor(), *given, **more)
        return adaptor.settings.asked_for_flash

    one = ContextParallelConfig(context_parallel_size=1)
    assert found(configure, one, setup=TrainingSetup(asked_for_flash=asked)) is asked
    for size in ({}, {"context_parallel_size": 1}, {"context_parallel_size": 2, "num_attention_heads": 4}):
        assert found(configure_from, FrameworkSettings.read({"use_flash_attn": asked, **size})) is asked
    assert not found(configure, one) and not found(configure, one, setup=TrainingSetup())


def test_the_memory_of_the_host_is_found():
    assert memory_of(torch.device("cpu")) > 1 << 28
