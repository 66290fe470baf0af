"""The kernels of flash-linear-attention as layers with a state call them, against the rule token by token.

    python tests/check fla                       on a GPU, in bfloat16
    TRITON_INTERPRET=1 python tests/check fla    on a CPU, in float32: Triton's interpreter, slow and small

It needs fla-core, triton and einops. The last column is the largest difference over outputs and gradients, each
relative to the largest value; exit status 1 where one is above the limit.
"""

import os

import torch
import torch.nn.functional as F

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LIMIT = 1e-5 if INTERPRETED else 2e-2
DOCUMENTS = (0, 5, 37, 96)
HEADS, KEY, VALUE = (1, 16, 16) if INTERPRETED else (4, 128, 128)
DEVICE, DTYPE = ("cpu", torch.float32) if INTERPRETED else ("cuda", torch.bfloat16)


class Index(int):
    """A loop's counter as Triton's language has it; in the interpreter it is Python's."""

    def to(self, dtype: object) -> "Index":
        return self


def prepare_interpreter() -> None:
    """Take the first configuration of every kernel, for there is nothing to measure others on."""
    from triton.runtime import autotuner

    original = autotuner.Autotuner.__init__

    def first(self, function, names, configs, *args, **kwargs):
        original(self, function, names, list(configs)[:1], *args, **kwargs)

    autotuner.Autotuner.__init__ = first
    from fla.ops.common import chunk_delta_h

    chunk_delta_h.range = lambda *ends: map(Index, range(*ends))


def token_by_token(query, key, value, g, beta, state, documents):
    """The gated delta rule in float32; ``state`` is the first one of the first document."""
    found = []
    query, key, value = (row.float() for row in (query, key, value))
    for low, high in zip(documents, documents[1:]):
        if low or state is None:
            state = value.new_zeros((value.size(0), value.size(2), key.size(-1), value.size(-1)))
        for t in range(low, high):
            state = state * g[:, t].exp()[..., None, None]
            seen = torch.einsum("bhk,bhkv->bhv", key[:, t], state)
            new = beta[:, t].float().unsqueeze(-1) * (value[:, t] - seen)
            state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], new)
            found.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state) * key.size(-1) ** -0.5)
    return torch.stack(found, dim=1), state


def convolved(rows, weight, documents):
    from mindspeed_cp.linear.recurrence import causal_convolution

    out = F.silu(causal_convolution(rows.float(), weight.float(), None, documents))
    return out, out.sum()


def results(function, leaves):
    """Outputs and the gradients of ``leaves`` for gradients that are drawn."""
    outputs = [output.float() for output in function()]
    torch.manual_seed(1)
    sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
    found = [*(output.detach() for output in outputs), *(leaf.grad.float() for leaf in leaves)]
    for leaf in leaves:
        leaf.grad = None
    return found


def difference(ours, expected, leaves):
    pairs = zip(results(ours, leaves), results(expected, leaves), strict=True)
    return max(float((mine - other).abs().max() / other.abs().max()) for mine, other in pairs)


def leaf(tensor, dtype=DTYPE):
    return tensor.to(DEVICE, dtype).requires_grad_()


def checks():
    """(name, difference)"""
    from fla.modules.convolution import causal_conv1d
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    from mindspeed_cp.linear.recurrence import DeltaRule

    torch.manual_seed(0)
    length, recurrence = DOCUMENTS[-1], DeltaRule(chunk_gated_delta_rule, True, torch.float32)
    query, key = (leaf(F.normalize(torch.randn(1, length, HEADS, KEY), dim=-1)) for _ in range(2))
    value, beta = leaf(torch.randn(1, length, HEADS, VALUE)), leaf(torch.rand(1, length, HEADS))
    rows = [query, key, value, leaf(-0.3 * torch.rand(1, length, HEADS), torch.float32), beta]
    state = leaf(0.3 * torch.randn(1, HEADS, KEY, VALUE), torch.float32)
    yield (
        "any first state",
        difference(
            lambda: recurrence.linear_in_state(rows)[0](state),
            lambda: token_by_token(*rows, state, (0, length)),
            [*rows, state],
        ),
    )
    yield (
        "documents",
        difference(
            lambda: recurrence.over_documents(rows, DOCUMENTS), lambda: token_by_token(*rows, None, DOCUMENTS), rows
        ),
    )
    inputs, weight = leaf(torch.randn(1, length, 32)), leaf(torch.randn(32, 4))
    ends = torch.tensor(DOCUMENTS, device=DEVICE)

    def convolve():
        out = causal_conv1d(x=inputs, weight=weight, bias=None, activation="silu", cu_seqlens=ends)[0]
        return out, out.sum()

    yield "convolution", difference(convolve, lambda: convolved(inputs, weight, DOCUMENTS), [inputs, weight])


def main() -> int:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise SystemExit("tests/check fla: no GPU is here; set TRITON_INTERPRET=1 for Triton's interpreter on the CPU.")
    if INTERPRETED:
        prepare_interpreter()
    where = "in Triton's interpreter" if INTERPRETED else torch.cuda.get_device_name()
    worst = 0.0
    for name, found in checks():
        print(f"{name:<16} {where}, {str(DTYPE).removeprefix('torch.')}: {found:.1e}, limit {LIMIT:.0e}")
        worst = max(worst, found)
    return int(not worst < LIMIT)
