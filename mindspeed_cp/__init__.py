"""Context parallelism for Megatron-LM: Ulysses, unaligned Ulysses, Ring, Double Ring, Hybrid and KV all-gather.

Importing this package changes nothing outside it; ``import mindspeed_cp.megatron_adaptor`` patches Megatron.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_cp.version import __version__ as __version__

# patches/ and arguments/ are top-level folders of the repository, with links to them inside this package. A checkout on
# Windows or an unpacked archive may have plain files instead of the links.
if not (Path(__file__).parent / "patches").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from mindspeed_cp.attention.entry import context_parallel_attention
    from mindspeed_cp.attention.expansion import LatentExpansion
    from mindspeed_cp.attention.kept import KeptAttention
    from mindspeed_cp.attention.ulysses_attention import (
        DefaultGatherSizeCalculator,
        DynamicGatherSizeCalculator,
        GatherSizeCalculator,
        UlyssesContextAttention,
    )
    from mindspeed_cp.comm.groups import ContextParallelGroups
    from mindspeed_cp.sequence.layout import SequenceLayout
    from mindspeed_cp.sequence.packing import pack_documents
    from mindspeed_cp.sequence.sharding import gather_sequence, shard_batch
    from mindspeed_cp.sequence.trees import PackedTree, pack_tree
    from mindspeed_cp.settings.config import ContextParallelConfig
    from mindspeed_cp.settings.training_setup import TrainingSetup, resolve

__all__ = [
    "ContextParallelConfig",
    "ContextParallelGroups",
    "DefaultGatherSizeCalculator",
    "DynamicGatherSizeCalculator",
    "GatherSizeCalculator",
    "KeptAttention",
    "LatentExpansion",
    "PackedTree",
    "SequenceLayout",
    "TrainingSetup",
    "UlyssesContextAttention",
    "context_parallel_attention",
    "gather_sequence",
    "pack_documents",
    "pack_tree",
    "resolve",
    "shard_batch",
]
_HOMES = (
    "mindspeed_cp.attention.expansion",
    "mindspeed_cp.attention.kept",
    "mindspeed_cp.attention.ulysses_attention",
    "mindspeed_cp.attention.entry",
    "mindspeed_cp.settings.config",
    "mindspeed_cp.settings.training_setup",
    "mindspeed_cp.comm.groups",
    "mindspeed_cp.sequence.layout",
    "mindspeed_cp.sequence.packing",
    "mindspeed_cp.sequence.sharding",
    "mindspeed_cp.sequence.trees",
)


def __getattr__(name: str) -> Any:
    """Import public names at their first use, because the doctor must start even if torch does not load."""
    if not name.startswith("_"):
        for home in _HOMES:
            module = import_module(home)
            if name in __all__ and name in vars(module):
                globals()[name] = vars(module)[name]
        if name in globals():  # or a module imported with them, such as mindspeed_cp.comm
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
