"""A formula for the bytes of attention that a checkpoint keeps."""

from math import lcm

from cases import DTYPES
from setups import degree_of


def expected_bytes(case, order, rank):
    """t (H dv e + 4 H) without Ulysses; with it, also what was received, and the output before and after exchange."""
    degree, item = degree_of(case.config), DTYPES[case.dtype].itemsize
    tokens, lse = case.seq_len // case.cp * case.batch, 8 if case.dtype == "float64" else 4
    size = case.heads * (case.dv * item + lse)
    ring, policy = case.cp // degree, case.config.get("kv_cache_policy")
    kv_heads = lcm(case.kv_heads, degree)
    dims = {None: 0, "half": case.dk, "full": case.dk + case.dv}[policy]
    if degree > 1:
        size += case.heads * (case.dv + case.dk) * item
        size += kv_heads * (case.dk + case.dv - (dims if ring == 1 else 0)) * item
        if ring > 1 and order is None:  # memory order of the kernel
            size += kv_heads * (case.dk + case.dv) * item  # packed for the ring, besides the message with the query
    if ring > 1:  # an all-gather receives the rank's own rows as well
        received = ring - (case.config["algorithm"] != "kvallgather_cp_algo")
        if case.config["kv_exchange"] == "mesh":  # only needed rows: from lower zigzag ranks, the first chunk
            received -= rank // degree / 2
        size += round(received * kv_heads * dims * item)
    return 2 * tokens * size  # two calls
