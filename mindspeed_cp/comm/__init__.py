"""Communication of context parallelism: all-to-all, exchanges of keys and values, and the count of bytes sent."""

from mindspeed_cp.comm.meter import Traffic, count_bytes

__all__ = ["Traffic", "count_bytes"]
