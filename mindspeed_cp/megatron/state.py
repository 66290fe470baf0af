"""What the adaptor knows between two calls of Megatron: configuration, process groups, the micro-batch that runs."""

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, lru_cache, wraps
from typing import Any

import torch
import torch.distributed as dist

from mindspeed_cp.attention.kept import KeptAttention
from mindspeed_cp.comm.groups import ContextParallelGroups
from mindspeed_cp.comm.step_log import ContextParallelLog
from mindspeed_cp.megatron.decision import OpenDecision
from mindspeed_cp.megatron.documents import BoundaryCache, MaskCache, documents_of_rows
from mindspeed_cp.megatron.handed import Handed
from mindspeed_cp.megatron.packed import packed_batch
from mindspeed_cp.megatron.records import BatchRecords, Documents, MicroBatch
from mindspeed_cp.patches import batch as batches
from mindspeed_cp.patches.dynamic import Sizes, ranks_of_all, refuse_dynamic
from mindspeed_cp.sequence import sharding
from mindspeed_cp.sequence.layout import DOCUMENT_KINDS, SequenceLayout
from mindspeed_cp.settings.config import ContextParallelConfig, TrainingSetup

SINGLE = ContextParallelConfig(context_parallel_size=1)


@dataclass
class AdaptorState:
    """The one mutable object of the adaptor.

    Args:
        config: what ``configure`` or the flags said; None until then (Ulysses is taken when cp > 1).
        setup: TrainingSetup, None for scripts that use megatron-core alone.
        kernel: name of an attention kernel, None chooses by device.
        documents_from_position_ids: whether position ids that start again at 0 begin a document when the batch has no
            mask (Megatron's --reset-position-ids with --reset-attention-mask).
        end_of_document: the token behind which a document ends when the batch has no mask and position ids say nothing
            (--reset-attention-mask alone), or () -> that token, asked when a batch is split; None without.
        groups: ContextParallelGroups after Megatron has made its own groups; ``epoch`` counts how often it did.
        undecided: what is still to be decided; None once ``configure`` has decided everything.
        compared: flag -> value of what must be equal on all ranks, beside the configuration.
        program: the program whose flags they are; it ends with one line where a script gets an exception.
        handed: document ends that a framework hands over before the batch is split.
        documents_by_hand: whether documents were given for a batch by hand, so that a forward pass of no known batch
            would lose them.
        is_pipeline: whether there is more than one pipeline stage: stages then split the same batch knowing different
            parts of it, and must come to the same layout.
        log: measures the steps of training with --cp-log, as long as there are groups; None without.
        sizes: configuration and groups of every size that a micro-batch may have, where Megatron's dynamic context
            parallelism gives each its own; ``config`` and ``groups`` are those of the one that runs.
        active: record of the forward pass that runs now.
        kept: KeptAttention of the checkpoint whose function runs now, where --cp-keep-attention asks for it.
        records: where the record of a batch is found again.
        masks, boundaries: what was read of the masks and of the packed boundaries under way.
        on_change: called whenever a cached embedding may have become wrong.
    """

    config: ContextParallelConfig | None = None
    setup: TrainingSetup | None = None
    kernel: str | None = None
    documents_from_position_ids: bool = False
    end_of_document: int | Callable[[], int] | None = None
    groups: ContextParallelGroups | None = None
    epoch: int = 0
    is_pipeline: bool = False
    sizes: Sizes = field(default_factory=dict)
    undecided: OpenDecision | None = field(default_factory=OpenDecision)
    compared: Mapping[str, str] = field(default_factory=dict)
    program: str = ""
    handed: Handed = field(default_factory=Handed)
    documents_by_hand: bool = False
    log: ContextParallelLog | None = None
    active: MicroBatch | None = None
    kept: KeptAttention | None = None
    records: BatchRecords = field(default_factory=BatchRecords)
    masks: MaskCache = field(default_factory=MaskCache)
    boundaries: BoundaryCache = field(default_factory=BoundaryCache)
    on_change: list[Callable[[], None]] = field(default_factory=list)

    def configure(
        self,
        config: ContextParallelConfig,
        *,
        setup: TrainingSetup | None = None,
        kernel: str | None = None,
        documents_from_position_ids: bool = False,
        end_of_document: int | Callable[[], int] | None = None,
    ) -> None:
        """Set the configuration; raises ValueError when groups of another configuration are in use."""
        if self.config is not None and self.groups is not None and self.groups.hierarchy != config.hierarchy:
            raise ValueError(
                f"the process groups were built for {self.config.describe()}, and {config.describe()} needs others; "
                "configure before initialize_model_parallel, or call destroy_model_parallel first."
            )
        self.config, self.setup, self.kernel, self.undecided = config, setup, kernel, None
        self.documents_from_position_ids, self.end_of_document = documents_from_position_ids, end_of_document
        self.forget_batches()

    def reset(self) -> None:
        """Forget everything, as after the import."""
        self.config = self.setup = self.kernel = self.groups = self.log = self.end_of_document = None
        self.sizes = {}
        self.undecided, self.compared, self.program, self.handed = OpenDecision(), {}, "", Handed()
        self.documents_from_position_ids = False
        self.forget_batches()

    def forget_batches(self) -> None:
        self.active, self.documents_by_hand = None, False
        self.records.clear()
        self.masks.clear()
        for call in self.on_change:
            call()

    @property
    def cp_size(self) -> int:
        return self.groups.cp_size if self.groups is not None else 1

    @property
    def alone(self) -> bool:
        """Whether no sequence is ever split, so that everything is left to Megatron."""
        return self.cp_size == 1 and not self.sizes

    @property
    def cp_rank(self) -> int:
        return self.groups.cp_rank if self.groups is not None else 0

    @staticmethod
    def cp_ranks() -> tuple[list[int], int]:
        """(global ranks of Megatron's context-parallel group, this rank's place among them), any size."""
        from megatron.core import parallel_state

        return parallel_state.get_context_parallel_global_ranks(), parallel_state.get_context_parallel_rank()

    @property
    def expects_documents(self) -> bool:
        """Whether the settings say that documents end where tokens or position ids say so."""
        return self.documents_from_position_ids or self.end_of_document is not None

    def build_groups(
        self,
        config: ContextParallelConfig,
        cp_ranks: list[list[int]],
        timeout: timedelta | None = None,
        cp_group: dist.ProcessGroup | None = None,
        virtual_pipeline: bool = False,
        buffers: Mapping[str, int] | None = None,
    ) -> None:
        """Make the process groups of ``config`` beside Megatron's own ``cp_group``; collective over the world."""
        self.config = config
        self.groups = ContextParallelGroups.build(
            config,
            cp_ranks,
            timeout=timeout,
            cp_group=cp_group,
            virtual_pipeline=virtual_pipeline,
            buffers=buffers,
        )
        self.epoch += 1
        self.forget_batches()

    def measure(self, config: ContextParallelConfig, group: dist.ProcessGroup) -> None:
        """With --cp-log, measure the steps and compare the ranks of each ``group``; collective over the world."""
        if config.log:
            self.log = ContextParallelLog(ranks_of_all(group), _collective_device(dist.group.WORLD))

    def destroy_groups(self) -> None:
        if self.groups is not None:
            self.groups.destroy()
        for _, groups in self.sizes.values():
            groups.destroy()
        self.groups, self.log, self.sizes = None, None, {}
        if self.undecided is not None:
            self.undecided = OpenDecision(self.undecided.settings)
        self.forget_batches()

    def layout(self, seq_len: int, documents: Documents | None = None) -> SequenceLayout:
        """The SequenceLayout of the configuration for a sequence that this project splits.

        Raises:
            ValueError: aligned Ulysses cannot split this length, a rank would get no token, or the layout goes by
                documents and the rows of the batch differ in theirs.
        """
        if self.groups is None or self.config is None:
            return _layout(SINGLE, seq_len, None)
        config, shared = self.config, None
        unaligned = self.setup is not None and self.setup.unaligned
        if not config.row.any_length and not unaligned and seq_len % config.context_parallel_size:
            raise ValueError(
                f"sequence length {seq_len} must be divisible by --context-parallel-size "
                f"{config.context_parallel_size} for aligned Ulysses; use --gather-size-calculator dynamic, which "
                "takes any length, or --context-parallel-algo megatron_cp_algo."
            )
        if config.layout_kind in DOCUMENT_KINDS:
            shared = self._shared(documents)
        elif documents is not None and len(documents) == 1 and not self.is_pipeline:
            shared = documents[0]  # "auto" may go by them
        return with_tokens_everywhere(_layout(config, seq_len, shared))

    def _shared(self, documents):
        """The documents by which a named layout goes."""
        named = f"--cp-batch-layout {self.config.batch_layout} goes by documents"
        if documents is None and self.expects_documents and self.is_pipeline:
            raise ValueError(
                f"{named}, and Megatron gives the tokens that say where they end to the first pipeline stage alone; "
                "use --cp-batch-layout auto."
            )
        if documents is not None and len(documents) > 1:
            raise ValueError(
                f"{named}, and the {len(documents)} rows of this micro-batch hold different ones; use "
                "--micro-batch-size 1, or --cp-batch-layout auto."
            )
        return None if documents is None else documents[0]

    @contextmanager
    def running(self, record: MicroBatch | None) -> Iterator[None]:
        """Make ``record`` the one that layers see inside the block: the explicit way to hand it over."""
        before, self.active = self.active, record
        try:
            with nullcontext() if record is None or not self.sizes else self.of_size(record.layout.cp_size):
                yield
        finally:
            self.active = before

    @contextmanager
    def of_size(self, size: int) -> Iterator[None]:
        """Make configuration and groups those of micro-batches of one size, where each has its own.

        Raises:
            ValueError: Megatron has made no groups of this size.
        """
        if size not in self.sizes:
            refuse_dynamic(f"this one has size {size}, and there are groups of {', '.join(map(str, self.sizes))}")
        before = self.config, self.groups
        self.config, self.groups = self.sizes[size]
        try:
            yield
        finally:
            self.config, self.groups = before

    def bound(self, function: Callable) -> Callable:
        """``function``, seeing the record of now whenever it runs: recomputation runs after later batches."""
        record = self.active

        @wraps(function)
        def call(*args, **kwargs):
            with self.running(record):
                return function(*args, **kwargs)

        return call

    def micro_batch(self, local_len: int) -> MicroBatch:
        """The record of the forward pass that runs, of which this rank holds ``local_len`` tokens.

        A pipeline stage that was given no batch, and attention that runs outside a model, know no record. The length
        is then what the ranks hold together, and the layout that of the configuration; whether a rank asks the others
        depends on the code that runs alone, so all ranks of the group ask together.

        Raises:
            ValueError: the record, or the layout, gives this rank another number of tokens; or documents are
                expected and nothing says where they end.
        """
        record = self.active
        if record is None:
            record = MicroBatch(self.layout(self._total(local_len)))
        expected = record.layout.length(self.cp_rank)
        if expected != local_len:
            raise ValueError(
                f"context-parallel rank {self.cp_rank} holds {local_len} tokens, and a sequence of {record.seq_len} "
                f"gives it {expected} (layout {record.layout.kind}); split every batch with get_batch_on_this_cp_rank "
                "or state().shard_batch, and pass the same length to all ranks."
            )
        return record

    def _total(self, local_len):
        if self.groups is None:
            return local_len
        total = torch.tensor([local_len], device=_collective_device(self.groups.cp_group))
        dist.all_reduce(total, group=self.groups.cp_group)
        return int(total)

    def shard_batch(
        self,
        batch: Mapping[str, Any],
        cu_seqlens: torch.Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
        sequences: Collection[str] = (),
    ) -> dict[str, Any]:
        """This rank's part of a whole batch, for training loops that do not call Megatron's get_batch_on_this_cp_rank.

        Args:
            batch: name -> (batch, seq) tensor or anything else; ``mindspeed_cp.shard_batch`` says what is split.
            cu_seqlens: document boundaries with the leading 0 and the total, for all rows or one row for each; None
                looks for documents where the settings say.
            sequences: further names to split.

        Returns:
            a new dict, by whose tensors the model finds layout and documents again.
        """
        if cu_seqlens is None:
            documents = batches.documents_of_batch(batch, self)
        else:
            documents, self.documents_by_hand = documents_of_rows(cu_seqlens), True
        length = batches.length_of(batches.named_sequences(batch, sequences))
        record = MicroBatch(self.layout(length, documents), documents)
        local = sharding.shard_batch(batch, layout=record.layout, cp_rank=self.cp_rank, sequences=sequences)
        self.records.remember(batches.named_sequences(local, sequences).values(), record)
        return local

    def gather_sequence(self, tensor: torch.Tensor, of: Any = None, dim: int = 1) -> torch.Tensor:
        """The whole sequence in order, from every rank's part of it; differentiable, and every rank calls this.

        Args:
            tensor: ``dim`` holds this rank's tokens: (batch, seq, ...) by default, as Megatron's models return logits.
            of: what says how the batch was split: a tensor of it, such as the tokens or the model's output, the batch
                itself, or the PackedSeqParams of one that a framework split. None is ``tensor`` itself.

        Raises:
            ValueError: nothing says how the batch was split.
        """
        if self.alone:
            return tensor
        values = of.values() if isinstance(of, Mapping) else (tensor if of is None else of,)
        record: MicroBatch | None
        if getattr(of, "qkv_format", None) == "thd":
            record = packed_batch(self, of, tensor.size(dim))
        else:
            record = self.records.find(values) or self.active
        if record is None:
            raise ValueError(
                "nothing says how the batch of this tensor was split; pass of=, the local tokens, the output of the "
                "model, or the PackedSeqParams."
            )
        with self.running(record):
            assert self.groups is not None
            return sharding.gather_sequence(tensor, groups=self.groups, layout=record.layout, dim=dim)

    def gather_size_calculator(self):
        """The calculator object of --gather-size-calculator, None for the aligned default."""
        name = self.setup.gather_size_calculator if self.setup is not None else "default"
        return _calculator(name)


def with_tokens_everywhere(layout: SequenceLayout) -> SequenceLayout:
    """``layout``; ValueError when it leaves a rank without tokens, which Megatron's layers cannot reshape."""
    empty = [rank for rank in range(layout.cp_size) if not layout.length(rank)]
    if empty:
        raise ValueError(
            f"a sequence of {layout.seq_len} tokens leaves context-parallel rank {', '.join(map(str, empty))} of "
            f"{layout.cp_size} without any, and Megatron's layers need one on each; use at least {layout.cp_size} "
            "tokens, or a smaller --context-parallel-size."
        )
    return layout


def effective_config(config, attention_mask_type):
    """``config`` with another mask type; what each rank holds is the layout's matter."""
    return config if config.attention_mask_type == attention_mask_type else _with_mask(config, attention_mask_type)


@lru_cache(maxsize=64)
def _with_mask(config, attention_mask_type):
    return replace(config, attention_mask_type=attention_mask_type)


@lru_cache(maxsize=1024)
def _layout(config, seq_len, documents):
    return SequenceLayout.build(config, seq_len, documents)


@cache
def _calculator(name):
    if name == "default":
        return None
    if name == "dynamic":
        from mindspeed_cp import DynamicGatherSizeCalculator

        return DynamicGatherSizeCalculator()
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)()


def _collective_device(group):
    """The device on which a collective of ``group`` wants its tensors."""
    return "cpu" if dist.get_backend(group) == "gloo" else torch.cuda.current_device()
