"""Layers with their own settings (--cp-layer-algo, lists of --cp-comm-type), for fewer layers and fewer ranks."""

from collections.abc import Sequence
from typing import Any

from mindspeed_cp.prove.words import Words
from mindspeed_cp.settings.algorithms import ALGORITHMS
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.layers import FLAG, LayerEntry, LayerRange, read_layers, written

KINDS = "--cp-comm-type"
Kind = tuple[tuple[str, Any], ...] | str  # a layer's settings in FLAG, or its entry in KINDS


def kinds_of(words: Words, num_layers: int) -> dict[str, list[Kind]]:
    """flag -> settings of each layer; layers of multi-token prediction follow after the others."""
    found: dict[str, list[Kind]] = {}
    entries = _entries(words)
    if entries:
        numbers = range(num_layers + words.number("--mtp-num-layers", 0))
        found[FLAG] = [next((entry.values for entry in entries if layer in entry.layers), ()) for layer in numbers]
    kinds = words.values(KINDS) or []
    if len(kinds) > 1:
        found[KINDS] = [kinds[min(layer, len(kinds) - 1)] for layer in range(num_layers)]
    return found


def write(words: Words, flag: str, kinds: Sequence[Kind]) -> None:
    """Set a flag to the settings of each layer."""
    if flag == KINDS:
        words.set(flag, *kinds)
        return
    entries = [(LayerRange(layer, layer), dict(kind)) for layer, kind in enumerate(kinds) if not isinstance(kind, str)]
    named = [(layer, values) for layer, values in entries if values]
    words.drop([flag])
    if named:
        words.set(flag, written(named, ContextParallelConfig.by_layer()))


def takes_degree(algorithm: str) -> bool:
    """Whether an algorithm has two levels, one of which splits heads; False for a name that is not known."""
    return algorithm in ALGORITHMS and ALGORITHMS[algorithm].takes_degree


def has_levels(words: Words) -> bool:
    """Whether the algorithm of a layer has two levels."""
    named = [entry.named for entry in _entries(words)]
    return any(takes_degree(values.get("algorithm", "")) or values.get("window_size", 1) > 1 for values in named)


def fit(words: Words, cp: int, algorithm: str, degree: int) -> None:
    """Adapt the degrees and windows of layers to the number of ranks.

    Args:
        algorithm, degree: those of the run, for layers that name none.
    """
    entries = []
    for entry in _entries(words):
        values = entry.named
        if "ulysses_degree" in values:
            values["ulysses_degree"] = divisor(values["ulysses_degree"], cp)
        if values.get("window_size", 1) > 1:
            splits_heads = takes_degree(values.get("algorithm", algorithm))
            ring = cp // values.get("ulysses_degree", degree) if splits_heads else cp
            values["window_size"] = divisor(values["window_size"], ring)
        entries.append((entry.layers, values))
    if entries:
        words.set(FLAG, written(entries, ContextParallelConfig.by_layer()))


def _entries(words: Words) -> tuple[LayerEntry, ...]:
    text = words.text(FLAG)
    return read_layers(text, ContextParallelConfig.by_layer()) if text else ()


def divisor(value: int, size: int) -> int:
    """The largest divisor of ``size`` up to ``value``, and smaller than ``size`` where there is one."""
    fits = [number for number in range(1, size + 1) if size % number == 0 and number <= value]
    return max([number for number in fits if 1 < number < size] or fits)
