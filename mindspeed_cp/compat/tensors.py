"""MindSpeed's conversions between (s, b, heads * dim) and packed tokens (``context_parallel.utils``)."""

import torch

__all__ = ["sbh_to_tnd", "tnd_to_sbh"]


def sbh_to_tnd(x: torch.Tensor, n: int) -> torch.Tensor:
    """(s, b, n * d) -> (b * s, n, d), the concatenated rows of the batch."""
    s, b, h = x.shape
    return x.transpose(0, 1).reshape(b * s, n, h // n)


def tnd_to_sbh(x: torch.Tensor, b: int) -> torch.Tensor:
    """(b * s, n, d) -> (s, b, n * d)."""
    t, n, d = x.shape
    return x.view(b, t // b, n * d).transpose(0, 1)
