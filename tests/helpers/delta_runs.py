"""Cores of gated delta nets on several ranks, and computed token by token in one process."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import setup_of

WIDTH = 4  # width of the convolution


@dataclass(frozen=True)
class Case:
    """One core; documents are boundaries of the whole sequence; ``cheap`` uses a rule that costs nothing."""

    cp: int
    way: str
    seq_len: int
    keys: int = 2
    values: int = 4
    batch: int = 1
    documents: tuple | None = None
    layout: str = "contiguous"
    takes_documents: bool = False
    bias: bool = False
    key_dim: int = 3
    value_dim: int = 2
    cheap: bool = False
    alltoall: bool = True
    decays: int = 1
    gate: bool = False

    @property
    def ends(self):
        return self.documents or (0, self.seq_len)


def rule(query, key, value, *, g, beta, initial_state, output_final_state, cu_seqlens=None):
    """The gated delta rule, token by token, in the dtype of its inputs: (b, s, h, k) -> (b, s, h, v) and states; with g
    (b, s, h, k) every channel of the keys decays on its own, as in Kimi's delta attention.
    """
    if cu_seqlens is not None:
        assert initial_state is None and query.size(0) == 1
        rows, ends = (query, key, value, g, beta), cu_seqlens.tolist()
        parts = [
            rule(
                *(row[:, low:high] for row in rows[:3]),
                g=g[:, low:high],
                beta=beta[:, low:high],
                initial_state=None,
                output_final_state=True,
            )
            for low, high in zip(ends, ends[1:])
        ]
        return torch.cat([out for out, _ in parts], dim=1), torch.cat([state for _, state in parts])
    state, found = initial_state, []
    if state is None:
        state = value.new_zeros((value.size(0), value.size(2), key.size(-1), value.size(-1)))
    for t in range(query.size(1)):
        state = state * g[:, t].exp().reshape(*state.shape[:2], -1, 1)
        seen = torch.einsum("bhk,bhkv->bhv", key[:, t], state)
        new = beta[:, t].unsqueeze(-1) * (value[:, t] - seen)
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], new)
        found.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state) * key.size(-1) ** -0.5)
    return torch.stack(found, dim=1), state if output_final_state else None


def normalize(tensor):
    return tensor * torch.rsqrt(tensor.square().sum(-1, keepdim=True) + 1e-6)


def inputs_of(case):
    """(tokens (S, b, width), weights by name, gradient of the output)."""
    torch.manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    channels = 2 * case.keys * case.key_dim + case.values * case.value_dim
    weights = {"convolution": draw(channels, WIDTH), "decay": draw(case.values)}
    weights["step"] = draw(case.values * case.decays)
    weights["bias"] = draw(channels) if case.bias else None
    tokens = draw(case.seq_len, case.batch, channels + case.values * (1 + case.decays))
    return tokens, weights, draw(case.seq_len, case.batch, case.values, case.value_dim)


def expected(case):
    """(out, gradients by name) of one process that computes each document and each convolution output separately."""
    tokens, weights, grad = inputs_of(case)
    leaves = [tokens, *(weight for weight in weights.values() if weight is not None)]
    for leaf in leaves:
        leaf.requires_grad_()
    qk, v = case.keys * case.key_dim, case.values * case.value_dim
    outs = []
    for low, high in zip(case.ends, case.ends[1:]):
        inputs, beta, alpha = tokens[low:high].split([2 * qk + v, case.values, case.values * case.decays], dim=-1)
        if low == high:
            continue
        mixed = []
        for t in range(high - low):
            seen = sum(inputs[t - j] * weights["convolution"][:, WIDTH - 1 - j] for j in range(min(WIDTH, t + 1)))
            mixed.append(F.silu(seen if weights["bias"] is None else seen + weights["bias"]))
        query, key, value = torch.stack(mixed).transpose(0, 1).split([qk, qk, v], dim=-1)
        query, key = (normalize(part.unflatten(-1, (case.keys, case.key_dim))) for part in (query, key))
        of_value = [head * case.keys // case.values for head in range(case.values)]
        decays = weights["decay"].exp().repeat_interleave(case.decays)
        g = -decays * F.softplus(alpha + weights["step"])
        g = g.unflatten(-1, (case.values, case.decays)) if case.decays > 1 else g
        out, _ = rule(
            query[:, :, of_value],
            key[:, :, of_value],
            value.unflatten(-1, (case.values, case.value_dim)),
            g=g.transpose(0, 1),
            beta=beta.sigmoid().transpose(0, 1),
            initial_state=None,
            output_final_state=False,
        )
        outs.append(out.transpose(0, 1))
    out = torch.cat(outs)
    out.backward(grad)
    return out.detach(), {"tokens": tokens.grad} | {
        name: weight.grad for name, weight in weights.items() if weight is not None
    }


def layout_of(case, config):
    from mindspeed_cp import SequenceLayout

    if case.layout == "uneven":  # rank r has r + 1 shares, in an order that does not ascend
        total = case.cp * (case.cp + 1) // 2
        ends = [case.seq_len * rank * (rank + 1) // (2 * total) for rank in range(case.cp + 1)]
        ends[-1] = case.seq_len
        runs = [(low, high) for low, high in zip(ends, ends[1:])]
        return SequenceLayout.from_runs(config, [[run] for run in runs[1:] + runs[:1]])
    return SequenceLayout.build(config, case.seq_len)


def core_of(case, weights):
    from mindspeed_cp.linear.gated_delta import DeltaHeads, DeltaLayer, DeltaWeights
    from mindspeed_cp.linear.recurrence import DeltaRule, causal_convolution

    return DeltaLayer(
        DeltaHeads(case.keys, case.values, case.key_dim, case.value_dim, case.decays),
        DeltaWeights(**weights),
        DeltaRule(cheap if case.cheap else rule, case.takes_documents, torch.float64),
        lambda *arguments: F.silu(causal_convolution(*arguments)),
        normalize,
    )


def cheap(query, key, value, *, g, beta, initial_state, output_final_state):
    """A rule with the same arguments that is linear in its state and costs nothing, to test only what is sent."""
    state = torch.einsum("bshk,bshv->bhkv", key, value * (beta * g).unsqueeze(-1))
    state = state if initial_state is None else state + initial_state
    return value * query.sum(-1, keepdim=True), state


def run(rank, case):
    """(this rank's layout and outputs, gradients by name, bytes by purpose forward and backward)."""
    from mindspeed_cp.comm import count_bytes
    from mindspeed_cp.comm.sequence_exchange import SequenceExchange
    from mindspeed_cp.linear.parts import OwnPart
    from mindspeed_cp.linear.rows import contiguous_parts, conversion, exchange_rows

    config, groups = setup_of({"context_parallel_size": case.cp, "batch_layout": _kind(case)})
    layout = layout_of(case, config)
    tokens, weights, grad = inputs_of(case)
    mine = layout.shard(tokens, rank).clone().requires_grad_()
    for weight in weights.values():
        if weight is not None:
            weight.requires_grad_()
    core = core_of(case, weights)
    gates = case.values * (1 + case.decays)
    widths = [mine.size(-1) - gates, gates]
    with count_bytes() as forward:
        if case.way == "heads":
            exchange = SequenceExchange(groups.cp, layout.all_runs, case.alltoall)
            out = core.by_heads(*mine.split(widths, dim=-1), exchange, case.ends)
        else:
            parts = contiguous_parts(layout)
            gate = mine.new_zeros((*mine.shape[:2], case.values * case.value_dim * case.gate))  # of the output
            moved = exchange_rows(torch.cat([mine, gate], -1), conversion(layout, parts), groups.cp, "tokens")
            moved = moved[..., : mine.size(-1)]
            out = core.by_state(*moved.split(widths, dim=-1), OwnPart(groups.cp, parts, case.ends))
            out = exchange_rows(out, conversion(parts, layout), groups.cp, "tokens")
    with count_bytes() as backward:
        out.backward(layout.shard(grad, rank))
    grads = {name: weight.grad for name, weight in weights.items() if weight is not None}
    sent = [{purpose: count for purpose, count in traffic.bytes.items() if count} for traffic in (forward, backward)]
    return layout.positions(rank), out.detach(), mine.grad, grads, sent


def _kind(case):
    return "contiguous" if case.layout == "uneven" else case.layout
