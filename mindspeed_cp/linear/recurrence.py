"""The computation of a recurrent layer, document by document: the recurrence and the convolution before it.

b: batch, s: tokens, h: heads, k, v: head dimensions of keys and values, c: channels of the convolution, w: its width.
A state is (b, h, k, v). Documents are boundaries within the s tokens, (0, s) for a single document.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from mindspeed_cp.linear.state import Chain

Documents = tuple[int, ...]


# The interface of flash-linear-attention's kernels and of Megatron's torch code: query, key (b, s, h, k), value
# (b, s, h, v), g= (b, s, h), or (b, s, h, k) with a decay for each channel of the keys, beta= (b, s, h),
# initial_state= a state or None, output_final_state=True; they return (b, s, h, v) and the last state.
Rule = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
Rows = Sequence[torch.Tensor]  # (b, s, ...) of every input of a recurrence


class Recurrence(ABC):
    """Maps rows of tokens and a state to an output and a new state, document by document.

    Attributes:
        state_dtype: dtype of the states that it takes and returns.
    """

    state_dtype: torch.dtype

    @abstractmethod
    def over_documents(self, rows: Rows, documents: Documents) -> tuple[torch.Tensor, torch.Tensor]:
        """The output of all documents, each starting from an empty state, and the state after the last one."""

    @abstractmethod
    def linear_in_state(self, rows: Rows) -> tuple["FromState", torch.Tensor]:
        """Compute the tokens of one document whose first state is not known yet.

        Returns:
            a function first state -> (output, last state), and a tensor on which it depends.
        """

    @abstractmethod
    def state_shape(self, rows: Rows) -> tuple[int, ...]:
        """Shape of the state for such rows."""

    def along(self, chain: Chain, rows: Rows, documents: Documents) -> torch.Tensor:
        """The output for this rank's part of a sequence, with states passed from rank to rank."""
        if not chain.receives:
            return chain.hand_on(*self.over_documents(rows, documents))
        first = documents[1]
        from_state, after = self.linear_in_state(_between(rows, 0, first))
        out, state = from_state(chain.first_state(self.state_shape(rows), self.state_dtype, after))
        if len(documents) > 2:
            others = tuple(end - first for end in documents[1:])
            more, state = self.over_documents(_between(rows, first, documents[-1]), others)
            out = torch.cat([out, more], dim=1)
        return chain.hand_on(out, state)


FromState = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _between(rows: Rows, low: int, high: int) -> Rows:
    return [row[:, low:high] for row in rows]


@dataclass(frozen=True)
class DeltaRule(Recurrence):
    """The gated delta rule; its rows are query, key (b, s, h, k), value (b, s, h, v), g (b, s, h) or (b, s, h, k), and
    beta (b, s, h).

    Args:
        rule: linear in its first state; the columns of state and values are independent of each other.
        takes_documents: whether it takes ``cu_seqlens`` with a batch of one row; else it is called once per document.
    """

    rule: Rule
    takes_documents: bool
    state_dtype: torch.dtype

    def over_documents(self, rows: Rows, documents: Documents) -> tuple[torch.Tensor, torch.Tensor]:
        if self.takes_documents and len(documents) > 2:
            out, states = self._run(rows, None, cu_seqlens=boundaries_on(documents, rows[0].device))
            return out, states[-1:]
        found = [self._run(_between(rows, low, high)) for low, high in zip(documents, documents[1:])]
        return torch.cat([out for out, _ in found], dim=1), found[-1][1]

    def _run(
        self, rows: Rows, state: torch.Tensor | None = None, **further: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value, g, beta = (row.contiguous() for row in rows)
        out, last = self.rule(
            query, key, value, g=g, beta=beta, initial_state=state, output_final_state=True, **further
        )
        assert last is not None, "the last state was asked for"
        return out, last

    def linear_in_state(self, rows: Rows) -> tuple["FromState", torch.Tensor]:
        """Run the rule on more columns: the values starting from an empty state, and zero values starting from the
        identity, which give the effect of any first state.
        """
        query, key, value, g, beta = rows
        size, width = key.size(-1), value.size(-1)
        columns = torch.cat([value, value.new_zeros((*value.shape[:-1], size))], dim=-1)
        identity = torch.eye(size, width + size, dtype=self.state_dtype, device=value.device).roll(width, -1)
        first = identity.expand(value.size(0), value.size(2), size, width + size).contiguous()
        out, last = self._run((query, key, columns, g, beta), first)

        def from_state(state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            own, of_state = out.split([width, size], dim=-1)
            more = torch.einsum("bshk,bhkv->bshv", of_state.to(state.dtype), state)
            return (own + more).to(own.dtype), last[..., :width] + last[..., width:] @ state

        return from_state, out

    def state_shape(self, rows: Rows) -> tuple[int, ...]:
        _, key, value, *_ = rows
        return value.size(0), value.size(2), key.size(-1), value.size(-1)


# (b, s, c), weight (c, w), bias (c,) or None, documents -> (b, s, c), activation included.
Convolution = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, Documents], torch.Tensor]


def causal_convolution(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, documents: Documents
) -> torch.Tensor:
    """A depthwise convolution of each channel over its last w inputs, which are 0 before a document; no activation.

    Args:
        rows: (b, s, c). weight: (c, w). bias: (c,) or None.
    """
    channels, width = weight.shape
    found = []
    for low, high in zip(documents, documents[1:]):
        padded = F.pad(rows[:, low:high].transpose(1, 2), (width - 1, 0))
        found.append(F.conv1d(padded, weight.unsqueeze(1), bias, groups=channels).transpose(1, 2))
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


@lru_cache(maxsize=16)
def boundaries_on(documents: Documents, device: torch.device) -> torch.Tensor:
    """Document boundaries as an int64 tensor for kernels, copied to the device once for all layers."""
    with torch.inference_mode(False):
        return torch.tensor(documents, device=device)
