"""The framed block that is printed right before the first step and says what is on, as a pure function."""

from dataclasses import dataclass

WIDTH = 110  # of the longest line


@dataclass(frozen=True)
class Start:
    """The contents of the block.

    Args:
        setting: the configuration's description, such as "Ring, cp=4, zigzag, causal".
        sizes: size of every kind of parallelism, such as {"tp": 2, "pp": 1, "cp": 4, "dp": 1}.
        seq_length, lengths: tokens per sequence, and per rank (fewest, most).
        layout: which tokens a rank holds, and how many of them travel around layers that need another layout.
        kernel: attention kernel. exchange: how keys and values, or heads, travel.
        documents: what attention does with the documents of a batch, such as "kept apart".
        patches: (number of patches that are alive, number that were applied).
    """

    setting: str
    sizes: dict[str, int]
    seq_length: int
    lengths: tuple[int, int]
    layout: str
    kernel: str
    exchange: str
    documents: str
    patches: tuple[int, int]


def start_block(start: Start, has_log: bool = False) -> str:
    """The block as text, without a final newline.

    Args:
        has_log: whether --cp-log is on, whose lines in every interval then replace the hint to it.
    """
    shortest, longest = start.lengths
    tokens = f"{longest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
    alive, applied = start.patches
    patches = f"all {applied}" if alive == applied else f"{alive} of {applied}"
    gone = "" if alive == applied else ": somebody replaced the others"
    look = "time to hide in the lines of --cp-log" if has_log else "--cp-log says what every interval waits for"
    rows = {
        "on": start.setting,
        "sizes": " x ".join(f"{name} {size}" for name, size in start.sizes.items()),
        "tokens": f"{start.seq_length:,} of a sequence, {tokens} on a rank, {start.layout}; documents "
        f"{start.documents}",
        "kernel": f"{start.kernel}; {start.exchange}",
        "patches": f"{patches} alive{gone}",
        "look at": f"{look}; python -m mindspeed_cp.doctor",
    }
    lines = [f"| {name:<8}{text}" for name, text in rows.items()]
    cut = [line if len(line) <= WIDTH else line[: WIDTH - 3] + "..." for line in lines]
    frame = "+-- context parallelism " + "-" * 40
    return "\n".join([frame, *cut, "+" + "-" * (len(frame) - 1)])
