"""What the adaptor knows between two calls of Megatron: configuration, process groups and the shape of the batch."""

import importlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, wraps

import torch
import torch.distributed as dist
from mindspeed_cp.patches.decision import OpenDecision

from mindspeed_cp.config import ContextParallelConfig, TrainingSetup
from mindspeed_cp.groups import ContextParallelGroups
from mindspeed_cp.layout import SequenceLayout


@dataclass(frozen=True)
class BatchShape:
    """What every layer must know of a micro-batch.

    Args:
        seq_len: length of the whole sequence, before it was split over the context-parallel ranks.
        cu_seqlens: document boundaries shared by all rows, or None.
    """

    seq_len: int
    cu_seqlens: tuple[int, ...] | None = None


@dataclass
class AdaptorState:
    """The one mutable object of the adaptor.

    Args:
        config: what ``configure`` or the flags said; None until then (Ulysses is taken when cp > 1).
        setup: TrainingSetup, None for scripts that use megatron-core alone.
        kernel: name of an attention kernel, None chooses by device.
        documents_from_position_ids: whether position ids that start again at 0 begin a document when the batch has no
            mask (Megatron's --reset-position-ids with --reset-attention-mask).
        groups: ContextParallelGroups after Megatron has made its own groups.
        undecided: what is still to be decided; None once ``configure`` has decided everything.
        batch: shape of the batch that was split last; ``active`` is the one of the forward pass that runs now.
        on_change: called whenever a cached embedding may have become wrong.
    """

    config: ContextParallelConfig | None = None
    setup: TrainingSetup | None = None
    kernel: str | None = None
    documents_from_position_ids: bool = False
    groups: ContextParallelGroups | None = None
    undecided: OpenDecision | None = field(default_factory=OpenDecision)
    batch: BatchShape | None = None
    active: BatchShape | None = None
    on_change: list[Callable] = field(default_factory=list)

    def configure(self, config, *, setup=None, kernel=None, documents_from_position_ids=False):
        """Set the configuration; raises ValueError when groups of another configuration are in use."""
        if self.groups is not None and self.groups.hierarchy != config.hierarchy:
            raise ValueError(
                f"the process groups were built for {self.config.describe()}, and {config.describe()} needs others; "
                "configure before initialize_model_parallel, or call destroy_model_parallel first."
            )
        self.config, self.setup, self.kernel, self.undecided = config, setup, kernel, None
        self.documents_from_position_ids = documents_from_position_ids
        self.forget_batch()

    def reset(self):
        """Forget everything, as after the import."""
        self.config = self.setup = self.kernel = self.groups = None
        self.undecided = OpenDecision()
        self.documents_from_position_ids = False
        self.forget_batch()

    def forget_batch(self):
        self.batch = self.active = None
        for call in self.on_change:
            call()

    @property
    def cp_size(self):
        return self.groups.cp_size if self.groups is not None else 1

    @property
    def cp_rank(self):
        return self.groups.cp_rank if self.groups is not None else 0

    @staticmethod
    def cp_ranks():
        """(global ranks of Megatron's context-parallel group, this rank's place among them), any size."""
        from megatron.core import parallel_state

        return parallel_state.get_context_parallel_global_ranks(), parallel_state.get_context_parallel_rank()

    def build_groups(self, config, cp_ranks, timeout=None, cp_group=None):
        """Make the process groups of ``config`` beside Megatron's own ``cp_group``; collective over the world."""
        self.config = config
        self.groups = ContextParallelGroups.build(config, cp_ranks, timeout=timeout, cp_group=cp_group)
        self.forget_batch()

    def destroy_groups(self):
        if self.groups is not None:
            self.groups.destroy()
        self.groups = None
        if self.undecided is not None:
            self.undecided = OpenDecision(self.undecided.settings)
        self.forget_batch()

    def layout(self, seq_len):
        """The SequenceLayout of the configuration for one length.

        Raises:
            ValueError: aligned Ulysses cannot split this length.
        """
        config = self.config
        unaligned = self.setup is not None and self.setup.unaligned
        if not config.row.any_length and not unaligned and seq_len % config.context_parallel_size:
            raise ValueError(
                f"sequence length {seq_len} must be divisible by --context-parallel-size "
                f"{config.context_parallel_size} for aligned Ulysses; use --gather-size-calculator dynamic, which "
                "takes any length, or --context-parallel-algo megatron_cp_algo."
            )
        return _layout(config, seq_len)

    @contextmanager
    def running(self, shape):
        """Make ``shape`` the one that layers see inside the block."""
        before, self.active = self.active, shape
        try:
            yield
        finally:
            self.active = before

    def bound(self, function):
        """``function``, seeing the shape of now whenever it runs: recomputation runs after later batches were split."""
        shape = self.active or self.batch

        @wraps(function)
        def call(*args, **kwargs):
            with self.running(shape):
                return function(*args, **kwargs)

        return call

    def shape_for(self, local_len, *, batch_is_known=True):
        """The shape of the micro-batch of which this rank holds ``local_len`` tokens.

        Pipeline stages that were given no batch ask the other context-parallel ranks; whether they ask depends on the
        stage alone, so all ranks of the group ask together.

        Args:
            batch_is_known: False on a pipeline stage that splits no batch of its own.
        """
        if self.groups is None:
            return BatchShape(local_len)
        shape = self.active or (self.batch if batch_is_known else None)
        if shape is None:
            total = torch.tensor([local_len], device=_collective_device(self.groups.cp_group))
            dist.all_reduce(total, group=self.groups.cp_group)
            shape = BatchShape(int(total))
        expected = self.layout(shape.seq_len).length(self.cp_rank)
        if expected != local_len:
            raise ValueError(
                f"context-parallel rank {self.cp_rank} holds {local_len} tokens, and a sequence of {shape.seq_len} "
                f"gives it {expected} ({self.config.describe()}); split every batch with get_batch_on_this_cp_rank "
                "or SequenceLayout.shard, and pass the same length to all ranks."
            )
        return shape

    def packed_len(self, local_len, documents_end):
        """Length of a packed sequence: as recorded (padding may follow the last document), else where the documents
        end.
        """
        if self.cp_size == 1:
            return local_len
        return self.shape_for(local_len).seq_len if self.active or self.batch else documents_end

    def gather_size_calculator(self):
        """The calculator object of --gather-size-calculator, None for the aligned default."""
        name = self.setup.gather_size_calculator if self.setup is not None else "default"
        return _calculator(name)


def effective_config(config, attention_mask_type):
    """``config`` with another mask type; the layout, and so what each rank holds, stays the configured one."""
    return config if config.attention_mask_type == attention_mask_type else _with_mask(config, attention_mask_type)


@lru_cache(maxsize=64)
def _with_mask(config, attention_mask_type):
    return replace(config, attention_mask_type=attention_mask_type)


@lru_cache(maxsize=1024)
def _layout(config, seq_len):
    return SequenceLayout.build(config, seq_len)


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
