"""MindSpeed's flags that launch scripts carry: those that change nothing here, and values that are refused.

What MindSpeed calls a flag is its argparse ``dest`` as well, so the table also serves namespaces and dicts.
"""

from dataclasses import dataclass
from typing import Any

GROUP_TITLE = "accepted from MindSpeed (mindspeed_cp), without effect"
ALGORITHM_FLAG = "--context-parallel-algo"

_ADAPTIVE = (
    "it reorders tokens to suit one dense mask; here blocks that a mask empties are skipped for every algorithm: "
    "take {way_out} with --cp-kv-exchange direct"
)
REFUSED_ALGORITHMS = {
    "adaptive_cp_algo": _ADAPTIVE.format(way_out="megatron_cp_algo"),
    "hybrid_adaptive_cp_algo": _ADAPTIVE.format(way_out="hybrid_cp_algo with --ulysses-degree-in-cp"),
    "mamba_cp_algo": "it belongs to MindSpeed-LLM's own Mamba layers; Megatron's (megatron.core.ssm) run with every "
    "algorithm: take ulysses_cp_algo",
}


@dataclass(frozen=True)
class Accepted:
    """A flag without effect.

    Args:
        why: why it changes nothing, for the notice.
        number: the flag takes a whole number, which is ``default`` when it is not given; else it is a switch.
    """

    why: str
    number: bool = False

    @property
    def default(self) -> int | bool:
        return -1 if self.number else False


_BELONGS = "it belongs to adaptive_cp_algo"
ACCEPTED_FLAGS = {
    "--fix-sub-seq-length": Accepted(
        "documents end where the batch says; MindSpeed cuts at fixed lengths to test speed, and calls the loss "
        "unreliable then",
        number=True,
    ),
    "--kv-head-repeat-before-uly-alltoall": Accepted("KV heads are replicated as far as needed and no further"),
    "--megatron-cp-in-bnsd": Accepted("the layout of the operator is the kernel's business"),
    "--attention-mask-on-cpu": Accepted(
        "no mask of the size of the sequence is built for causal, full, packed or windowed attention"
    ),
    "--adaptive-cp-without-coarse": Accepted(_BELONGS),
    "--adaptive-cp-dynamic-attn-mask": Accepted(_BELONGS),
    "--adaptive-cp-only-reschedule": Accepted(_BELONGS),
    "--adaptive-cp-manually-set-mask-list": Accepted(_BELONGS),
}


def refusal_of_algorithm(name: Any) -> str | None:
    """Why MindSpeed's algorithm ``name`` is refused, None for every other name."""
    why = REFUSED_ALGORITHMS.get(name) if isinstance(name, str) else None
    return None if why is None else f"{ALGORITHM_FLAG} {name} is not supported: {why}."


def refusal_of_positions(value: Any) -> str | None:
    """Why --position-embedding-type alibi is refused, None for every other value."""
    if value != "alibi":
        return None
    return (
        "--position-embedding-type alibi is not supported: its bias is a matrix of the size of the sequence, which no "
        "kernel here takes; use --position-embedding-type rope."
    )


def dest_of(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def notices_of_accepted(settings: Any) -> list[str]:
    """One notice for each flag of ``ACCEPTED_FLAGS`` that the namespace ``settings`` carries."""
    notices = []
    for flag, row in ACCEPTED_FLAGS.items():
        value = getattr(settings, dest_of(flag), None)
        if value is None or value is False or (row.number and int(value) <= 0):
            continue
        notices.append(f"{flag}{f' {value}' if row.number else ''} changes nothing here: {row.why}.")
    return notices


def add_accepted_flags(parser, number):
    """Add ``ACCEPTED_FLAGS`` as far as ``parser`` does not have them; ``number(flag)`` converts a value."""
    free = [flag for flag in ACCEPTED_FLAGS if flag not in parser._option_string_actions]
    group = parser.add_argument_group(GROUP_TITLE) if free else None
    for flag in free:
        row = ACCEPTED_FLAGS[flag]
        takes = {"type": number(flag), "metavar": "N"} if row.number else {"action": "store_true"}
        group.add_argument(flag, default=row.default, help=f"accepted, and said once: {row.why}.", **takes)


def refuse_alibi(parser, fail):
    """Where ``parser`` does not know alibi, as Megatron's, refuse it in one line instead of the usage of all flags."""
    action = parser._option_string_actions.get("--position-embedding-type")
    if action is None or not action.choices or "alibi" in action.choices:
        return
    convert = action.type or str

    def checked(text):
        refusal = refusal_of_positions(text)
        if refusal:
            fail(parser, refusal)
        return convert(text)

    action.type = checked
