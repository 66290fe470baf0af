"""Names of MindSpeed's gated delta net that ms-swift imports for every model as soon as context parallelism is on."""

from collections.abc import Callable
from typing import Any, NoReturn

__all__ = ["tensor_a2a_cp2hp", "tensor_a2a_hp2cp"]


def _refuse(name: str) -> Callable[..., NoReturn]:
    def refused(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name}: gated delta nets with context parallelism are not supported, in no version of Megatron; use "
            "--context-parallel-size 1 for models that have them."
        )

    refused.__name__ = name
    return refused


tensor_a2a_cp2hp = _refuse("tensor_a2a_cp2hp")
tensor_a2a_hp2cp = _refuse("tensor_a2a_hp2cp")
