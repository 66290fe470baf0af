"""A toy MindSpeed together with the adaptor, in a separate process; ``observe`` of adaptor_runs calls these."""

import contextlib
import io
import sys
from argparse import ArgumentParser
from pathlib import Path

TOY = str(Path(__file__).with_name("toy_mindspeed"))
FORWARD = "megatron.core.transformer.dot_product_attention.DotProductAttention.forward"


def importable():
    sys.path.insert(0, TOY)


def _now():
    """Who owns the attention: (class, function of forward, what MindSpeed's own would return at size 1, algorithm)."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from mindspeed_cp import megatron_adaptor

    row = next(row for row in megatron_adaptor.report() if row.target == FORWARD)
    settings = megatron_adaptor.state().settings
    if settings.undecided is not None:
        settings.decide(2)
    algorithm = settings.config.algorithm if settings.config else None
    wrapped = getattr(DotProductAttention.forward, "__wrapped__", DotProductAttention.forward)
    return row.status, wrapped.__module__, DotProductAttention.__module__.partition(".")[0], algorithm


def every_order():
    """The state after each step: MindSpeed first with flags, ours, repatch, undo, ours again, MindSpeed once more."""
    importable()
    sys.argv = ["train.py", "--context-parallel-size", "2", "--context-parallel-algo", "ulysses_cp_algo"]
    import mindspeed.megatron_adaptor as theirs
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    found = {"theirs": DotProductAttention.__module__}
    from mindspeed_cp import megatron_adaptor

    found["ours"] = _now()
    theirs.repatch({"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"})
    found["repatch"] = _now()
    found["shown"] = theirs.get_full_args().context_parallel_size
    parser = ArgumentParser()
    theirs.MindSpeedFeaturesManager.register_features_args(parser)
    given = parser.parse_args(["--cp-kv-exchange", "direct"])
    found["flags"] = (given.context_parallel_algo, given.cp_kv_exchange, given.attention_mask_type)
    sys.modules["mindspeed.utils"].set_actual_seq_len([3, 8])
    found["ends"] = megatron_adaptor.state().handed.ends
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        theirs.repatch({"context_parallel_algo": "adaptive_cp_algo"})
    found["kept"] = (said.getvalue(), sum(row.applied for row in megatron_adaptor.report()))
    theirs.repatch({"context_parallel_algo": "megatron_cp_algo"})
    found["again"] = _now()
    megatron_adaptor.undo()
    theirs.repatch({"context_parallel_size": 2})
    dot_product = sys.modules["megatron.core.transformer.dot_product_attention"]
    found["undone"] = dot_product.DotProductAttention.__module__
    return found


def ours_first():
    """MindSpeed is imported after this project, on a machine where it is not activated."""
    importable()
    sys.argv = ["train.py", "--context-parallel-size", "2"]
    from mindspeed_cp import megatron_adaptor

    before = "mindspeed.megatron_adaptor" in sys.modules, _now()[:3]
    megatron_adaptor.state().reset()
    import mindspeed.megatron_adaptor  # noqa: F401

    return before, _now()


def flags_of_features():
    """(flag -> owner, whether MindSpeed has patched anything for it, whether a fake torch_npu remains)."""
    importable()
    from mindspeed_cp.megatron.unknown_flags import _flags_of_features, _without_device

    with _without_device():
        import torch_npu  # noqa: F401
    return _flags_of_features("mindspeed"), "mindspeed.megatron_adaptor" in sys.modules, "torch_npu" in sys.modules
