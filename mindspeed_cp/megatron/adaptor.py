"""The adaptor's state between calls from Megatron: settings, groups, current batches."""

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
from mindspeed_cp.megatron.documents import BoundaryCache, Handed, MaskCache
from mindspeed_cp.megatron.foreign import Foreign
from mindspeed_cp.megatron.later_stages import HandOver
from mindspeed_cp.megatron.losses import Losses
from mindspeed_cp.megatron.own_loops import OwnLoops
from mindspeed_cp.megatron.records import BatchRecords, Documents, MicroBatch, Places
from mindspeed_cp.megatron.scopes import Scope, Scopes, collective_device, group_of, own_group
from mindspeed_cp.megatron.sizes import ranks_of_all
from mindspeed_cp.megatron.start import agree_in_group, hccl_buffers
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.settings.config import ContextParallelConfig
from mindspeed_cp.settings.training_setup import TrainingSetup


class Adaptor(OwnLoops):
    """The only mutable object of the adaptor; ``megatron_adaptor.state()`` returns it.

    Attributes:
        settings: what was configured.
        scopes: process group -> Scope.
        sizes: size -> Scope, if Megatron's dynamic context parallelism gives every micro-batch its own size.
        records: finds the record of a batch.
        masks, boundaries: caches of what was read from the current masks and packed boundaries.
        tables: the embeddings that already hold this rank's own rows.
        foreign: the layouts of batches that others split.
        handed: document ends that a framework passes separately from the batch.
        hand_over: passes the record of a batch to later pipeline stages.
        active: record of the running forward pass, else None.
        entered: the model whose forward pass is running, else None.
        kept: with --cp-keep-attention, the KeptAttention of the checkpoint whose function is running.
        is_pipeline: there are several pipeline stages, which see different parts of a batch but must split it alike.
        timeout, virtual_pipeline: arguments of initialize_model_parallel, used for new groups.
        buffers: HCCL buffer size in MB by the name of a Megatron process group, used when Megatron creates it.
        log: measures training steps with --cp-log while there are groups, else None.
        counted: models, and separate blocks of layers, whose modules were checked by the census.
        losses: what is known about the losses of the training.
        embedded: (id of a rotary embedding, length) -> layout, position ids and rank of its rows in Megatron's cache.
        documents_by_hand: documents were passed for a batch explicitly, so that a forward pass of an unknown batch
            would lose them.
        sliced: a batch with slices was split, or one with several documents over one rank, so that modules without
            context parallelism must use its record too.
        computes_alone: the running code is not split, whatever group it names.
        told: the text that was printed before the first batch, "" until then.
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
        self.buffers: dict[str, int] = {}
        self.embedded: dict[tuple[int, int], tuple[SequenceLayout, Places | None, int] | None] = {}
        self.computes_alone, self.documents_by_hand, self.sliced, self._passes = False, False, False, 0
        self._pool: dict[PoolKey, dist.ProcessGroup] = {}
        self.on_change: list[Callable[[], None]] = []
        self._say, self._check, self._tell = say, check, tell
        self._is_checked, self.told = False, ""
        self._announced: ContextParallelConfig | None = None

    # What was set.

    @property
    def config(self) -> ContextParallelConfig | None:
        """The configuration of the running micro-batch, else the configured one."""
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
        """The last token of each document; may be set until a batch is split."""
        return self.settings.end_of_document

    @end_of_document.setter
    def end_of_document(self, token: int | Callable[[], int] | None) -> None:
        self.settings.end_of_document = token

    def reset(self) -> None:
        """Reset to the state after import; groups that Megatron or others made are adopted again when used."""
        self.settings, self.handed = Settings(), Handed()
        self.scopes.forget()
        self._start_again()  # pipelines stay

    def _start_again(self) -> None:
        """Forget what depends on groups."""
        self.sizes, self.log = {}, None
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
        """Print the configuration once: when it is decided and its groups exist, or when a model first uses it."""
        if config != self._announced and config.context_parallel_size > 1:
            self._announced = config
            self._say(config)

    def make_groups(self, group: dist.ProcessGroup, config: ContextParallelConfig) -> Scope:
        """Make the scope of a group; collective over the world, every rank of which passes such a group of its own."""
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
        """The scope of Megatron's own group, if it was adopted."""
        return self.scopes.known(own_group())

    @property
    def main(self) -> Scope:
        """The scope of Megatron's own group, or of the only group; the scope of one rank if there is none."""
        group = own_group()
        if group is not None:
            return self.scopes.of(group)
        known = list(self.scopes)
        return known[0] if len(known) == 1 else self.scopes.alone

    @property
    def current(self) -> Scope:
        """The scope of the running forward pass, else the main one."""
        scope = self.active.scope if self.active is not None else None
        return self.main if scope is None else scope

    def scope_of_group(self, group: dist.ProcessGroup | None) -> Scope:
        """The scope of ``group``, or of Megatron's own group if None."""
        return self.main if group is None else self.scopes.of(group)

    def scope_of(self, module: Any) -> Scope:
        """The scope over which ``module`` computes, from its configuration and the group that it was built with.

        Raises:
            ValueError: its configuration needs a group, but there is none, or it has another size.
        """
        return self.scopes.of(group_of(module, module.config.context_parallel_size, type(module).__name__))

    def running_in(self, scope: Scope) -> MicroBatch | None:
        """The record of the running forward pass, if its batch was split over ``scope``."""
        return self.active if self.active is not None and self.active.scope is scope else None

    @property
    def groups(self) -> ContextParallelGroups | None:
        """The groups of Megatron's own context-parallel group, or of the running micro-batch; None if not split."""
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
        """Whether no sequence is ever split or has slices, so that everything is left to Megatron."""
        return not self.scopes and not self.sizes and not self.sliced

    def measure(self, config: ContextParallelConfig, group: dist.ProcessGroup) -> None:
        """With --cp-log, start measuring steps and comparing the ranks of ``group``; collective over the world."""
        if config.log:
            self.log = ContextParallelLog(ranks_of_all(group), collective_device(group))

    def destroy_groups(self) -> None:
        """Destroy the groups that were made in addition to Megatron's; every rank calls it."""
        self.scopes.destroy()
        self.is_pipeline = False
        if self.settings.undecided is not None:
            self.settings.undecided = OpenDecision(self.settings.undecided.settings)
        self._start_again()

    # Current batches.

    def layout(self, seq_len: int, documents: Documents | None = None, scope: Scope | None = None) -> SequenceLayout:
        """The SequenceLayout of the configuration for a sequence that this project splits.

        Raises:
            ValueError: aligned Ulysses cannot split this length, a rank would get no token, or the layout depends on
                documents, which differ between the rows of the batch.
        """
        return splitting.layout(self, self.current if scope is None else scope, seq_len, documents)

    @contextmanager
    def running(self, record: MicroBatch | None) -> Iterator[None]:
        """Context manager that makes ``record`` the one that layers use; the explicit way to pass a record."""
        before, self.active = self.active, record if record is None else batches.placed(record, self)
        try:
            yield
        finally:
            self.active = before

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Bind the current record to ``function``, since recomputation runs after later batches."""
        record, alone = self.active, self.computes_alone

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.running(record), self.computing_alone(alone):
                return function(*args, **kwargs)

        return call

    @contextmanager
    def inside(self, model: Any, record: MicroBatch | None) -> Iterator[None]:
        """Context manager for the forward pass of ``model`` with this record; with None it is not split."""
        self.batch_begins(record)
        before, self.entered = self.entered, model
        try:
            with self.running(record), self.computing_alone(record is None and self.scope_of(model).alone):
                yield
        finally:
            self.entered = before

    @contextmanager
    def computing_alone(self, alone: bool = True) -> Iterator[None]:
        """Context manager in which embeddings are not split; if not ``alone``, they are split as the record says."""
        before, self.computes_alone = self.computes_alone, alone
        try:
            yield
        finally:
            self.computes_alone = before

    def forward_pass_begins(self) -> None:
        """Invalidate what was read from masks in earlier passes; before the first pass, check all essential patches."""
        self._passes += 1
        if not self._is_checked:
            self._check()
            self._is_checked = True

    def batch_begins(self, record: MicroBatch | None) -> None:
        """Before the first batch that is split over several ranks, print what is on."""
        if not self.told and record is not None and record.layout.cp_size > 1:
            self.told = self._tell(record)

    @property
    def forward_pass(self) -> int | None:
        """Number of the running forward pass of a model; None outside of one."""
        return None if self.active is None else self._passes
