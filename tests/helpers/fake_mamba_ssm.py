"""A fake mamba-ssm with its names and signatures, which computes token by token in the dtype of its states.

After this module is imported, ``import mamba_ssm`` finds it; Megatron looks for it when its Mamba mixer is imported.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
import torch.nn.functional as F


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    dt_softplus=False,
    return_final_states=False,
):
    """x (b, s, h, p), dt (b, s, h), A (h,), B and C (b, s, g, n) -> (b, s, h, p) and states (b, h, p, n)."""
    assert dt_softplus and z is None and initial_states is None
    assert all(tensor.is_contiguous() for tensor in (x, dt, B, C))
    repeats = x.size(2) // B.size(2)
    B, C = (part.repeat_interleave(repeats, dim=2).to(A.dtype) for part in (B, C))
    dt, rows, found = F.softplus(dt.to(A.dtype) + dt_bias), x.to(A.dtype), []
    state = rows.new_zeros((*x.shape[:1], *x.shape[2:], B.size(-1)))
    for t in range(x.size(1)):
        if t and seq_idx is not None and seq_idx[0, t] != seq_idx[0, t - 1]:
            state = torch.zeros_like(state)
        written = torch.einsum("bhp,bhn->bhpn", rows[:, t] * dt[:, t].unsqueeze(-1), B[:, t])
        state = state * (dt[:, t] * A).exp()[..., None, None] + written
        found.append(torch.einsum("bhn,bhpn->bhp", C[:, t], state))
    out = torch.stack(found, dim=1) + rows * (D if D.dim() == 2 else D.unsqueeze(-1))
    return (out.to(x.dtype), state) if return_final_states else out.to(x.dtype)


def mamba_split_conv1d_scan_combined(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    initial_states=None,
    seq_idx=None,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    activation="silu",
    rmsnorm_weight=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
):
    """(b, s, z x B C dt of all heads) -> (b, s, x), gated."""
    assert rmsnorm_weight is None and seq_idx is None and activation == "silu"
    heads, width = A.numel(), conv1d_weight.size(1)
    inner = heads * headdim if headdim else D.numel()
    z, mixed, dt = zxbcdt.split([inner, zxbcdt.size(-1) - inner - heads, heads], dim=-1)
    padded = F.pad(mixed.transpose(1, 2), (width - 1, 0))
    mixed = F.silu(F.conv1d(padded, conv1d_weight.unsqueeze(1), conv1d_bias, groups=len(conv1d_weight))).transpose(1, 2)
    x, B, C = mixed.split([inner, *[(mixed.size(-1) - inner) // 2] * 2], dim=-1)
    rows = x.unflatten(-1, (heads, -1)), dt, *(part.unflatten(-1, (ngroups, -1)) for part in (B, C))
    x, dt, B, C = (row.contiguous() for row in rows)
    out = mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, dt_softplus=True)
    return out.flatten(2) * F.silu(z)


class RMSNorm(torch.nn.Module):
    """RMSNorm over groups of channels."""

    def __init__(self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None):
        super().__init__()
        self.eps, self.group_size = eps, group_size
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x, z=None):
        assert z is None
        groups = x.unflatten(-1, (-1, self.group_size))
        scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return (groups * scale).flatten(-2) * self.weight


TRITON = "mamba_ssm.ops.triton"
MODULES = {
    "mamba_ssm": {"__version__": "2.2.4"},
    "mamba_ssm.ops": {},
    TRITON: {},
    f"{TRITON}.layernorm_gated": {"RMSNorm": RMSNorm},
    f"{TRITON}.ssd_combined": {
        "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
        "mamba_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
    },
}
for name, values in MODULES.items():
    module = ModuleType(name)
    module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
    vars(module).update(values)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
