"""The grammar of --cp-layer-algo, which gives some layers settings of their own.

Entries LAYERS:SETTINGS, separated by commas::

    0-3:ulysses_cp_algo              layers 0 to 3
    4-:megatron_cp_algo              layer 4 and all after it
    5-/6:ulysses_cp_algo             every sixth layer from 5 on: 5, 11, 17 ...
    0-/2:cp-kv-exchange=direct       every second layer, with the algorithm of the run

Layers are counted from 0 over the whole model. Settings are an algorithm, flags without their dashes, or both.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mindspeed_cp.settings.algorithms import known_algorithm
from mindspeed_cp.settings.rules import consecutive, listed, require, said_of
from mindspeed_cp.settings.setting import Setting

FLAG = "--cp-layer-algo"
EXAMPLE = f'{FLAG} "0-3:ulysses_cp_algo,4-:megatron_cp_algo"'
_LAYERS = re.compile(r"([0-9]{1,6})(?:(-)([0-9]{1,6})?(?:/([0-9]{1,6}))?)?")


@dataclass(frozen=True)
class LayerRange:
    """Layers ``first``, ``first + step`` ... up to ``last``, counted from 0; None is the last layer of the model."""

    first: int
    last: int | None
    step: int = 1

    def __contains__(self, layer: int) -> bool:
        return (
            layer >= self.first and (self.last is None or layer <= self.last) and (layer - self.first) % self.step == 0
        )

    def __str__(self) -> str:
        if self.first == self.last:
            return str(self.first)
        return f"{self.first}-{'' if self.last is None else self.last}{f'/{self.step}' if self.step > 1 else ''}"

    @classmethod
    def read(cls, text: str) -> "LayerRange":
        """The range that ``text`` describes; raises ValueError if it describes none."""
        match = _LAYERS.fullmatch(text)
        require(match, f"{text} names no layers; write 3, 0-3, 4- or 5-/6 (every sixth from 5), counted from 0.")
        assert match is not None
        first, dash, last, step = match.groups()
        found = cls(int(first), int(last) if last else None if dash else int(first), int(step or 1))
        require(found.step > 0, f"the step behind / of {text} must be at least 1; leave it out for every layer.")
        require(
            found.last is None or found.last >= found.first,
            f"the last layer of {text} comes before the first; write {found.last}-{found.first}.",
        )
        return found

    def meets(self, other: "LayerRange") -> int | None:
        """The first layer that both ranges contain; None if there is none."""
        low = max(self.first, other.first)
        start = low + (self.first - low) % self.step
        both = range(start, start + math.lcm(self.step, other.step), self.step)
        return next((layer for layer in both if layer in self and layer in other), None)


@dataclass(frozen=True)
class LayerEntry:
    """A range of layers, and its own settings as (field of the configuration, value)."""

    layers: LayerRange
    values: tuple[tuple[str, Any], ...]

    @property
    def named(self) -> dict[str, Any]:
        return dict(self.values)


def read_layers(text: str, settings: Sequence[Setting]) -> tuple[LayerEntry, ...]:
    """The entries of --cp-layer-algo.

    Args:
        settings: those that a layer may have.

    Raises:
        ValueError: the text does not follow the grammar, or two entries name one layer; the message says what to write.
    """
    require(isinstance(text, str), f"{FLAG} {text!r} must be text; use {EXAMPLE}.")
    entries = []
    for part in map(str.strip, text.split(",")):
        with said_of(f"{FLAG} {part or '(empty)'}"):
            entries.append(_entry(part, settings))
    for index, entry in enumerate(entries):
        for other in entries[:index]:
            layer = entry.layers.meets(other.layers)
            require(
                layer is None,
                f"{FLAG} {other.layers} and {entry.layers} both name layer {layer}; name each layer once.",
            )
    return tuple(entries)


def _entry(text: str, settings: Sequence[Setting]) -> LayerEntry:
    layers, *parts = [part.strip() for part in text.split(":")]
    require(
        parts and all(parts),
        f"an entry is LAYERS:ALGORITHM, with further settings as :flag=value; use {EXAMPLE}.",
    )
    values: dict[str, Any] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        field, read = _option(name, value, settings) if equals else ("algorithm", known_algorithm(part))
        require(field not in values, f"{name if equals else 'the algorithm'} is there twice; name it once.")
        values[field] = read
    return LayerEntry(LayerRange.read(layers), tuple(values.items()))


def _option(name: str, value: str, settings: Sequence[Setting]) -> tuple[str, Any]:
    for each in settings:
        if each.flag == f"--{name}":
            require(
                not each.switch or value in ("true", "false"),
                f"{name}={value} is no switch; use {name}=true or {name}=false.",
            )
            return each.name, value == "true" if each.switch else each.value_of(value)
    names = listed(each.flag.removeprefix("--") for each in settings)
    raise ValueError(f"{name}={value} is no setting of a layer; choose {names}, or give --{name} for all.")


def written(entries: Iterable[tuple[LayerRange, Mapping[str, Any]]], settings: Sequence[Setting]) -> str:
    """The text of entries (layers, field -> value), which ``read_layers`` reads again."""
    flags = {each.name: each.flag.removeprefix("--") for each in settings}

    def words(layers: LayerRange, values: Mapping[str, Any]) -> Iterator[str]:
        yield str(layers)
        if "algorithm" in values:
            yield str(values["algorithm"])
        for field, value in values.items():
            if field != "algorithm":
                yield f"{flags[field]}={str(value).lower() if isinstance(value, bool) else value}"

    return ",".join(":".join(words(*entry)) for entry in entries)


def ranges_of(layers: Sequence[int]) -> list[LayerRange]:
    """Ascending layers as ranges: one range with a step if they are evenly spaced, else runs."""
    step = layers[1] - layers[0] if len(layers) > 2 else 1
    if step > 1 and list(layers) == list(range(layers[0], layers[-1] + 1, step)):
        return [LayerRange(layers[0], layers[-1], step)]
    return [LayerRange(run[0], run[-1]) for run in consecutive(layers)]


def said(layers: Sequence[LayerRange]) -> str:
    """ "layer 3", "layers 0-3 and 5-/6"."""
    several = len(layers) > 1 or layers[0].first != layers[0].last
    return f"layer{'s' if several else ''} {' and '.join(map(str, layers))}"
