"""The first pipeline stage passes the record of a batch to later stages.

Megatron gives inner stages no batch at all, and the last stage only labels. At its first forward pass, the first stage
of each pipeline writes to torch's store whether the configuration's layout for the length is sufficient (then nothing
more is written). Otherwise it stores the record of its n-th forward pass, which the n-th forward pass of the same model
on every other stage, and virtual stage, reads. A stage starts only after it has received the first stage's output, so
it never waits for the record. Models are identified by the order in which a rank creates them.
"""

import json
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from mindspeed_cp.megatron.records import MicroBatch
from mindspeed_cp.megatron.scopes import COLLECTIONS, Scope
from mindspeed_cp.sequence.layout import SequenceLayout
from mindspeed_cp.sequence.slice_mask import frozen

if TYPE_CHECKING:
    from mindspeed_cp.megatron.known import Known as Adaptor

KEPT = 1024  # records per pipeline in the store; no stage is ever that many micro-batches behind the first
PLAIN, HANDED = "plain", "handed"


class HandOver:
    """Completes the record of a forward pass on every stage of a pipeline; one object per process."""

    def __init__(self, adaptor: "Adaptor") -> None:
        self._adaptor, self._epoch = adaptor, 0
        self._numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # stage of a model -> number of the model
        self._passes: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # stage of a model -> forward passes so far
        self._ways: dict[str, str] = {}  # model -> PLAIN or HANDED
        self._models, self._stages_to_come = 0, 0

    def number(self, model: Any) -> int:
        """The number of the model to which this stage belongs; virtual stages of a model are created consecutively."""
        known = self._numbers.get(model)
        if known is None:
            if not self._stages_to_come:
                self._models += 1
                self._stages_to_come = getattr(model.config, "virtual_pipeline_model_parallel_size", None) or 1
            self._stages_to_come -= 1
            known = self._numbers[model] = self._models
        return known

    def first(self, model: Any, scope: Scope, record: MicroBatch) -> MicroBatch:
        """Pass ``record`` to the later stages of ``model``; returns it.

        Raises:
            ValueError: the first record was the configuration's, so that nothing is passed on, but this one is not.
        """
        pipeline = pipeline_of(model)
        if len(pipeline) == 1:
            return record
        passes, model_key = self._count(model, pipeline)
        usual = self._adaptor.layout(record.seq_len, scope=scope)
        _check_rows(model.config, record.layout, usual, scope.rank)
        says_nothing = record.documents is None and record.slices is None
        plain = says_nothing and record.layout.all_runs == usual.all_runs
        way = self._ways.get(model_key)
        if way is None:
            way = PLAIN if plain and not self._adaptor.settings.expects_documents else HANDED
            self._ways[model_key] = way
            self._set(pipeline, model_key, way)
        if way == PLAIN and not plain:
            raise ValueError(
                "the first micro-batch of this model had neither documents nor slices nor a layout of its own, so that "
                "later pipeline stages expect none, and this one has; give every micro-batch its own from the first on "
                "(a whole row is one document, or one causal slice), or use --pipeline-model-parallel-size 1."
            )
        if way == HANDED:
            self._set(pipeline, f"{model_key}/{passes}", json.dumps([record.layout.all_runs, *_said(record)]))
            if passes >= KEPT and dist.get_rank() == pipeline[0]:
                _get_default_store().delete_key(f"{model_key}/{passes - KEPT}")
        return record

    def later(self, model: Any, scope: Scope, record: MicroBatch | None) -> MicroBatch | None:
        """The record of a forward pass of a later stage; ``record`` is that of its own batch, or None.

        A result of None means the configuration's layout for the length that the stage receives.

        Raises:
            ValueError: its own batch was split differently from that of the first stage.
        """
        pipeline = pipeline_of(model)
        if len(pipeline) == 1:
            return record
        passes, model_key = self._count(model, pipeline)
        if model_key not in self._ways:
            self._ways[model_key] = _get_default_store().get(model_key).decode()
        if self._ways[model_key] == PLAIN:
            if record is not None:
                _check_alike(record, MicroBatch(self._adaptor.layout(record.seq_len, scope=scope), None, scope))
            return record
        runs, *parts = json.loads(_get_default_store().get(f"{model_key}/{passes}"))
        documents, slices, places = map(frozen, parts)
        layout = SequenceLayout.from_runs(scope.config, runs)
        handed = MicroBatch(layout, documents, scope, slices=slices, places=places)
        if record is not None:
            _check_alike(record, handed)
        return handed

    def _count(self, model: Any, pipeline: list[int]) -> tuple[int, str]:
        """(number of this forward pass of ``model``, key of the model in its pipeline)."""
        if self._epoch != self._adaptor.epoch:
            self._epoch = self._adaptor.epoch
            self._passes.clear()
            self._ways.clear()
        passes = self._passes[model] = self._passes.get(model, -1) + 1
        return passes, f"mindspeed_cp/records/{self._epoch}/{pipeline[0]}/{self.number(model)}"

    @staticmethod
    def _set(pipeline: list[int], key: str, value: str) -> None:
        if dist.get_rank() == pipeline[0]:
            _get_default_store().set(key, value)


def _check_rows(config: Any, layout: SequenceLayout, usual: SequenceLayout, rank: int) -> None:
    """Raise ValueError if stages that know only the length expect another number of rows than this one sends."""
    own, expected = layout.length(rank), usual.length(rank)
    if own != expected and not getattr(config, "variable_seq_lengths", False):
        raise ValueError(
            f"context-parallel rank {rank} holds {own} of {layout.seq_len} tokens (layout {layout.kind}), and the next "
            f"pipeline stage expects {expected}, as the configuration splits them; let stages tell each other their "
            "shapes with variable_seq_lengths=True in the TransformerConfig (--variable-seq-lengths)."
        )


def _check_alike(record: MicroBatch, first: MicroBatch) -> None:
    """Raise ValueError if the batch of a later stage was not split like that of the first one."""
    differ = any(own is not None and own != others for own, others in zip(_said(record), _said(first)))
    if record.layout.all_runs != first.layout.all_runs or differ:
        raise ValueError(
            f"the labels of this pipeline stage were split as {record.layout.kind} with documents {record.documents}, "
            f"and the tokens of the first stage as {first.layout.kind} with documents {first.documents}; split both in "
            "the same way, with the same cu_seqlens on every stage, or the same slices."
        )


def _said(record: MicroBatch) -> tuple[Any, ...]:
    """The contents of a record for comparison, as tuples of numbers."""
    return record.documents, record.slices, record.places


def pipeline_of(model: Any) -> list[int]:
    """Global ranks of the pipeline to which a model belongs, its first stage first."""
    from megatron.core import parallel_state

    group = getattr(model, "pp_group", None)
    for name in COLLECTIONS:
        group = group or getattr(getattr(model, name, None), "pp", None)
    if group is None and parallel_state.model_parallel_is_initialized():
        group = parallel_state.get_pipeline_model_parallel_group()
    return dist.get_process_group_ranks(group) if isinstance(group, dist.ProcessGroup) else [dist.get_rank()]
