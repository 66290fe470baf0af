"""State-space layers (Mamba 2) by states: every rank computes its part of the sequence and passes its last state on.

b: batch, s: tokens of this rank, h: heads of p channels, g: groups of state size n, each shared by h / g heads. A state
is (b, h, p, n).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mindspeed_cp.linear.parts import OwnPart
from mindspeed_cp.linear.recurrence import Convolution, Documents, FromState, Recurrence, Rows


@dataclass(frozen=True, eq=False)
class StateSpace(Recurrence):
    """A selective scan; its rows are x (b, s, h, p), steps before softplus (b, s, h), and B, C (b, s, g, n).

    Args:
        scan: mamba_chunk_scan_combined or a function with the same signature.
        decay: A, (h,), negative. skip: D, (h,) or (h, p). bias: bias of the steps, (h,).
        chunk_size: the scan's chunk size in tokens.
    """

    scan: Callable[..., Any]
    decay: torch.Tensor
    skip: torch.Tensor
    bias: torch.Tensor
    chunk_size: int
    state_dtype: torch.dtype

    def over_documents(self, rows: Rows, documents: Documents) -> tuple[torch.Tensor, torch.Tensor]:
        values, steps, before, after = (row.contiguous() for row in rows)
        numbers = None
        if len(documents) > 2:
            lengths = torch.tensor([high - low for low, high in zip(documents, documents[1:])], device=values.device)
            numbers = torch.arange(len(lengths), device=values.device, dtype=torch.int32).repeat_interleave(lengths)
            numbers = numbers.expand(values.size(0), -1).contiguous()
        out, last = self.scan(
            values,
            steps,
            self.decay,
            before,
            after,
            self.chunk_size,
            D=self.skip,
            dt_bias=self.bias,
            dt_softplus=True,
            seq_idx=numbers,
            return_final_states=True,
        )
        return out, last

    def linear_in_state(self, rows: Rows) -> tuple[FromState, torch.Tensor]:
        """The effect of the first state: it decays by a factor per head and is read by C."""
        values, steps, _, reads = rows
        out, last = self.over_documents(rows, (0, values.size(1)))

        def from_state(state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            decays = F.softplus(steps.to(state.dtype) + self.bias.to(state.dtype)) * self.decay.to(state.dtype)
            left = decays.cumsum(1).exp()
            read = torch.einsum("bsgn,bgrpn->bsgrp", reads.to(state.dtype), state.unflatten(1, (reads.size(2), -1)))
            more = read.flatten(2, 3) * left.unsqueeze(-1)
            return (out + more).to(out.dtype), last + left[:, -1, :, None, None] * state

        return from_state, out

    def state_shape(self, rows: Rows) -> tuple[int, ...]:
        values, _, _, reads = rows
        return values.size(0), values.size(2), values.size(3), reads.size(-1)


@dataclass(frozen=True, eq=False)
class StateSpaceLayer:
    """The core of a layer: convolution and scan.

    Args:
        groups: g. state: n.
        weight, bias: the convolution over x, B and C, (channels, width) and (channels,).
    """

    scan: StateSpace
    groups: int
    state: int
    weight: torch.Tensor
    bias: torch.Tensor | None
    convolve: Convolution

    def by_state(self, inputs: torch.Tensor, steps: torch.Tensor, part: OwnPart) -> torch.Tensor:
        """Compute this rank's part of the sequence.

        Args:
            inputs: (s, b, channels), x, B and C of the part's tokens. steps: (s, b, h).

        Returns:
            (s, b, h * p).
        """
        mixed, group = part.convolved(self.convolve, inputs, self.weight, self.bias), self.groups * self.state
        values, writes, reads = mixed.split([mixed.size(-1) - 2 * group, group, group], dim=-1)
        writes, reads = (each.unflatten(-1, (self.groups, self.state)) for each in (writes, reads))
        rows = values.unflatten(-1, (steps.size(-1), -1)), steps.transpose(0, 1), writes, reads
        return self.scan.along(part.chain, rows, part.documents).transpose(0, 1).flatten(2)
