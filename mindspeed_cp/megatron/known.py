"""The interface of the Adaptor for functions of this package that the Adaptor itself imports."""

from typing import Any, Protocol

import torch
import torch.distributed as dist

from mindspeed_cp.megatron.decision import Settings
from mindspeed_cp.megatron.documents import BoundaryCache, Handed
from mindspeed_cp.megatron.losses import Losses
from mindspeed_cp.megatron.records import BatchRecords, Documents, MicroBatch
from mindspeed_cp.megatron.scopes import Scope, Scopes
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.training_setup import TrainingSetup


class ForeignLayouts(Protocol):
    """The layouts of batches that others split (``foreign.Foreign``)."""

    def record(
        self,
        adaptor: "Known",
        scope: Scope,
        ids: torch.Tensor | None,
        tokens: torch.Tensor | None,
        declared: str,
        length: int | None = None,
    ) -> MicroBatch: ...

    def packed(
        self, scope: Scope, ids: torch.Tensor, padded: tuple[int, ...], documents: tuple[int, ...], preferred: str
    ) -> SequenceLayout: ...


class LaterStages(Protocol):
    """Passes the record of a batch to later pipeline stages (``later_stages.HandOver``)."""

    def first(self, model: Any, scope: Scope, record: MicroBatch) -> MicroBatch: ...
    def later(self, model: Any, scope: Scope, record: MicroBatch | None) -> MicroBatch | None: ...


class Known(Protocol):
    """Attributes and methods of ``adaptor.Adaptor``, which documents them."""

    settings: Settings
    sizes: dict[int, Scope]
    records: BatchRecords
    boundaries: BoundaryCache
    handed: Handed
    active: MicroBatch | None
    is_pipeline: bool
    documents_by_hand: bool
    sliced: bool
    epoch: int
    losses: Losses

    @property
    def scopes(self) -> Scopes: ...
    @property
    def foreign(self) -> ForeignLayouts: ...
    @property
    def hand_over(self) -> LaterStages: ...
    @property
    def alone(self) -> bool: ...
    @property
    def setup(self) -> TrainingSetup | None: ...
    @property
    def current(self) -> Scope: ...
    @property
    def main(self) -> Scope: ...
    def scope_of(self, module: Any) -> Scope: ...
    def running_in(self, scope: Scope) -> MicroBatch | None: ...
    def make_groups(self, group: dist.ProcessGroup, config: ContextParallelConfig) -> Scope: ...
    def layout(
        self, seq_len: int, documents: Documents | None = None, scope: Scope | None = None
    ) -> SequenceLayout: ...
