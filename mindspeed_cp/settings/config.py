"""``ContextParallelConfig``: the settings of fields.py, their rules, and the values that derive from them.

It knows nothing about the model; ``TrainingSetup`` (training_setup.py) contains what a launch script says about model
and machine. Errors name the flag, the value, the rule and a value that works.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from mindspeed_cp.settings import rules
from mindspeed_cp.settings.algorithms import ALGORITHMS, Algorithm, Hierarchy, known_algorithm, titled
from mindspeed_cp.settings.fields import Fields, KVCachePolicy
from mindspeed_cp.settings.layers import EXAMPLE, FLAG, LayerEntry, LayerRange, read_layers, said
from mindspeed_cp.settings.notices import warn_rank0
from mindspeed_cp.settings.setting import Setting, declarations


@dataclass(frozen=True, kw_only=True)
class ContextParallelConfig(Fields):
    """What one context-parallel group computes and how; raises ValueError for invalid combinations.

    A window of the ring's size is the plain ring: ``window_size`` becomes 1, with a notice.
    """

    def __post_init__(self) -> None:
        for each in declarations(type(self)):
            each.check(getattr(self, each.name))
        known_algorithm(self.algorithm)
        text = self.layer_algorithms
        rules.require(text is None or isinstance(text, str), f"{FLAG} {text!r} must be text; use {EXAMPLE}.")
        rules.check_kv_cache(self.context_parallel_size, self.kv_cache_policy, self.kv_cache_interval)
        rules.check_keep_attention(self.context_parallel_size, self.keep_attention)
        self._check_layers()
        for notice in self.ignored_settings():
            warn_rank0(notice)
        if self._is_one_window and not self.entries:  # each layer's own view is normalised
            object.__setattr__(self, "window_size", 1)

    def describe(self) -> str:
        """A phrase for the startup line, such as "Ring, cp=4, zigzag, causal"."""
        others = self.other_layers
        parts = [titled(others.row, others.hierarchy), f"cp={self.context_parallel_size}", self.layout_kind]
        parts += [self.attention_mask_type, *others.ways()]
        parts += self.said_by_layer()
        if self.linear_exchange == "state":
            parts.append("states of linear layers from rank to rank")
        if self.keep_attention:
            parts.append("attention kept across recomputation")
        return ", ".join([*parts, *(["logged"] if self.log else [])])

    def said_by_layer(self) -> list[str]:
        """The layers with their own settings, such as "layers 5-/6: Ulysses"; equal settings are one item."""
        found: dict[str, list[LayerRange]] = {}
        for entry, config in zip(self.entries, self.entry_configs):
            text = ", ".join([titled(config.row, config.hierarchy), *config.ways()])
            found.setdefault(text, []).append(entry.layers)
        return [f"{said(ranges)}: {text}" for text, ranges in found.items()]

    def ways(self) -> list[str]:
        """The settings other than the algorithm, as phrases, if they are not the default."""
        said = {
            f"{self.kv_exchange} exchange": self.kv_exchange != "ring",
            f"{self.in_flight} steps in flight": self.in_flight != 1 and self._takes_several_steps,
            f"MLA sends {'heads' if self.mla_exchange == 'heads' else 'latents'}": self.mla_exchange != "auto",
            f"{self.ulysses_chunks} groups of heads": self.ulysses_chunks > 1 and self.row.splits_heads,
            "single messages": self.p2p == "isend" and self.row.exchange == "ring",
            f"kv cache {self.kv_cache_policy}": self.kv_cache_policy is not None,
        }
        return [part for part, holds in said.items() if holds]

    @property
    def row(self) -> Algorithm:
        """The algorithm's row of the table."""
        return ALGORITHMS[self.algorithm]

    @property
    def _ring_of_window(self) -> int:
        """Size of the ring that a window must divide; used before the hierarchy, which needs a valid window."""
        return self.context_parallel_size // (self.ulysses_degree or 1 if self.row.takes_degree else 1)

    @property
    def _is_one_window(self) -> bool:
        return self.row.takes_window and self.window_size == self._ring_of_window > 1

    # Layers that have settings of their own.

    @classmethod
    def by_layer(cls) -> tuple[Setting, ...]:
        """The settings that layers may have of their own, beside the algorithm."""
        return tuple(each for each in declarations(cls) if each.by_layer is not None)

    @property
    def named_layers(self) -> tuple[LayerEntry, ...]:
        """The entries of --cp-layer-algo, none without it."""
        return () if self.layer_algorithms is None else _layered(self)[0]

    @property
    def entries(self) -> tuple[LayerEntry, ...]:
        """The entries of --cp-layer-algo, none with context-parallel size 1."""
        return self.named_layers if self.context_parallel_size > 1 else ()

    @property
    def entry_configs(self) -> tuple["ContextParallelConfig", ...]:
        """The settings of each entry's layers."""
        return _layered(self)[1] if self.entries else ()

    @property
    def other_layers(self) -> "ContextParallelConfig":
        """The settings of the layers without an entry."""
        return _layered(self)[2] if self.entries else self

    @property
    def layer_configs(self) -> tuple["ContextParallelConfig", ...]:
        """The different settings of all layers; those of the layers without an entry come first."""
        return tuple(dict.fromkeys((self.other_layers, *self.entry_configs)))

    def of_layer(self, layer_number: int) -> "ContextParallelConfig":
        """The settings of a layer (global number, from 1, as in Megatron)."""
        for entry, config in zip(self.entries, self.entry_configs):
            if layer_number - 1 in entry.layers:
                return config
        return self.other_layers

    def used_by(self, num_layers: int | None) -> tuple["ContextParallelConfig", ...]:
        """The different settings of the first ``num_layers`` layers; of all layers if None."""
        if num_layers is None or not self.entries:
            return self.layer_configs
        return tuple(dict.fromkeys(map(self.of_layer, range(1, num_layers + 1))))

    def takes_any_length(self, num_layers: int | None) -> bool:
        """Whether these layers take lengths that are no multiple of the ranks, without a gather-size calculator."""
        return all(config.row.any_length for config in self.used_by(num_layers))

    def layers_of(self, config: "ContextParallelConfig") -> list[LayerRange]:
        """The layers of the entries with the settings ``config``; none if the layers without an entry have them too."""
        if config == self.other_layers:
            return []
        return [entry.layers for entry, each in zip(self.entries, self.entry_configs) if each == config]

    def fitted(self, entry: LayerEntry | None) -> "ContextParallelConfig":
        """The settings of an entry's layers: its own, else this configuration's if the layers' algorithm uses them.

        Raises:
            ValueError: the entry names a setting that its algorithm does not use.
        """
        named = {} if entry is None else entry.named
        row = ALGORITHMS[named.get("algorithm", self.algorithm)]
        unused = [each for each in self.by_layer() if each.by_layer and not each.by_layer(row)]
        for each in unused:
            rules.require(
                each.name not in named,
                f"{FLAG} {entry and entry.layers}: {each.flag.removeprefix('--')} means nothing to {row.title}; leave "
                "it out there.",
            )
        return self._with({each.name: each.default for each in unused} | named | {"layer_algorithms": None})

    def _with(self, values: Mapping[str, Any]) -> "ContextParallelConfig":
        """A copy with other values, without checks and notices."""
        made = object.__new__(type(self))
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        vars(made).update(fields | dict(values))
        if made._is_one_window:
            vars(made)["window_size"] = 1
        return made

    def _check_layers(self) -> None:
        """Check the rules of every layer's algorithm; messages name the layers.

        The run's own is checked even if an entry names every layer, because groups and layouts are made from it.
        """
        (self.fitted(None) if self.entries else self)._check_algorithm()
        for entry, config in zip(self.entries, self.entry_configs):
            with rules.said_of(f"{FLAG} {entry.layers}"):
                config._check_algorithm()

    def _check_algorithm(self) -> None:
        rules.check_degree(self.algorithm, self.context_parallel_size, self.ulysses_degree)
        rules.check_window(self.row, self.window_size, self._ring_of_window)
        rules.check_exchange(self.algorithm, self.kv_exchange, 1 if self._is_one_window else self.window_size)
        rules.check_allgather(self.algorithm, self.allgather_kv)

    # Ignored settings.

    def ignored_settings(self) -> list[str]:
        """Warnings about settings that the algorithms of all layers ignore, or an entry's that its own ignores."""
        views = [self._with({"layer_algorithms": None, **entry.named}) for entry in self.entries]
        first, *others = [view._ignored() for view in (self, *views)]
        of_run = [message for name, message in first.items() if all(name in ignored for ignored in others)]
        of_entries = [
            f"{FLAG} {entry.layers}: {message}"
            for entry, config in zip(self.entries, self.entry_configs)
            for name, message in config._ignored().items()
            if name in entry.named
        ]
        return of_run + of_entries

    def _ignored(self) -> dict[str, str]:
        """Field -> warning, for the settings that this algorithm ignores."""
        settings = declarations(type(self))
        notices = {each.name: each.notice(getattr(self, each.name), self.algorithm) for each in settings}
        found = {name: message for name, message in notices.items() if message}
        return found | {name: message for name, (applies, message) in self._ignored_with_others().items() if applies}

    def _ignored_with_others(self) -> dict[str, tuple[bool, str]]:
        """Field -> (whether other settings make it ineffective, warning)."""
        algorithm, alone = f"--context-parallel-algo {self.algorithm}", self.context_parallel_size == 1
        return {
            "window_size": (
                self._is_one_window,
                f"--cp-window-size {self.window_size} is one window of all {self.window_size} ranks of the ring: the "
                "plain ring.",
            ),
            "batch_layout": (
                self.batch_layout == "balanced" and self.row.exchange is None and not alone,
                f"--cp-batch-layout balanced is contiguous for {algorithm}, whose ranks have equal work anyway.",
            ),
            "p2p": (
                self.p2p != "auto" and self.kv_exchange == "mesh",
                f"--cp-p2p {self.p2p} is ignored: the mesh exchange sends no messages between single ranks.",
            ),
            "in_flight": (
                self.in_flight not in (1, "auto") and not self._takes_several_steps,
                f"--cp-in-flight {self.in_flight} is ignored: a plain ring forwards one step at a time.",
            ),
            "topology": (
                "auto" not in (self.kv_exchange, self.in_flight) and self.topology != "auto",
                f"--cp-topology {self.topology} is ignored: neither --cp-kv-exchange nor --cp-in-flight is auto.",
            ),
            "ranks_per_node": (
                self.ranks_per_node is not None and not self._may_be_balanced,
                f"--cp-ranks-per-node {self.ranks_per_node} is ignored: only the balanced layout of a ring reads it.",
            ),
            "log": (
                self.log and alone,
                "--cp-log says nothing at --context-parallel-size 1 without --hybrid-context-parallel.",
            ),
            "layer_algorithms": (
                self.layer_algorithms is not None and alone,
                f"{FLAG} says nothing at --context-parallel-size 1 without --hybrid-context-parallel.",
            ),
        }

    @property
    def _takes_several_steps(self) -> bool:
        return self.row.exchange == "ring" and (self.kv_exchange != "ring" or self.hierarchy[2] > 1)

    @property
    def hierarchy(self) -> Hierarchy:
        """(ulysses, window, windows), whose product is context_parallel_size; it determines the algorithm."""
        return self.row.hierarchy(self)

    @property
    def ring_size(self) -> int:
        return self.context_parallel_size // self.hierarchy[0]

    # The layout of a batch, which all layers share.

    @property
    def batch_degree(self) -> int:
        """Number of consecutive ranks that form one rank of the ring over which the layout is balanced.

        It is the greatest common divisor of the Ulysses degrees of all layers with a ring, so that the layout is
        balanced for each of these rings.
        """
        rings = [config.hierarchy[0] for config in self.layer_configs if config.ring_size > 1]
        return math.gcd(*rings) if rings else self.context_parallel_size

    @property
    def batch_ring(self) -> int:
        """Size of the ring over which the layout is balanced."""
        return self.context_parallel_size // self.batch_degree

    @property
    def ring_ranks_per_node(self) -> int | None:
        """Number of ranks of this ring per node, None if unknown."""
        return None if self.ranks_per_node is None else max(1, self.ranks_per_node // self.batch_degree)

    @property
    def _may_be_balanced(self) -> bool:
        return self.batch_ring > 1 and (
            self.batch_layout == "balanced" or self.batch_layout == "auto" and self.layout_kind == "zigzag"
        )

    @property
    def causal(self) -> bool:
        """Whether a layer is causal if the batch contains no mask."""
        return self.attention_mask_type != "full"

    @property
    def layout_kind(self) -> Literal["contiguous", "zigzag", "document_zigzag", "balanced"]:
        """The layout kind for ``batch_layout``; "auto" is zigzag if a layer has a causal ring, else contiguous."""
        if self.batch_layout == "balanced" and self.batch_ring == 1:
            return "contiguous"
        if self.batch_layout != "auto":
            return self.batch_layout
        return "zigzag" if self.batch_ring > 1 and self.causal else "contiguous"

    def kv_cache_policy_for(self, layer_number: int) -> KVCachePolicy | None:
        """The policy of a layer (global number, from 1); interval n applies it to layers with layer % (n + 1) == 1."""
        return self.kv_cache_policy if (layer_number - 1) % (self.kv_cache_interval + 1) == 0 else None


@lru_cache(maxsize=256)
def _layered(
    config: ContextParallelConfig,
) -> tuple[tuple[LayerEntry, ...], tuple[ContextParallelConfig, ...], ContextParallelConfig]:
    """(The entries of --cp-layer-algo, their settings, those of the other layers)."""
    assert config.layer_algorithms is not None
    named = read_layers(config.layer_algorithms, config.by_layer())
    if config.context_parallel_size == 1:
        return named, (), config
    # Where an entry names every layer, no layer has the run's own settings.
    every = [config.fitted(entry) for entry in named if entry.layers == LayerRange(0, None)]
    return named, tuple(map(config.fitted, named)), (*every, config.fitted(None))[0]
