"""The part of the Adaptor for training loops that do not call Megatron's own functions: split a batch, gather it."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from mindspeed_cp.megatron import batches, splitting
from mindspeed_cp.megatron.documents import documents_of_rows
from mindspeed_cp.megatron.known import Known
from mindspeed_cp.megatron.losses import share_of
from mindspeed_cp.sequence import sharding


class OwnLoops:
    """Methods of the Adaptor."""

    def shard_batch(
        self: Known,
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
        documents = None if cu_seqlens is None else documents_of_rows(cu_seqlens)
        self.documents_by_hand |= documents is not None
        return splitting.sharded(self, self.current, batch, documents, sequences)

    def gather_sequence(self: Known, tensor: torch.Tensor, of: Any = None, dim: int = 1) -> torch.Tensor:
        """The whole sequence in order, from every rank's part of it; differentiable, and every rank calls this.

        A loss of what this returns is the whole loss on every rank, and its gradient each rank's own part. A loss
        function of Megatron returns it as ``(loss / count, report)``, or with ``share_of(count)`` as ``num_tokens``:
        ``(loss, share_of(count), report)``.

        Args:
            tensor: ``dim`` holds this rank's tokens: (batch, seq, ...) by default, as Megatron's models return logits.
            of: what says how the batch was split: a tensor of it, such as the tokens or the model's output, the batch
                itself, or the PackedSeqParams of one that a framework split. None is ``tensor`` itself.

        Raises:
            ValueError: nothing says how the batch was split.
        """
        if not self.scopes and not self.sizes:  # nothing is ever split
            return tensor
        record = batches.record_of_part(self, tensor, of, dim)
        scope = record.scope or self.main
        return sharding.gather_sequence(tensor, groups=scope.groups, layout=record.layout, dim=dim)

    def share_of(self: Known, count: Any, of: Any = None) -> Any:
        """What a loss function returns as ``num_tokens`` for a loss of the whole sequence, of ``count`` tokens.

        Megatron adds num_tokens over the context-parallel ranks, so each rank returns a share; until 0.12, which adds
        over the data-parallel ranks alone, that is all of it.

        Args:
            count: a whole number or a tensor of one, the same on every rank.
            of: as ``gather_sequence`` has it, None is Megatron's own group.
        """
        self.losses.asked = True
        scope = self.current if of is None or self.alone else batches.scope_of_part(self, of)
        return share_of(count, scope)
