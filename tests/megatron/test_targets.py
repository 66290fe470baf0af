"""Instruction datasets of MindSpeed-LLM: no target is lost or changed where a rank's part of the sequence ends."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from adaptors import RING, adaptor_of

from mindspeed_cp import ContextParallelConfig
from mindspeed_cp.megatron import targets
from mindspeed_cp.patches import batches, losses, models

pytestmark = pytest.mark.cpu_only
ULYSSES = ContextParallelConfig(context_parallel_size=2)
SEQ = 8
TOKENS = torch.stack([torch.arange(SEQ), 10 + torch.arange(SEQ)])
LABELS = torch.where(TOKENS % 10 > 2, TOKENS, -100)  # a prompt of three tokens


class Model(torch.nn.Module):
    """What MindSpeed-LLM's model does with labels; a token's "logits" are the token itself."""

    config = SimpleNamespace(context_parallel_size=2, calculate_per_token_loss=False)

    def __init__(self, args):
        super().__init__()
        self.args = args

    def forward(self, input_ids, labels, loss_mask):
        if self.args.is_instruction_dataset:
            return list(zip(input_ids[:, :-1].flatten().tolist(), labels[:, 1:].flatten().tolist(), strict=True))
        return list(zip(input_ids.flatten().tolist(), labels.flatten().tolist(), strict=True))


class Entered(Model):
    """The model behind this project's door."""

    def __init__(self, adaptor, args):
        super().__init__(args)
        self.adaptor = adaptor

    def __call__(self, *given):
        return models.language_module_call(self.adaptor, Model.forward, self, *given)


def counted(loss_mask, pairs):
    """[(token, target)] that count in the trainer's loss, which leaves out the first entry of the mask."""
    mask = loss_mask[..., 1:].flatten().tolist()
    return [pair for pair, counts in zip(pairs, mask, strict=True) if counts]


def forward_step(batch, model):
    return model(batch["tokens"], batch["labels"], batch["loss_mask"]), partial(counted, batch["loss_mask"])


def schedule(step, batch, model):
    pairs, loss_func = step(batch, model)
    return loss_func(pairs)


def batch_of():
    return {"tokens": TOKENS, "labels": LABELS, "loss_mask": torch.where(LABELS == -100, 0, 1), "attention_mask": None}


def of_rank(config, rank, monkeypatch):
    args = SimpleNamespace(is_instruction_dataset=True, context_parallel_size=2)
    adaptor = adaptor_of(config, cp_rank=rank)
    adaptor.settings.moving_targets = args
    local = batches.get_batch_on_this_cp_rank(adaptor, lambda batch, cp_group=None: batch, batch_of())
    record = adaptor.records.find([local["tokens"]])
    monkeypatch.setattr(models, "_entered", lambda *args: record)
    monkeypatch.setattr(models, "_is_untouched", lambda *args: False)
    found = losses.forward_step(adaptor, schedule, forward_step, local, Entered(adaptor, args))
    assert args.is_instruction_dataset, "its other readers see what they saw"
    return found


@pytest.mark.parametrize("config", [RING, ULYSSES], ids=["Ring", "Ulysses"])
def test_every_target_of_the_whole_row_is_a_ranks(config, monkeypatch):
    wanted = schedule(forward_step, batch_of(), Model(SimpleNamespace(is_instruction_dataset=True)))
    assert wanted == [(token, token + 1) for row in (0, 10) for token in range(row + 2, row + SEQ - 1)]
    assert sorted(sum((of_rank(config, rank, monkeypatch) for rank in range(2)), [])) == wanted


def test_a_stage_in_the_middle_of_a_pipeline_has_no_mask():
    loss_func = partial(counted, None)
    assert targets.with_an_entry_in_front(loss_func) is loss_func


def args_of(**more):
    return SimpleNamespace(**{"context_parallel_size": 2, "stage": "sft", "is_instruction_dataset": True, **more})


def test_whose_targets_the_model_moves():
    assert targets.moved_by_the_model(args_of())
    assert not targets.moved_by_the_model(args_of(is_instruction_dataset=False))
    assert not targets.moved_by_the_model(args_of(context_parallel_size=1, stage="dpo"))
    assert not targets.moved_by_the_model(SimpleNamespace(context_parallel_size=2))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"stage": "dpo", "is_instruction_dataset": False}, "--stage dpo of MindSpeed-LLM moves the targets"),
        (
            {"schedules_method": "dualpipev"},
            "--is-instruction-dataset with --schedules-method: .* leave --sched.* out, or",
        ),
        ({"layerwise_disaggregated_training": True}, "leave --layerwise-disaggregated-training out"),
    ],
)
def test_ways_through_the_model_that_lose_targets_are_refused_with_a_way_out(more, said):
    with pytest.raises(ValueError, match=said):
        targets.moved_by_the_model(args_of(**more))
