"""Flags from launch scripts for MindSpeed: some have no effect here, and one value is rejected."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from mindspeed_cp.settings.setting import BY_NAME, Setting, setting

GROUP_TITLE = "accepted from MindSpeed (mindspeed_cp), without effect"


def without_effect(default: int | bool, why: str) -> Any:
    return setting(default, flag=BY_NAME, takes="N", without_effect=why, agree=False, shares=False)


_BELONGS = "it belongs to adaptive_cp_algo"


@dataclass(frozen=True, kw_only=True)
class WithoutEffect:
    """Flags that have no effect here, and why."""

    fix_sub_seq_length: int = without_effect(
        -1,
        "documents end where the batch says; MindSpeed cuts at fixed lengths to test speed, and calls the loss "
        "unreliable then",
    )
    kv_head_repeat_before_uly_alltoall: bool = without_effect(False, "KV heads are replicated only as far as needed")
    megatron_cp_in_bnsd: bool = without_effect(False, "the kernel selects the layout of the operator")
    attention_mask_on_cpu: bool = without_effect(
        False, "no mask of the size of the sequence is built for causal, full, packed or windowed attention"
    )
    adaptive_cp_without_coarse: bool = without_effect(False, _BELONGS)
    adaptive_cp_dynamic_attn_mask: bool = without_effect(False, _BELONGS)
    adaptive_cp_only_reschedule: bool = without_effect(False, _BELONGS)
    adaptive_cp_manually_set_mask_list: bool = without_effect(False, _BELONGS)


def refusal_of_positions(value: Any) -> str | None:
    """Why --position-embedding-type alibi is rejected; None for every other value."""
    if value != "alibi":
        return None
    return (
        "--position-embedding-type alibi is not supported: its bias is a matrix of the size of the sequence, which no "
        "kernel here takes; use --position-embedding-type rope."
    )


def notices_of_accepted(args: Any, settings: Iterable[Setting]) -> list[str]:
    """One notice for each of ``settings`` that has no effect here and that is set in the namespace ``args``."""
    notices = []
    for each in settings:
        value = getattr(args, each.dest, None)
        if not each.without_effect or value in (None, False, each.default) or (each.whole and int(value) <= 0):
            continue
        notices.append(f"{each.said(value)} changes nothing here: {each.without_effect}.")
    return notices


def refuse_alibi(parser: argparse.ArgumentParser, fail: Callable[[argparse.ArgumentParser, str], NoReturn]) -> None:
    """If ``parser`` does not know alibi (as Megatron's), reject it with one line instead of the usage of all flags."""
    action = parser._option_string_actions.get("--position-embedding-type")
    if action is None or not action.choices or "alibi" in action.choices:
        return
    convert = action.type if callable(action.type) else str

    def checked(text: str) -> Any:
        refusal = refusal_of_positions(text)
        if refusal:
            fail(parser, refusal)
        return convert(text)

    action.type = checked
