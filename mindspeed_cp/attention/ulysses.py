"""Ulysses: the exchanges around the local attention, for all heads at once or for one group of heads."""

from dataclasses import dataclass, replace

import torch

from mindspeed_cp.attention.head_groups import HeadGroup, head_groups, head_shares
from mindspeed_cp.attention.kv_cache import Name
from mindspeed_cp.comm.messages import Pending, packed
from mindspeed_cp.comm.sequence_exchange import AllHeads, Part, SequenceExchange

# kind of tensor -> (purpose of its bytes, field with its number of heads, field with its head dimension, which shares)
_PARTS = {
    "query": ("q", "heads", "dk", "queries"),
    "key": ("kv", "kv_heads", "key_dim", "arriving"),
    "value": ("kv", "kv_heads", "value_dim", "arriving"),
    "out": ("out", "heads", "dv", "queries"),
    "grad_out": ("dout", "heads", "dv", "queries"),
    "grad_query": ("dq", "heads", "dk", "queries"),
    "grad_key": ("dkv", "kv_heads", "key_dim", "leaving"),
    "grad_value": ("dkv", "kv_heads", "value_dim", "leaving"),
}


@dataclass(frozen=True, eq=False)
class UlyssesProblem:
    """The exchanges of one attention call over one Ulysses group.

    Args:
        exchange: SequenceExchange of the group.
        heads, dk, dv: sizes of the unsplit query and output.
        kv_heads, key_dim, value_dim: sizes of what travels as key and value; with an expansion, one head each.
        refetch: which of key and value are saved before communication and communicated again in backward.
        allgather_kv: whether the only KV head is gathered instead of sending copies of it.
        num_groups: number of rounds in which the heads are exchanged.
        round: number of this round.
    """

    exchange: SequenceExchange
    heads: int
    kv_heads: int
    dk: int
    dv: int
    key_dim: int
    value_dim: int
    refetch: frozenset[Name] = frozenset()
    allgather_kv: bool = False
    num_groups: int = 1
    round: int = 0

    @property
    def rounds(self) -> "list[UlyssesProblem]":
        """The problems of all rounds, each for one group of heads."""
        return [replace(self, round=number) for number in range(self.num_groups)]

    @property
    def group(self) -> HeadGroup:
        return head_groups(self.heads, self.kv_heads, self.exchange.size, self.num_groups)[self.round]

    def part(self, kind: str) -> Part:
        """How a tensor of this kind is split; see _PARTS."""
        purpose, heads, dim, shares = _PARTS[kind]
        return Part(purpose, getattr(self, heads), getattr(self, dim), getattr(self.group, shares))

    def _travels(self, kind: str) -> bool:
        """Whether any rank gets a head of this kind in this round."""
        return self.part(kind).total_count > 0

    @property
    def keys_stay(self) -> bool:
        """Whether this rank continues with the keys and values of the previous round."""
        rank = self.exchange.rank
        return self.part("query").count(rank) > 0 and self.part("key").count(rank) == 0

    @property
    def keys_are_done(self) -> bool:
        """Whether the gradients of this rank's keys and values are sent in this round."""
        rank = self.exchange.rank
        return self.part("query").count(rank) == 0 or self.part("grad_key").count(rank) > 0

    def head_slice(self) -> slice:
        """The query heads of this rank, as a slice."""
        return self.group.queries[self.exchange.rank]

    def scatter(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Pending[tuple[torch.Tensor | None, ...]]:
        """(seq_local, batch, heads, dim) -> (seq, batch, heads_local, dim) for query, key and value; None for those
        that no rank gets in this round.

        They are one message, except tensors that are not kept, which need separate buffers that can be freed.
        """
        tensors = {"query": query, "key": key, "value": value}
        sent = {kind: tensor for kind, tensor in tensors.items() if self._travels(kind)}
        messages = (
            {kind: tensor for kind, tensor in sent.items() if (kind in self.refetch) == again}
            for again in (False, True)
        )
        started = [self._start(message) for message in messages if message]

        def finish() -> tuple[torch.Tensor | None, ...]:
            received: dict[str, torch.Tensor] = {}
            for pending in started:
                received.update(pending.wait())
            return tuple(map(received.get, tensors))

        return Pending(finish)

    def _start(self, tensors: dict[str, torch.Tensor], name: str | None = None) -> Pending[dict[str, torch.Tensor]]:
        """Start exchanging a dict kind -> tensor in one message; returns Pending of the dict.

        With ``allgather_kv``, key and value are gathered instead.
        """
        received: dict[str, torch.Tensor] = {}
        keys = [kind for kind in tensors if kind in ("key", "value")]
        if self.allgather_kv and keys:
            gathered = self.exchange.gather_sequence(torch.cat([tensors[kind] for kind in keys], dim=-1), "kv")
            heads = self.part("key").shares[self.exchange.rank]  # none where this rank has no query heads
            shares = gathered[:, :, heads].split([tensors[kind].shape[-1] for kind in keys], dim=-1)
            received.update(zip(keys, packed(shares, self.exchange.unpack) if self.exchange.unpack else shares))
        sent = [kind for kind in tensors if kind not in received]
        if not sent:
            return Pending(lambda: received)
        pending = self.exchange.scatter_heads_gather_sequence(
            [self.part(kind) for kind in sent], [tensors[kind] for kind in sent], name
        )
        return pending.then(lambda arrived: {**received, **dict(zip(sent, arrived))})

    def all_heads(self, kind: str, like: torch.Tensor, dtype: torch.dtype) -> AllHeads:
        """The object that gathers a tensor of this kind, out or a gradient, over all rounds.

        Args:
            like: any tensor with the batch size and device. dtype: dtype of the messages and of the result.
        """
        purpose, heads, dim, shares = _PARTS[kind]
        queries, keys = head_shares(self.heads, self.kv_heads, self.exchange.size)
        whole = Part(purpose, getattr(self, heads), getattr(self, dim), queries if shares == "queries" else keys)
        return self.exchange.all_heads(whole, like.new_empty(0, dtype=dtype), like.shape[1])

    def scatter_for_backward(
        self, grad_out: torch.Tensor, again: dict[str, torch.Tensor]
    ) -> Pending[dict[str, torch.Tensor]]:
        """Scatter the output's gradient, and keys and values that were saved before communication, in one message.

        Args:
            grad_out: (seq_local, batch, heads, dv).
            again: dict of "key", "value" to the local tensors that must be communicated again.

        Returns:
            Pending of a dict with "grad_out" and the same names, as far as they belong to this round, each for the
            whole sequence and this rank's heads; the gradient's memory is reused by the round after next.
        """
        tensors = {"grad_out": grad_out, **{name: tensor for name, tensor in again.items() if self._travels(name)}}
        # Keys and values may stay for many rounds and then need separate memory.
        stays = len(tensors) > 1 and self.num_groups > 1
        return self._start(tensors, name=None if stays else f"a2a.backward{self.round % 2}")

    def gather(self, into: dict[str, AllHeads], tensors: dict[str, torch.Tensor]) -> Pending[None]:
        """Start sending tensors of the whole sequence and this rank's heads to the ranks that have their tokens.

        Args:
            into: kind -> AllHeads; kinds that no rank sends in this round are skipped. tensors: kind -> tensor.
        """
        kinds = [kind for kind in into if self._travels(kind)]
        parts = [self.part(kind) for kind in kinds]
        mine = [tensors[kind][:, :, : part.count(self.exchange.rank)] for kind, part in zip(kinds, parts)]
        return self.exchange.gather_heads(parts, mine, [into[kind] for kind in kinds])
