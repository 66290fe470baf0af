"""Ulysses: the exchanges around the local attention, for all heads at once or for one group of them."""

from dataclasses import dataclass, replace

import torch

from mindspeed_cp.attention.head_groups import HeadGroup, head_groups, head_shares
from mindspeed_cp.attention.kv_cache import Name
from mindspeed_cp.comm.messages import Pending, packed
from mindspeed_cp.comm.sequence_exchange import AllHeads, Part, SequenceExchange

# kind of tensor -> (what its bytes count as, field with its number of heads, field with its head size, which shares)
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
        heads, dk, dv: of the unsplit query and output.
        kv_heads, key_dim, value_dim: of what travels as key and value; one head of either with an expansion.
        refetch: which of key and value are saved before communication and communicated again in backward.
        allgather_kv: gather the one KV head instead of sending copies of it.
        num_groups: rounds in which the heads are exchanged.
        round: which of them this is about.
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
        """The same exchanges, each for one group of heads."""
        return [replace(self, round=number) for number in range(self.num_groups)]

    @property
    def group(self) -> HeadGroup:
        return head_groups(self.heads, self.kv_heads, self.exchange.size, self.num_groups)[self.round]

    def part(self, kind: str) -> Part:
        """How the tensor of this kind is split; see _PARTS."""
        purpose, heads, dim, shares = _PARTS[kind]
        return Part(purpose, getattr(self, heads), getattr(self, dim), getattr(self.group, shares))

    def _travels(self, kind: str) -> bool:
        """Whether any rank gets a head of this kind in this round."""
        return self.part(kind).total_count > 0

    @property
    def keys_stay(self) -> bool:
        """Whether this rank goes on with the keys and values of the round before."""
        rank = self.exchange.rank
        return self.part("query").count(rank) > 0 and self.part("key").count(rank) == 0

    @property
    def keys_are_done(self) -> bool:
        """Whether the gradients of this rank's keys and values leave with this round."""
        rank = self.exchange.rank
        return self.part("query").count(rank) == 0 or self.part("grad_key").count(rank) > 0

    def head_slice(self) -> slice:
        """The query heads of this rank, a slice."""
        return self.group.queries[self.exchange.rank]

    def scatter(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Pending[tuple[torch.Tensor | None, ...]]:
        """(seq_local, batch, heads, dim) -> (seq, batch, heads_local, dim), each of query, key and value; None of what
        nobody gets in this round.

        One message, unless something is not kept: that must lie in a buffer of its own, which can be freed.
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

        An all-gather takes the key and value where that is asked for.
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
        """Where the tensor of this kind, out or a gradient, of all rounds is gathered.

        Args:
            like: any tensor of the batch and device. dtype: of what travels and of the result.
        """
        purpose, heads, dim, shares = _PARTS[kind]
        queries, keys = head_shares(self.heads, self.kv_heads, self.exchange.size)
        whole = Part(purpose, getattr(self, heads), getattr(self, dim), queries if shares == "queries" else keys)
        return self.exchange.all_heads(whole, like.new_empty(0, dtype=dtype), like.shape[1])

    def scatter_for_backward(
        self, grad_out: torch.Tensor, again: dict[str, torch.Tensor]
    ) -> Pending[dict[str, torch.Tensor]]:
        """The gradient of the output, and the keys and values that were saved before communication, in one message.

        Args:
            grad_out: (seq_local, batch, heads, dv).
            again: dict of "key", "value" to the local tensors that must be communicated again.

        Returns:
            Pending of a dict of "grad_out" and the same names, those of this round, each for the whole sequence and
            this rank's heads; the gradient in memory that the round after next uses again.
        """
        tensors = {"grad_out": grad_out, **{name: tensor for name, tensor in again.items() if self._travels(name)}}
        # Keys and values may stay for many rounds, and then in memory of their own.
        stays = len(tensors) > 1 and self.num_groups > 1
        return self._start(tensors, name=None if stays else f"a2a.backward{self.round % 2}")

    def gather(self, into: dict[str, AllHeads], tensors: dict[str, torch.Tensor]) -> Pending[None]:
        """Start sending tensors of the whole sequence and this rank's heads to the ranks that have their tokens.

        Args:
            into: kind -> where it is gathered; what nobody sends in this round stays out. tensors: kind -> tensor.
        """
        kinds = [kind for kind in into if self._travels(kind)]
        parts = [self.part(kind) for kind in kinds]
        mine = [tensors[kind][:, :, : part.count(self.exchange.rank)] for kind, part in zip(kinds, parts)]
        return self.exchange.gather_heads(parts, mine, [into[kind] for kind in kinds])
