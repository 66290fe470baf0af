"""Context parallelism for Megatron-LM: Ulysses, unaligned Ulysses, Ring, Double Ring, Hybrid and KV all-gather.

Importing this package changes nothing outside it; ``import mindspeed_cp.megatron_adaptor`` patches Megatron.
"""

from pathlib import Path

# In a bare checkout patches/ and arguments/ lie beside this package; an installation has them inside it.
if not (Path(__file__).parent / "patches").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

from mindspeed_cp.algorithms.kept import KeptAttention
from mindspeed_cp.algorithms.ulysses_attention import (
    DefaultGatherSizeCalculator,
    DynamicGatherSizeCalculator,
    GatherSizeCalculator,
    UlyssesContextAttention,
)
from mindspeed_cp.api import context_parallel_attention
from mindspeed_cp.config import ContextParallelConfig, TrainingSetup, resolve
from mindspeed_cp.groups import ContextParallelGroups
from mindspeed_cp.layout import SequenceLayout
from mindspeed_cp.sharding import gather_sequence, shard_batch

__version__ = "0.1.0"
__all__ = [
    "ContextParallelConfig",
    "ContextParallelGroups",
    "DefaultGatherSizeCalculator",
    "DynamicGatherSizeCalculator",
    "GatherSizeCalculator",
    "KeptAttention",
    "SequenceLayout",
    "TrainingSetup",
    "UlyssesContextAttention",
    "context_parallel_attention",
    "gather_sequence",
    "resolve",
    "shard_batch",
]
