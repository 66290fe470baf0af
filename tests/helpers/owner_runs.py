"""Other packages that replace the adaptor's names; functions for ``adaptor_runs.observe``."""

import importlib
import sys
from types import ModuleType

from adaptor_runs import attempt


def _of_another_package(name, source):
    """A module as from another package, in which Megatron's attention is ``Attention``."""
    module = ModuleType(name)
    module.__file__ = f"/somewhere/{name.replace('.', '/')}.py"
    module.Attention = importlib.import_module("megatron.core.transformer.dot_product_attention").DotProductAttention
    sys.modules[name] = module
    exec(compile(source, module.__file__, "exec"), vars(module))
    return module


def owners():
    """Names replaced by others: status in the report, message of ``check``, and the error when groups are made."""
    import torch  # noqa: F401

    from mindspeed_cp import ContextParallelConfig, megatron_adaptor
    from mindspeed_cp.patches import PatchError

    attention = importlib.import_module("megatron.core.transformer.dot_product_attention").DotProductAttention
    target = f"{attention.__module__}.{attention.__qualname__}.forward"

    def seen(call=megatron_adaptor.check):
        try:
            call()
        except PatchError as error:
            return status(), str(error)
        return status(), ""

    def status():
        return next(row.status for row in megatron_adaptor.report() if row.target == target)

    facts, ours = {"untouched": seen()}, attention.forward
    wrapper = "def wrap(f):\n    def forward(*args, **kwargs):\n        return f(*args, **kwargs)\n    return forward\n"
    attention.forward = _of_another_package("toy_profiler", wrapper).wrap(ours)
    facts["wrapped"] = seen()
    attention.forward = _of_another_package("toy_thief", "def forward(self, *args):\n    return None\n").forward
    facts["replaced"] = seen()
    facts["groups"] = seen(lambda: megatron_adaptor._announce(ContextParallelConfig(context_parallel_size=2)))
    attention.forward = ours
    importlib.import_module("megatron.core.parallel_state").get_context_parallel_next_rank = print
    facts["cosmetic"] = seen()
    return facts


def mindspeed_first():
    """MindSpeed with its own context-parallel flags has replaced Megatron's attention by its class."""
    from mindspeed_cp.patches import PatchError

    dot_product = importlib.import_module("megatron.core.transformer.dot_product_attention")
    name = "mindspeed.core.context_parallel.dot_product_attention"
    source = "class MindSpeedCPDotProductAttention(Attention):\n    def __init__(self):\n        pass\n"
    dot_product.DotProductAttention = _of_another_package(name, source).MindSpeedCPDotProductAttention
    return attempt(PatchError)
