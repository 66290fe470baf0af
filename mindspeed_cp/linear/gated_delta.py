"""Gated delta nets, and Kimi's delta attention, over a context-parallel group, by heads or by states.

    heads    every rank computes some heads over the whole sequence, in order
    state    every rank computes all heads over one part of the sequence, and passes its last state on

s: tokens of this rank, b: batch. Computations on single tokens (projections, norms, gates) stay in the layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from mindspeed_cp.attention.head_groups import Share, head_shares
from mindspeed_cp.comm.head_exchange import HeadExchange
from mindspeed_cp.comm.sequence_exchange import Part, SequenceExchange
from mindspeed_cp.kernels.base import accumulation_dtype
from mindspeed_cp.linear.parts import OwnPart, local_documents
from mindspeed_cp.linear.recurrence import Convolution, Documents, Recurrence


@dataclass(frozen=True)
class DeltaHeads:
    """Heads of a layer: value head n uses key head n // (value heads / key heads).

    Args:
        keys, values: number of key heads and value heads. key_dim, value_dim: their dimensions.
        decays: number of decays of a value head: 1, or key_dim if every channel of its keys has its own (Kimi).
    """

    keys: int
    values: int
    key_dim: int
    value_dim: int
    decays: int = 1

    @property
    def channels(self) -> tuple[int, int, int]:
        """The convolution's channels for query, key and value."""
        return self.keys * self.key_dim, self.keys * self.key_dim, self.values * self.value_dim

    @property
    def gates(self) -> tuple[int, int]:
        """The widths of beta and alpha."""
        return self.values, self.values * self.decays


@dataclass(frozen=True)
class DeltaWeights:
    """Weights of the layer's core.

    Args:
        convolution: (channels, width). bias: (channels,) or None. decay, step: A_log and dt_bias, (value heads,) and
            (value heads * decays,).
    """

    convolution: torch.Tensor
    bias: torch.Tensor | None
    decay: torch.Tensor
    step: torch.Tensor

    def of(self, heads: DeltaHeads, keys: Share, values: slice) -> "DeltaWeights":
        """The weights of some heads."""

        def channels(weight: torch.Tensor) -> torch.Tensor:
            parts = weight.split(heads.channels)
            sizes = heads.key_dim, heads.key_dim, heads.value_dim
            shares = keys, keys, values
            found = [part.unflatten(0, (-1, size))[share] for part, size, share in zip(parts, sizes, shares)]
            return torch.cat([part.flatten(0, 1) for part in found])

        bias = None if self.bias is None else channels(self.bias)
        step = self.step.unflatten(0, (heads.values, heads.decays))[values].flatten()
        return replace(self, convolution=channels(self.convolution), bias=bias, decay=self.decay[values], step=step)


@dataclass(frozen=True, eq=False)
class DeltaLayer:
    """The core of a gated delta net: convolution, gates and recurrence.

    Args:
        normalize: (..., key_dim) -> the same shape, applied to queries and keys; None for no normalization.
    """

    heads: DeltaHeads
    weights: DeltaWeights
    recurrence: Recurrence
    convolve: Convolution
    normalize: Callable[[torch.Tensor], torch.Tensor] | None

    def by_heads(
        self, inputs: torch.Tensor, gates: torch.Tensor, exchange: SequenceExchange, documents: Documents
    ) -> torch.Tensor:
        """Every rank computes some heads over the whole sequence.

        Args:
            inputs: (s, b, channels), query, key and value of this rank's tokens. gates: (s, b, value heads * (1 +
                decays)), beta and alpha.
            exchange: over all ranks, with the runs of the batch's layout as rows.
            documents: boundaries in the whole sequence.

        Returns:
            (s, b, value heads, value_dim).
        """
        heads, rank = self.heads, exchange.rank
        documents = local_documents(documents, 0, sum(exchange.lengths))
        values, keys = head_shares(heads.values, heads.keys, exchange.size)
        parts = [
            Part("q", heads.keys, heads.key_dim, keys),
            Part("kv", heads.keys, heads.key_dim, keys),
            Part("kv", heads.values, heads.value_dim, values),
            Part("gates", heads.values, 1, values),
            Part("gates", heads.values, heads.decays, values),
        ]
        tensors = (*inputs.split(heads.channels, dim=-1), *gates.split(heads.gates, dim=-1))
        arrived = HeadExchange(exchange, parts).to_sequence(
            *(tensor.unflatten(-1, (part.num_heads, part.dim)) for tensor, part in zip(tensors, parts))
        )
        query, key, value, beta, alpha = (tensor.flatten(2) for tensor in arrived)
        core = replace(
            self,
            heads=replace(heads, keys=parts[0].count(rank), values=parts[2].count(rank)),
            weights=self.weights.of(heads, keys[rank], values[rank]),
        )
        inputs = torch.cat([query, key, value], dim=-1).transpose(0, 1).contiguous()
        mixed = self.convolve(inputs, core.weights.convolution, core.weights.bias, documents)
        rows = core.prepared(mixed, beta, alpha)
        out, _ = self.recurrence.over_documents(rows, documents)
        back = HeadExchange(exchange, [Part("out", heads.values, heads.value_dim, values)])
        return back.to_heads(out.transpose(0, 1))[0]

    def by_state(self, inputs: torch.Tensor, gates: torch.Tensor, part: OwnPart) -> torch.Tensor:
        """Compute all heads over this rank's part of the sequence.

        Args:
            inputs, gates: as for ``by_heads``, for the tokens of the part.

        Returns:
            (s, b, value heads, value_dim).
        """
        mixed = part.convolved(self.convolve, inputs, self.weights.convolution, self.weights.bias)
        rows = self.prepared(mixed, *gates.split(self.heads.gates, dim=-1))
        return self.recurrence.along(part.chain, rows, part.documents).transpose(0, 1)

    def prepared(self, mixed: torch.Tensor, beta: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The inputs of the recurrence.

        Args:
            mixed: (b, s, channels), output of the convolution. beta: (s, b, value heads). alpha: (s, b, value heads *
                decays).

        Returns:
            query and key (b, s, value heads, key_dim), value (b, s, value heads, value_dim), decay (b, s, value heads),
            or with key_dim decays (b, s, value heads, key_dim), and beta (b, s, value heads).
        """
        heads, beta, alpha = self.heads, beta.transpose(0, 1), alpha.transpose(0, 1)
        query, key, value = mixed.split(heads.channels, dim=-1)
        query, key = (part.unflatten(-1, (heads.keys, heads.key_dim)) for part in (query, key))
        if self.normalize is not None:
            query, key = self.normalize(query.contiguous()), self.normalize(key.contiguous())
        repeats = heads.values // heads.keys
        if repeats > 1:
            query, key = query.repeat_interleave(repeats, dim=2), key.repeat_interleave(repeats, dim=2)
        steps = F.softplus(alpha.to(accumulation_dtype(alpha.dtype)) + self.weights.step)
        decay = -self.weights.decay.exp()
        if heads.decays > 1:
            steps, decay = steps.unflatten(-1, (heads.values, heads.decays)), decay.unsqueeze(-1)
        value = value.unflatten(-1, (heads.values, heads.value_dim))
        return query, key, value, decay * steps, beta.sigmoid()
