"""Targets of MindSpeed-LLM's instruction datasets, which its model moves by one token.

The labels of these datasets are the tokens themselves. MindSpeed-LLM's model leaves out the first label and the logits
of the last token, and its trainer the first entry of the loss mask. Done within a rank's part, that loses the target of
the part's last token, and takes another token's where the part has several runs. Here labels and mask are moved in the
whole row, before it is split; the model is told that they are the targets already; and the mask that the trainer gets
has an entry in front, to be left out.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.functional import pad

IGNORED = {"labels": -100, "loss_mask": 0}  # what the last token of a row has: it has no target
_LOSES = "moves the targets by one token within a rank's part of the sequence, and loses those at the ends of the parts"
# MindSpeed-LLM's other ways through a model, which move targets somewhere else: setting -> flag.
_OTHER_WAYS = {
    "schedules_method": "--schedules-method",
    "layerwise_disaggregated_training": "--layerwise-disaggregated-training",
}


def moved_by_the_model(args: Any) -> bool:
    """Whether MindSpeed-LLM's model moves the targets of batches that are split, by Megatron's arguments.

    Raises:
        ValueError: it does so in a way that cannot be told to leave it.
    """
    if args.context_parallel_size == 1:
        return False
    if getattr(args, "stage", None) == "dpo" or getattr(args, "is_pairwise_dataset", False):
        raise ValueError(
            f"--stage dpo of MindSpeed-LLM {_LOSES}; use --context-parallel-size 1. (MINDSPEED_CP=off leaves context "
            "parallelism to MindSpeed, which loses them too.)"
        )
    if not getattr(args, "is_instruction_dataset", False):
        return False
    for name, flag in _OTHER_WAYS.items():
        if getattr(args, name, None):
            raise ValueError(
                f"--is-instruction-dataset with {flag}: MindSpeed-LLM {_LOSES}; leave {flag} out, or use "
                "--context-parallel-size 1."
            )
    return True


def moved(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """name -> labels and loss mask (b, S) of a whole batch, each token's those of the next one."""
    given = {name: batch.get(name) for name in IGNORED}
    return {
        name: pad(value[:, 1:], (0, 1), value=IGNORED[name])
        for name, value in given.items()
        if isinstance(value, torch.Tensor)
    }


def with_an_entry_in_front(loss_func: Any) -> Any:
    """The trainer's loss function, a partial with the mask (b, n) of a rank's part, with one (b, n + 1).

    A stage in the middle of a pipeline has no mask, and computes no loss.
    """
    mask, *others = loss_func.args
    return loss_func if mask is None else partial(loss_func.func, pad(mask, (1, 0)), *others, **loss_func.keywords)


@contextmanager
def left_where_they_are(args: Any) -> Iterator[None]:
    """Tell MindSpeed-LLM's model inside the block to take labels as the targets.

    Args:
        args: what megatron.training.get_args returns, None where there is no model of MindSpeed-LLM.
    """
    if args is None:
        yield
        return
    args.is_instruction_dataset = False
    try:
        yield
    finally:
        args.is_instruction_dataset = True
