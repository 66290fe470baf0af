"""The performance rows of tests/check verify_runs: sizes that fit the device, one training for each algorithm."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

HIDDEN = (4096, 2048, 1024, 512, 256, 128, 64)
LENGTHS = (32768, 16384, 8192, 4096, 2048, 1024, 512, 256)
LAYERS = 4
SHARE = 0.6  # of the free memory: the rest is for communicators, temporary tensors and fragments
BYTES_A_PARAMETER = 18  # bf16 weight, float32 gradient, master weight and Adam's two moments
BYTES_A_TOKEN = 34  # of activations, times the width, a layer; nothing is recomputed
WARM_UP, STEPS = 3, 8

HEAD = (
    "| algorithm | median step, ms | TFLOPS a device | beyond data parallelism | bytes sent a rank and step | peak "
    "memory, GiB |",
    "|---|---|---|---|---|---|",
)


class Shape(NamedTuple):
    hidden: int
    length: int
    layers: int = LAYERS

    @property
    def heads(self) -> int:
        return max(8, self.hidden // 128)

    @property
    def num_bytes(self) -> int:
        """Memory of one device that trains one whole sequence by itself, with fused attention."""
        parameters = 12 * self.hidden**2 * self.layers
        return parameters * BYTES_A_PARAMETER + BYTES_A_TOKEN * self.length * self.hidden * self.layers

    def flops(self, sequences: int) -> int:
        """Forward and backward: 6 operations a parameter and token, and causal attention's 6 x hidden x length."""
        tokens = self.length * sequences
        return tokens * self.layers * (6 * 12 * self.hidden**2 + 6 * self.hidden * self.length)

    @property
    def flags(self) -> list[str]:
        sizes = f"--num-layers {self.layers} --hidden-size {self.hidden} --num-attention-heads {self.heads}"
        return f"{sizes} --seq-length {self.length}".split()


def shape_for(free: int) -> Shape:
    """The widest model, then the longest sequence, that one device with ``free`` bytes trains by itself.

    A width is taken where its shortest worthwhile sequence, of 8 tokens for each 4 of its width, fits.
    """
    for hidden in HIDDEN:
        for length in LENGTHS:
            if length >= 2 * hidden and Shape(hidden, length).num_bytes <= SHARE * free:
                return Shape(hidden, length)
    return Shape(HIDDEN[-1], LENGTHS[-1])


def rows(
    shape: Shape, ranks: int, names: Iterable[str], train: Callable[[str], list[dict[str, Any]]], failure: type
) -> Iterable[tuple[str, str]]:
    """(row of the table, what was said of a failure) of every run; the first one is what the others are compared with.

    Args:
        train: name of a run -> its step records.
        failure: the exception of a run that failed; it costs this row alone.
    """
    base = None
    for name in names:
        try:
            records = train(name)[WARM_UP:]
        except failure as error:
            yield f"| {name} | failed | | | | |", f"{name}: {error}"
            continue
        seconds = statistics.median(record["seconds"] for record in records)
        sent = statistics.median(record["cp_bytes_per_rank"] for record in records)
        peak = max(record.get("peak_memory_bytes", 0) for record in records) / 2**30
        base = seconds if base is None and name == "data parallelism" else base
        beyond = "" if base is None else f"{seconds / base - 1:+.1%}"
        tflops = shape.flops(ranks) / seconds / ranks / 1e12
        cells = f"{seconds * 1e3:.0f} | {tflops:.2f} | {beyond} | {sent:,.0f} | {peak:.2f}"
        yield f"| {name} | {cells} |", ""
