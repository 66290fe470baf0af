"""The meaning of Megatron's flags for dynamic context parallelism, documents on any number of ranks.

Megatron assigns groups of ranks to each micro batch by the lengths of its documents. Here one row is split over all
context-parallel ranks, and the balanced layout gives each document as many of them as it needs.
"""

from collections.abc import Mapping
from typing import Any

from mindspeed_cp.settings.algorithms import ALGORITHMS, names_with
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.layers import read_layers

NAMES = ("dynamic_context_parallel", "sequence_packing_scheduler")


def documents_on_any_ranks(args: Any, values: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The settings that follow from the flags in NAMES unless they were given, and a notice about them.

    Args:
        args: parsed flags. values: the configuration's values by field.
    """
    asked = next((name for name in NAMES if getattr(args, name, None)), None)
    if asked is None or values["context_parallel_size"] == 1:
        return {}, ""
    flag, exchanges = f"--{asked.replace('_', '-')}", _exchanges(values)
    if exchanges == {None}:
        rings = names_with(takes_window=True)
        return {}, f"{flag} changes nothing with --context-parallel-algo {values['algorithm']}; use {rings}."
    changed: dict[str, Any] = {}
    if values["batch_layout"] == "auto":
        changed["batch_layout"] = "balanced"
    given = "cp_kv_exchange" in getattr(args, "cp_given", ())
    if "ring" in exchanges and values["window_size"] == 1 and values["kv_exchange"] == "ring" and not given:
        changed["kv_exchange"] = "auto"
    said = ", ".join(f"--cp-{name.replace('_', '-')} {value}" for name, value in changed.items()) or "as configured"
    return changed, (
        f"{flag}: a document lies on as many of the {values['context_parallel_size']} context-parallel ranks as it "
        f"needs ({said}); let --context-parallel-size be all ranks of a pipeline stage / tensor-parallel size, and "
        "fill rows with mindspeed_cp.pack_documents."
    )


def _exchanges(values: Mapping[str, Any]) -> set[str | None]:
    """How keys and values travel in some layer; None in those that are Ulysses alone."""
    layers = values.get("layer_algorithms")
    entries = read_layers(layers, ContextParallelConfig.by_layer()) if layers else ()
    named = [entry.named.get("algorithm", values["algorithm"]) for entry in entries]
    return {ALGORITHMS[name].exchange for name in (values["algorithm"], *named)}
