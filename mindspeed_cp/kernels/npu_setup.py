"""Whether this machine has a working torch_npu."""

from importlib import import_module

import torch


def unavailable() -> str:
    """Why this machine cannot use the NPU kernel, with what to install and source; "" when it can."""
    try:
        torch_npu = import_module("torch_npu")
    except ModuleNotFoundError:
        release = torch.__version__.split("+")[0]
        return (
            f"torch_npu is not installed; install the release that matches torch {release} (pip install "
            f"torch_npu=={release}) and Ascend's driver, CANN toolkit and kernels."
        )
    except (ImportError, OSError, RuntimeError) as error:
        return (
            f"torch_npu does not load ({error}); install Ascend's CANN toolkit and kernels, then "
            "`source /usr/local/Ascend/ascend-toolkit/set_env.sh` in the shell that starts the training."
        )
    npu = getattr(torch_npu, "npu", None)
    if npu is not None and not npu.is_available():
        return "torch_npu finds no device; check `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES."
    return ""
