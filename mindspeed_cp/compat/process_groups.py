"""MindSpeed's ``model_parallel_utils`` and ``parallel_state``: getters of this process's groups and ranks."""

from collections.abc import Callable
from typing import Any

from mindspeed_cp.compat.group_getters import GETTERS, GroupGetters
from mindspeed_cp.megatron.adaptor import Adaptor


def _adaptor() -> Adaptor:
    from mindspeed_cp import megatron_adaptor  # which applies the patches: when a getter is called, not before

    return megatron_adaptor.state()


_OURS = GroupGetters(_adaptor)


def _maker(purpose: str) -> Callable[..., None]:
    """A replacement for one of MindSpeed's functions that make groups; initialize_model_parallel has made them all."""

    def initialize(
        tensor_model_parallel_size: int,
        pipeline_model_parallel_size: int,
        context_parallel_size: int,
        nccl_comm_cfgs: Any = None,
    ) -> None:
        _OURS.check_initialized_for(purpose, context_parallel_size)

    return initialize


_MAKERS = {
    "initialize_context_parallel_group_for_send_recv_overlap": _maker("send-recv overlap"),
    "initialize_context_parallel_group_for_hybrid_cp": _maker("hybrid_cp_algo"),
    "initialize_context_parallel_group_for_double_ring": _maker("double ring"),
}
globals().update(_MAKERS, **{name: getattr(_OURS, name) for name in GETTERS})
__all__ = [*GETTERS, *_MAKERS]
