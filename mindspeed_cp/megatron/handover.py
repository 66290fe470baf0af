"""Documents for pipeline stages that Megatron gives no tokens: the first stage hands them over.

Megatron gives the stages in the middle no batch at all, and the last one labels alone. Where tokens or position ids say
where documents end, the first stage of each pipeline puts the record of its n-th forward pass into torch's own store,
and the n-th forward pass of every other stage (and virtual stage) takes it out: a stage starts after it has received
what the first one computed, so nobody waits for what is not there.
"""

import json
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.distributed.distributed_c10d import _get_default_store

from mindspeed_cp.megatron.records import MicroBatch

KEPT = 1024  # records in the store for each pipeline; a stage is never that many micro-batches behind the first
LOST = (
    ", and the tokens of this forward pass are those of no batch that was split; give the model the tensors that "
    "get_batch_on_this_cp_rank or shard_batch returned, not copies of them, or run it inside state().running(record)."
)


class HandOver:
    """Finishes the record of a forward pass on every stage of a pipeline."""

    def __init__(self, state) -> None:
        self._state, self._epoch = state, 0
        self._passes: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # model -> forward passes it has seen

    def __call__(self, model, record: MicroBatch | None, values) -> MicroBatch | None:
        """The record with which ``model`` runs its next forward pass; ``values`` are its arguments.

        Raises:
            ValueError: documents are expected, or were given by hand, and nothing says where those of this pass end.
        """
        from megatron.core import parallel_state

        if any(getattr(value, "qkv_format", None) == "thd" for value in values):
            return record
        if not self._state.expects_documents:
            if record is None and self._state.documents_by_hand and model.pre_process:
                raise ValueError(f"documents were given by hand (set_actual_seq_len, cu_seqlens){LOST}")
            return record
        number = self._count(model)
        if not model.pre_process:
            return self._take(parallel_state.get_pipeline_model_parallel_first_rank(), number)
        if record is None:
            raise ValueError(f"documents are expected (--reset-attention-mask){LOST}")
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            self._put(parallel_state.get_pipeline_model_parallel_first_rank(), number, record)
        return record

    def _count(self, model):
        if self._epoch != self._state.epoch:
            self._epoch = self._state.epoch
            self._passes.clear()
        number = self._passes[model] = self._passes.get(model, -1) + 1
        return number

    def _key(self, first_rank, number):
        return f"mindspeed_cp/documents/{self._epoch}/{first_rank}/{number}"

    def _put(self, first_rank, number, record):
        if torch.distributed.get_rank() != first_rank:
            return
        store = _get_default_store()
        store.set(self._key(first_rank, number), json.dumps([record.seq_len, record.documents]))
        if number >= KEPT:
            store.delete_key(self._key(first_rank, number - KEPT))

    def _take(self, first_rank, number):
        seq_len, rows = json.loads(_get_default_store().get(self._key(first_rank, number)))
        documents = None if rows is None else tuple(map(tuple, rows))
        return MicroBatch(self._state.layout(seq_len, documents), documents)
