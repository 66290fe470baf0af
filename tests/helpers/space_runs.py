"""Cores of state-space layers on several ranks, and computed token by token in one process."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import setup_of
from fake_mamba_ssm import mamba_chunk_scan_combined

HEADS, GROUPS, CHANNELS, STATE, WIDTH = 4, 2, 3, 2, 4


@dataclass(frozen=True)
class Case:
    """One core on ``cp`` ranks, each with one part of the sequence; documents are boundaries of the whole sequence."""

    cp: int
    seq_len: int
    batch: int = 1
    documents: tuple | None = None
    skip: tuple = (HEADS,)

    @property
    def ends(self):
        return self.documents or (0, self.seq_len)


def inputs_of(case):
    """(inputs and steps of the whole sequence, weights, gradient of the output)"""
    torch.manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    channels = HEADS * CHANNELS + 2 * GROUPS * STATE
    rows = draw(case.seq_len, case.batch, channels), draw(case.seq_len, case.batch, HEADS)
    weights = [draw(channels, WIDTH), draw(channels), draw(HEADS), draw(*case.skip), draw(HEADS)]
    return rows, weights, draw(case.seq_len, case.batch, HEADS * CHANNELS)


def expected(case):
    """(out, gradients of rows and weights), computing each document separately."""
    rows, weights, grad = inputs_of(case)
    for leaf in (*rows, *weights):
        leaf.requires_grad_()
    weight, bias, decay, skip, step_bias = weights
    outs = []
    for low, high in zip(case.ends, case.ends[1:]):
        if low == high:
            continue
        inputs, steps = (row[low:high].transpose(0, 1) for row in rows)
        padded = F.pad(inputs.transpose(1, 2), (WIDTH - 1, 0))
        mixed = F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=len(weight))).transpose(1, 2)
        values, writes, reads = mixed.split([HEADS * CHANNELS, GROUPS * STATE, GROUPS * STATE], dim=-1)
        out = mamba_chunk_scan_combined(
            values.unflatten(-1, (HEADS, CHANNELS)).contiguous(),
            steps.contiguous(),
            -decay.exp(),
            *(part.unflatten(-1, (GROUPS, STATE)).contiguous() for part in (writes, reads)),
            64,
            D=skip,
            dt_bias=step_bias,
            dt_softplus=True,
        )
        outs.append(out.transpose(0, 1).flatten(2))
    out = torch.cat(outs)
    out.backward(grad)
    return out.detach(), [row.grad for row in rows], [weight.grad for weight in weights]


def run(rank, case):
    """(this rank's positions, outputs, gradients of its rows, gradients of weights, bytes forward)"""
    from mindspeed_cp import SequenceLayout
    from mindspeed_cp.comm import count_bytes
    from mindspeed_cp.linear.parts import OwnPart
    from mindspeed_cp.linear.recurrence import causal_convolution
    from mindspeed_cp.linear.state_space import StateSpace, StateSpaceLayer

    config, groups = setup_of({"context_parallel_size": case.cp, "batch_layout": "contiguous"})
    layout = SequenceLayout.build(config, case.seq_len)
    rows, weights, grad = inputs_of(case)
    mine = [layout.shard(row, rank).clone().requires_grad_() for row in rows]
    weight, bias, decay, skip, step_bias = (each.requires_grad_() for each in weights)
    scan = StateSpace(mamba_chunk_scan_combined, -decay.exp(), skip, step_bias, 64, torch.float64)
    layer = StateSpaceLayer(
        scan, GROUPS, STATE, weight, bias, lambda *arguments: F.silu(causal_convolution(*arguments))
    )
    with count_bytes() as sent:
        out = layer.by_state(*mine, OwnPart(groups.cp, layout, case.ends))
    out.backward(layout.shard(grad, rank))
    gradients = [row.grad for row in mine], [each.grad for each in weights]
    return (
        layout.positions(rank),
        out.detach(),
        *gradients,
        {name: count for name, count in sent.bytes.items() if count},
    )
