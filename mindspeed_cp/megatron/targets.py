"""Targets of MindSpeed-LLM's instruction datasets, which its model shifts by one token.

The labels of these datasets are the tokens themselves. MindSpeed-LLM's model leaves out the first label and the logits
of the last token, and its trainer the first entry of the loss mask. Within a rank's part, this loses the target of the
part's last token, and uses a wrong token if the part has several runs. Here labels and mask are shifted in the whole
row, before it is split; the model is told that labels already are the targets; and the trainer's mask gets an
additional first entry, which it leaves out.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.functional import pad

IGNORED = {"labels": -100, "loss_mask": 0}  # values for the last token of a row, which has no target
_LOSES = "moves the targets by one token within a rank's part of the sequence, and loses those at the ends of the parts"
# Flags with which MindSpeed-LLM shifts targets in other code.
_OTHER_WAYS = ("--schedules-method", "--layerwise-disaggregated-training")


def moved_by_the_model(args: Any) -> bool:
    """Whether MindSpeed-LLM's model shifts the targets of split batches, according to Megatron's arguments.

    Raises:
        ValueError: it does so in code that cannot be told not to.
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
    for flag in _OTHER_WAYS:
        if getattr(args, flag.strip("-").replace("-", "_"), None):
            raise ValueError(
                f"--is-instruction-dataset with {flag}: MindSpeed-LLM {_LOSES}; leave {flag} out, or use "
                "--context-parallel-size 1."
            )
    return True


def moved(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return labels and loss mask (b, S) of a whole batch by name, shifted so that each token has the next one's."""
    given = {name: batch.get(name) for name in IGNORED}
    return {
        name: pad(value[:, 1:], (0, 1), value=IGNORED[name])
        for name, value in given.items()
        if isinstance(value, torch.Tensor)
    }


def with_an_entry_in_front(loss_func: Any) -> Any:
    """Return the trainer's loss function, a partial with a rank's mask (b, n), with a mask (b, n + 1) instead.

    A stage in the middle of a pipeline has no mask, and computes no loss.
    """
    mask, *others = loss_func.args
    return loss_func if mask is None else partial(loss_func.func, pad(mask, (1, 0)), *others, **loss_func.keywords)


@contextmanager
def left_where_they_are(args: Any) -> Iterator[None]:
    """Within the block, make MindSpeed-LLM's model use labels as the targets.

    Args:
        args: result of megatron.training.get_args, None without a model of MindSpeed-LLM.
    """
    if args is None:
        yield
        return
    args.is_instruction_dataset = False
    try:
        yield
    finally:
        args.is_instruction_dataset = True
