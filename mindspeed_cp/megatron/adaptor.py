"""What the adaptor knows between two calls of Megatron: settings, groups, the batches under way."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any
from weakref import WeakSet

import torch.distributed as dist

from mindspeed_cp.attention.kept import KeptAttention
from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.comm.parts import PoolKey
from mindspeed_cp.comm.step_log import ContextParallelLog
from mindspeed_cp.megatron import batches, splitting
from mindspeed_cp.megatron.decision import OpenDecision, Settings
from mindspeed_cp.megatron.documents import BoundaryCache, MaskCache
from mindspeed_cp.megatron.foreign import Foreign
from mindspeed_cp.megatron.handed_ends import Handed
from mindspeed_cp.megatron.hccl import hccl_buffers
from mindspeed_cp.megatron.later_stages import HandOver
from mindspeed_cp.megatron.losses import Losses
from mindspeed_cp.megatron.own_loops import OwnLoops
from mindspeed_cp.megatron.records import BatchRecords, Documents, MicroBatch, Places
from mindspeed_cp.megatron.scopes import Scope, Scopes, checked_group, collective_device, named_group, own_group
from mindspeed_cp.megatron.sizes import ranks_of_all
from mindspeed_cp.megatron.start import agree_in_group
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.training_setup import TrainingSetup


class Adaptor(OwnLoops):
    """The one mutable object of the adaptor; ``megatron_adaptor.state()`` returns it.

    Attributes:
        settings: what was configured.
        scopes: process group -> what is computed over it.
        sizes: size -> scope, where Megatron's dynamic context parallelism gives every micro-batch one of its own.
        records: where the record of a batch is found again.
        masks, boundaries: what was read of the masks and of the packed boundaries under way.
        tables: which embeddings hold this rank's own rows already.
        foreign: the layouts of batches that others split.
        handed: document ends that a framework hands over beside the batch.
        hand_over: what later pipeline stages learn of a batch.
        active: record of the forward pass that runs now; None outside.
        entered: the model whose forward pass runs now; None outside.
        kept: KeptAttention of the checkpoint whose function runs now, where --cp-keep-attention asks for it.
        is_pipeline: there is more than one pipeline stage: stages then split the same batch knowing different parts of
            it, and must come to the same layout.
        timeout, virtual_pipeline: for groups that are made; as initialize_model_parallel was told.
        log: measures the steps of training with --cp-log, as long as there are groups; None without.
        counted: models whose modules were looked up in the census, and blocks of layers beside them.
        losses: what is known of the losses of the training.
        embedded: length -> layout and position ids with which Megatron's cache holds an embedding of that length.
        documents_by_hand: documents were given for a batch by hand, so that a forward pass of no known batch would lose
            them.
        sliced: a batch with slices was split, or one of several documents over one rank: what is alone, too, then
            follows the records of batches.
        computes_alone: what runs now is split over nobody, whatever group it names.
        told: what was said before the first batch, "" until then.
        on_change: called whenever a cached embedding may have become wrong.
        epoch: how often groups were forgotten.
    """

    def __init__(
        self,
        say: Callable[[ContextParallelConfig], None] = lambda config: None,
        check: Callable[[], None] = lambda: None,
        tell: Callable[[MicroBatch], str] = lambda record: "",
    ) -> None:
        self.settings = Settings()
        self.scopes = Scopes(self._adopt)
        self.sizes: dict[int, Scope] = {}
        self.records, self.tables, self.foreign = BatchRecords(), BatchRecords(), Foreign()
        self.masks, self.boundaries = MaskCache(), BoundaryCache()
        self.handed, self.hand_over, self.losses = Handed(), HandOver(self), Losses()
        self.counted: WeakSet[Any] = WeakSet()
        self.active: MicroBatch | None = None
        self.entered: Any = None
        self.kept: KeptAttention | None = None
        self.log: ContextParallelLog | None = None
        self.is_pipeline, self.virtual_pipeline, self.epoch = False, False, 0
        self.timeout: timedelta | None = None
        self.embedded: dict[int, tuple[SequenceLayout, Places | None] | None] = {}
        self.computes_alone, self.documents_by_hand, self.sliced, self._passes = False, False, False, 0
        self._pool: dict[PoolKey, dist.ProcessGroup] = {}
        self.on_change: list[Callable[[], None]] = []
        self._say, self._check, self._tell = say, check, tell
        self._is_checked, self.told = False, ""
        self._announced: ContextParallelConfig | None = None

    # What was set.

    @property
    def config(self) -> ContextParallelConfig | None:
        """The configuration of the micro-batch that runs, else what was configured."""
        scope = self.active.scope if self.active is not None and self.sizes else None
        return self.settings.config if scope is None else scope.config

    @property
    def setup(self) -> TrainingSetup | None:
        return self.settings.setup

    @property
    def kernel(self) -> str | None:
        return self.settings.kernel

    @property
    def end_of_document(self) -> int | Callable[[], int] | None:
        """The token behind which a document ends; may be set until a batch is split."""
        return self.settings.end_of_document

    @end_of_document.setter
    def end_of_document(self, token: int | Callable[[], int] | None) -> None:
        self.settings.end_of_document = token

    def reset(self) -> None:
        """Forget everything, as after the import; groups that Megatron or others made are adopted again when used."""
        self.settings = Settings()
        self.scopes.forget()
        self.sizes, self.log, self.handed = {}, None, Handed()  # pipelines stay
        self._announced, self._is_checked, self.told = None, False, ""
        self.losses = Losses()
        self.epoch += 1
        self.forget_batches()

    def forget_batches(self) -> None:
        self.active, self.documents_by_hand, self.sliced = None, False, False
        self.embedded.clear()
        self.records.clear()
        self.foreign.clear()
        self.masks.clear()
        for call in self.on_change:
            call()

    # Over which ranks.

    def _adopt(self, group: dist.ProcessGroup) -> Scope:
        config = self.settings.config_of_size(group.size())
        ranks = dist.get_process_group_ranks(group)
        agree_in_group(config, self.settings, ranks)
        groups = ContextParallelGroups.adopt(
            config,
            group,
            pool=self._pool,
            timeout=self.timeout,
            virtual_pipeline=self.virtual_pipeline,
            buffers=hccl_buffers(config, self.setup),
        )
        for call in self.on_change:
            call()
        return Scope(config, groups)

    def announce(self, config: ContextParallelConfig) -> None:
        """Say once what is on: when it was decided and its groups are there, else when a model first computes by it."""
        if config != self._announced and config.context_parallel_size > 1:
            self._announced = config
            self._say(config)

    def make_groups(self, group: dist.ProcessGroup, config: ContextParallelConfig) -> Scope:
        """The scope of a group that every rank of the world has one like; collective over the world."""
        groups = ContextParallelGroups.build(
            config,
            ranks_of_all(group),
            timeout=self.timeout,
            cp_group=group,
            virtual_pipeline=self.virtual_pipeline,
            buffers=hccl_buffers(config, self.setup),
        )
        scope = Scope(config, groups)
        self.scopes.put(group, scope)
        return scope

    @property
    def adopted_main(self) -> Scope | None:
        """The scope of Megatron's own group where it was adopted."""
        return self.scopes.known(own_group())

    @property
    def main(self) -> Scope:
        """The scope of Megatron's own group, or of the only group there is; of one rank without any."""
        group = own_group()
        if group is not None:
            return self.scopes.of(group)
        known = list(self.scopes)
        return known[0] if len(known) == 1 else self.scopes.alone

    @property
    def current(self) -> Scope:
        """The scope of the forward pass that runs, else the main one."""
        scope = self.active.scope if self.active is not None else None
        return self.main if scope is None else scope

    def scope_of_group(self, group: dist.ProcessGroup | None) -> Scope:
        """The scope of a group that was named, of Megatron's own where None is given."""
        return self.main if group is None else self.scopes.of(group)

    def scope_of(self, module: Any) -> Scope:
        """The scope over which ``module`` computes, by its configuration and the group that it was built with.

        Raises:
            ValueError: its configuration asks for a group, and there is none or one of another size.
        """
        size = module.config.context_parallel_size
        if size == 1:
            return self.scopes.alone
        group = named_group(module)
        if group is None:
            group = own_group()
        return self.scopes.of(checked_group(size, group, type(module).__name__))

    def running_in(self, scope: Scope) -> MicroBatch | None:
        """The record of the forward pass that runs, where that was split over ``scope``."""
        return self.active if self.active is not None and self.active.scope is scope else None

    @property
    def groups(self) -> ContextParallelGroups | None:
        """Of Megatron's own context-parallel group, or of the micro-batch that runs; None where there is none."""
        scope = self.current
        return None if scope.alone and not self.sizes else scope.groups

    @property
    def cp_size(self) -> int:
        return self.current.size

    @property
    def cp_rank(self) -> int:
        return self.current.rank

    @property
    def alone(self) -> bool:
        """Whether no sequence is ever split, nor has slices, so that everything is left to Megatron."""
        return not self.scopes and not self.sizes and not self.sliced

    def measure(self, config: ContextParallelConfig, group: dist.ProcessGroup) -> None:
        """With --cp-log, measure the steps and compare the ranks of each ``group``; collective over the world."""
        if config.log:
            self.log = ContextParallelLog(ranks_of_all(group), collective_device(group))

    def destroy_groups(self) -> None:
        """Release what was made beside Megatron's groups; every rank calls it."""
        self.scopes.destroy()
        self.log, self.sizes, self.is_pipeline = None, {}, False
        self._announced, self._is_checked, self.told = None, False, ""
        self.losses = Losses()
        self.epoch += 1
        if self.settings.undecided is not None:
            self.settings.undecided = OpenDecision(self.settings.undecided.settings)
        self.forget_batches()

    # The batches under way.

    def layout(self, seq_len: int, documents: Documents | None = None, scope: Scope | None = None) -> SequenceLayout:
        """The SequenceLayout of the configuration for a sequence that this project splits.

        Raises:
            ValueError: aligned Ulysses cannot split this length, a rank would get no token, or the layout goes by
                documents and the rows of the batch differ in theirs.
        """
        return splitting.layout(self, self.current if scope is None else scope, seq_len, documents)

    @contextmanager
    def running(self, record: MicroBatch | None) -> Iterator[None]:
        """Make ``record`` the one that layers see inside the block: the explicit way to hand it over."""
        before, self.active = self.active, record if record is None else batches.placed(record, self)
        try:
            yield
        finally:
            self.active = before

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, seeing the record of now whenever it runs: recomputation runs after later batches."""
        record, alone = self.active, self.computes_alone

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.running(record), self.computing_alone(alone):
                return function(*args, **kwargs)

        return call

    @contextmanager
    def inside(self, model: Any, record: MicroBatch | None) -> Iterator[None]:
        """The forward pass of ``model`` runs inside the block, with this record; None computes alone."""
        self.batch_begins(record)
        before, self.entered = self.entered, model
        try:
            with self.running(record), self.computing_alone(record is None and self.scope_of(model).alone):
                yield
        finally:
            self.entered = before

    @contextmanager
    def computing_alone(self, alone: bool = True) -> Iterator[None]:
        """Split embeddings over nobody inside the block; what is not ``alone`` over whom its record names."""
        before, self.computes_alone = self.computes_alone, alone
        try:
            yield
        finally:
            self.computes_alone = before

    def forward_pass_begins(self) -> None:
        """What was read of masks in earlier passes is not believed any more; before the first pass every patch that
        counts is asked whether its name is still ours.
        """
        self._passes += 1
        if not self._is_checked:
            self._check()
            self._is_checked = True

    def batch_begins(self, record: MicroBatch | None) -> None:
        """Tell, before the first batch that is split over several ranks, what is on."""
        if not self.told and record is not None and record.layout.cp_size > 1:
            self.told = self._tell(record)

    @property
    def forward_pass(self) -> int | None:
        """Number of the forward pass of a model that runs; None outside of any."""
        return None if self.active is None else self._passes
