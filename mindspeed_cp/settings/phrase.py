"""What a configuration says of itself in one phrase: what is on and what is not as by default."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mindspeed_cp.settings.config import ContextParallelConfig


def phrase(config: "ContextParallelConfig") -> str:
    """Such as "Ring, cp=4, zigzag, causal"."""
    said = {
        f"{config.kv_exchange} exchange": config.kv_exchange != "ring",
        f"{config.in_flight} steps in flight": config.in_flight != 1 and config.takes_several_steps,
        "MLA sends heads": config.mla_exchange == "heads",
        "MLA sends latents": config.mla_exchange == "latent",
        f"{config.ulysses_chunks} groups of heads": config.ulysses_chunks > 1 and config.row.splits_heads,
        "single messages": config.p2p == "isend" and config.row.exchange == "ring",
        f"kv cache {config.kv_cache_policy}": config.kv_cache_policy is not None,
        "attention kept across recomputation": config.keep_attention,
        "logged": config.log,
    }
    always = [_name(config), f"cp={config.context_parallel_size}", config.layout_kind, config.attention_mask_type]
    return ", ".join([*always, *(part for part, holds in said.items() if holds)])


def _name(config: "ContextParallelConfig") -> str:
    ulysses, window, windows = config.hierarchy
    name = config.row.title
    if windows > 1:
        return f"Double {name} (window {window})" if ulysses == 1 else f"{name} (ulysses {ulysses}, window {window})"
    return f"{name} (ulysses {ulysses}, ring {window})" if 1 < ulysses < config.context_parallel_size else name
