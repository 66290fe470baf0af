"""The Adaptor's methods for training loops that do not call Megatron's own functions: split batches, gather results."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from mindspeed_cp.megatron import batches, splitting
from mindspeed_cp.megatron.documents import documents_of_rows
from mindspeed_cp.megatron.known import Known
from mindspeed_cp.megatron.losses import share_of
from mindspeed_cp.sequence import sharding


class OwnLoops:
    """A mixin with methods of the Adaptor."""

    def shard_batch(
        self: Known,
        batch: Mapping[str, Any],
        cu_seqlens: torch.Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
        sequences: Collection[str] = (),
    ) -> dict[str, Any]:
        """This rank's part of a whole batch, for training loops that do not call Megatron's get_batch_on_this_cp_rank.

        Args:
            batch: name -> (batch, seq) tensor or anything else; ``mindspeed_cp.shard_batch`` says what is split.
            cu_seqlens: document boundaries with the leading 0 and the total, for all rows or per row; None finds
                documents as the settings say.
            sequences: further names to split.

        Returns:
            a new dict, from whose tensors the model finds layout and documents.
        """
        documents = None if cu_seqlens is None else documents_of_rows(cu_seqlens)
        self.documents_by_hand |= documents is not None
        return splitting.sharded(self, self.current, batch, documents, sequences)

    def gather_sequence(self: Known, tensor: torch.Tensor, of: Any = None, dim: int = 1) -> torch.Tensor:
        """The whole sequence in order, from every rank's part of it; differentiable, and every rank calls this.

        A loss computed from the result is the whole loss on every rank, and its gradient is each rank's own part. A
        loss function for Megatron returns it as ``(loss / count, report)``, or with ``share_of(count)`` as
        ``num_tokens``: ``(loss, share_of(count), report)``.

        Args:
            tensor: ``dim`` holds this rank's tokens: (batch, seq, ...) by default, as Megatron's models return logits.
            of: identifies the batch: one of its tensors, such as the tokens or the model's output, the batch itself,
                or the PackedSeqParams of a batch that a framework split. None means ``tensor`` itself.

        Raises:
            ValueError: nothing says how the batch was split.
        """
        if not self.scopes and not self.sizes:  # nothing is ever split
            return tensor
        record = batches.record_of_part(self, tensor, of, dim)
        scope = record.scope or self.main
        return sharding.gather_sequence(tensor, groups=scope.groups, layout=record.layout, dim=dim)

    def share_of(self: Known, count: Any, of: Any = None) -> Any:
        """What a loss function must return as ``num_tokens`` for a loss over the whole sequence of ``count`` tokens.

        Megatron sums num_tokens over the context-parallel ranks, so each rank returns a share; with 0.12, which sums
        only over the data-parallel ranks, it is the whole count.

        Args:
            count: a whole number or a tensor with one, the same on every rank.
            of: as for ``gather_sequence``; None means Megatron's own group.
        """
        self.losses.asked = True
        scope = self.current if of is None or self.alone else batches.scope_of_part(self, of)
        return share_of(count, scope)
