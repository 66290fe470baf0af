"""What MindSpeed's fusions call of torch_npu, computed on the CPU: norm, rotation and SwiGLU with their gradients."""

import torch


def npu_rms_norm(rows, gamma, epsilon=1e-6):
    rstd = torch.rsqrt(rows.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return (rows * rstd * gamma).to(rows.dtype), rstd


def npu_rms_norm_backward(grad, rows, gamma, rstd):
    weighted = grad * gamma
    towards = (weighted * rows).mean(-1, keepdim=True)
    own = (rstd * weighted - rows * rstd**3 * towards).to(rows.dtype)
    return own, (grad * rows * rstd).sum_to_size(gamma.shape).float()


def _half_turned(rows, sign=1):
    first, second = rows.chunk(2, -1)
    return torch.cat((-sign * second, sign * first), -1)


def npu_rotary_mul(rows, cos, sin, *mode):
    return rows * cos + _half_turned(rows) * sin


def npu_rotary_mul_backward(grad, rows, cos, sin, *mode):
    own = grad * cos + _half_turned(grad * sin, -1)
    return own, (grad * rows).sum_to_size(cos.shape), (grad * _half_turned(rows)).sum_to_size(sin.shape)


def npu_swiglu(rows, dim=-1):
    gate, value = rows.chunk(2, dim)
    return torch.nn.functional.silu(gate) * value


def npu_swiglu_backward(grad, rows, dim=-1):
    gate, value = rows.chunk(2, dim)
    open_share = torch.sigmoid(gate)
    of_gate = grad * value * open_share * (1 + gate * (1 - open_share))
    return torch.cat((of_gate, grad * gate * open_share), dim)


OPERATORS = {name: value for name, value in globals().items() if name.startswith("npu_")}
