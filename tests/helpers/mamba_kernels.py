"""The kernels of Megatron's state-space layers as plain recurrences, for tests without a GPU.

Import it before Megatron's state-space models. Functions that only inference calls are placeholders.

    zxbcdt  (batch, seq, 2 heads x dim + 2 groups x state + heads): gate, input, B, C, time step
    state   h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t],  y[t] = C[t] h[t] + D x[t]
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F

INFERENCE = (
    "megatron.core.inference.contexts.attention_context.triton.tensor_ops",
    "megatron.core.ssm.ops.causal_conv1d_triton",
    "megatron.core.ssm.ops.intermediate_extraction",
    "megatron.core.ssm.ops.mamba_ssm",
    "mamba_ssm.ops.triton.selective_state_update",
    "causal_conv1d.causal_conv1d_varlen",
)


class RMSNorm(torch.nn.Module):
    """RMSNorm over groups of a row, like mamba_ssm's, without a gate."""

    def __init__(self, size, eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None):
        super().__init__()
        self.eps, self.group_size = eps, group_size or size
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=dtype))

    def forward(self, x, z=None):
        assert z is None, "Megatron gates within the scan"
        groups = x.float().unflatten(-1, (-1, self.group_size))
        scaled = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return (scaled.flatten(-2) * self.weight).to(x.dtype)


def mamba_split_conv1d_scan_combined(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, activation="silu", headdim=None, ngroups=1,
    norm_before_gate=True, seq_idx=None,
):  # fmt: skip
    """(batch, seq, heads x dim)"""
    assert seq_idx is None, "documents are not reset here"
    heads, inner = len(A), (len(A) * headdim)
    width = (zxbcdt.size(-1) - 2 * inner - heads) // 2
    z, xbc, dt = zxbcdt.split([inner, inner + 2 * width, heads], -1)
    taps = conv1d_weight.size(-1)
    xbc = F.conv1d(xbc.mT, conv1d_weight[:, None], conv1d_bias, padding=taps - 1, groups=xbc.size(-1))
    x, B, C = F.silu(xbc[..., : zxbcdt.size(1)].mT).split([inner, width, width], -1)
    x = x.unflatten(-1, (heads, headdim))
    B, C = (part.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, 2) for part in (B, C))
    dt = F.softplus(dt + dt_bias)
    state, rows = x.new_zeros(*x.shape[::2], headdim, B.size(-1)), []
    for t in range(x.size(1)):
        grown = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = state * torch.exp(dt[:, t] * A)[..., None, None] + grown
        rows.append((state * C[:, t, :, None]).sum(-1))
    y = torch.stack(rows, 1) + D[:, None] * x
    return y.flatten(-2) * F.silu(z)


def _install():
    """Install the kernels under the names that Megatron imports."""
    made = {
        "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": RMSNorm},
        "mamba_ssm.ops.triton.ssd_combined": {
            "mamba_chunk_scan_combined": mock.MagicMock(),
            "mamba_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
        },
        "causal_conv1d": {"causal_conv1d_fn": mock.MagicMock(), "causal_conv1d_update": mock.MagicMock()},
    }
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", *made):
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(made.get(name, {}), __path__=[], __version__="2.2.4")
        sys.modules[name].__spec__ = ModuleSpec(name, None)  # for who looks whether it is there
    for name in INFERENCE:
        sys.modules[name] = mock.MagicMock()


_install()
