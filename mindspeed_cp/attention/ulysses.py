"""Ulysses: which heads each rank computes, and the exchanges around the local attention."""

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import torch

from mindspeed_cp.attention.kv_cache import Name
from mindspeed_cp.comm.messages import Pending, packed
from mindspeed_cp.comm.sequence_exchange import Part, SequenceExchange
from mindspeed_cp.sequence.runs import split_sizes


@lru_cache(maxsize=256)
def head_shares(
    num_heads: int, num_kv_heads: int, degree: int
) -> tuple[tuple[slice, ...], tuple[slice | list[int], ...]]:
    """Which query heads and which KV heads each of ``degree`` ranks gets.

    Query heads are split in order, the remainder to the first ranks. KV heads are replicated only as far as needed:
    with ``unit`` the largest run of query heads that always shares a KV head and a rank, each rank gets one KV head for
    every unit. For even splits that makes lcm(num_kv_heads, degree) KV heads in all.

    Returns:
        (query shares, KV shares): per rank a slice of heads, or a list of KV heads where one is needed twice.
    """
    sizes = split_sizes(num_heads, degree)
    starts = [sum(sizes[:rank]) for rank in range(degree)]
    group = num_heads // num_kv_heads
    queries, keys = [], []
    for start, size in zip(starts, sizes):
        queries.append(slice(start, start + size))
        unit = max(size, 1) if num_kv_heads == 1 else gcd(group, start, size)
        heads = [head // group for head in range(start, start + size, unit)]
        first = heads[0] if heads else 0
        consecutive = heads == list(range(first, first + len(heads)))
        keys.append(slice(first, first + len(heads)) if consecutive else heads)
    return tuple(queries), tuple(keys)


# kind of tensor -> (what its bytes count as, field with its number of heads, field with its head size, which shares)
_PARTS = {
    "query": ("q", "heads", "dk", "queries"),
    "key": ("kv", "kv_heads", "dk", "keys"),
    "value": ("kv", "kv_heads", "dv", "keys"),
    "out": ("out", "heads", "dv", "queries"),
    "grad_out": ("dout", "heads", "dv", "queries"),
    "grad_query": ("dq", "heads", "dk", "queries"),
    "grad_key": ("dkv", "kv_heads", "dk", "keys"),
    "grad_value": ("dkv", "kv_heads", "dv", "keys"),
}


@dataclass(frozen=True, eq=False)
class UlyssesProblem:
    """The exchanges of one attention call over one Ulysses group.

    Args:
        exchange: SequenceExchange of the group.
        heads, kv_heads, dk, dv: of the unsplit tensors.
        refetch: which of key and value are saved before communication and communicated again in backward.
        allgather_kv: gather the one KV head instead of sending copies of it.
    """

    exchange: SequenceExchange
    heads: int
    kv_heads: int
    dk: int
    dv: int
    refetch: frozenset[Name] = frozenset()
    allgather_kv: bool = False

    def part(self, kind: str) -> Part:
        """How the tensor of this kind is split; see _PARTS."""
        purpose, heads, dim, shares = _PARTS[kind]
        queries, keys = head_shares(self.heads, self.kv_heads, self.exchange.size)
        return Part(purpose, getattr(self, heads), getattr(self, dim), queries if shares == "queries" else keys)

    def head_slice(self) -> slice:
        """The query heads of this rank, a slice."""
        return head_shares(self.heads, self.kv_heads, self.exchange.size)[0][self.exchange.rank]

    def scatter(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(seq_local, batch, heads, dim) -> (seq, batch, heads_local, dim), each of query, key and value.

        One message, unless something is not kept: that must lie in a buffer of its own, which can be freed.
        """
        tensors = {"query": query, "key": key, "value": value}
        received: dict[str, torch.Tensor] = {}
        messages = (
            {kind: tensor for kind, tensor in tensors.items() if (kind in self.refetch) == again}
            for again in (False, True)
        )
        for pending in [self._start(message) for message in messages if message]:
            received.update(pending.wait())
        return received["query"], received["key"], received["value"]

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

    def gather_out(self, out: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Attention output (seq, batch, heads_local, dv) -> (seq_local, batch, heads, dv) in ``dtype``."""
        return self.exchange.scatter_sequence_gather_heads([self.part("out")], [out], dtype).wait()[0]

    def scatter_for_backward(
        self, grad_out: torch.Tensor, again: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The gradient of the output, and the keys and values that were saved before communication, in one message.

        Args:
            grad_out: (seq_local, batch, heads, dv).
            again: dict of "key", "value" to the local tensors that must be communicated again.

        Returns:
            (grad_out, dict of the same names), each for the whole sequence and this rank's heads.
        """
        received = self._start({"grad_out": grad_out, **again}, name="a2a.backward").wait()
        return received.pop("grad_out"), received

    def gather_gradients(
        self, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """Gradients of the whole sequence and this rank's heads -> (seq_local, batch, heads, dim), each."""
        parts = [self.part(kind) for kind in ("grad_query", "grad_key", "grad_value")]
        return self.exchange.scatter_sequence_gather_heads(parts, [dq, dk, dv], dtype).wait()
