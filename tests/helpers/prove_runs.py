"""Run prove on the ranks of a test: for every model, and for every fault."""

import contextlib
import io
import re
import warnings
from pathlib import Path
from unittest import mock

import prove_faults
import prove_models
from kept_groups import megatron_groups


@contextlib.contextmanager
def _groups(config):
    from mindspeed_cp import TrainingSetup, megatron_adaptor

    heads = TrainingSetup(num_attention_heads=8, gather_size_calculator="dynamic")
    megatron_adaptor.configure(config, setup=heads if config.algorithm.startswith("ulysses") else None)
    with megatron_groups(context_parallel_size=config.context_parallel_size):
        yield


def _run(model, size, framework=None, steps=1):
    from mindspeed_cp import ContextParallelConfig
    from mindspeed_cp.prove import hook

    config = ContextParallelConfig(context_parallel_size=size, **(model.parallel if size > 1 else {}))
    return hook.gathered(
        hook.record_run(
            prove_models.provider(model, size),
            prove_models.batches(model),
            (framework or prove_models.Framework()).forward_step,
            config=config,
            steps=steps,
            groups=_groups,
        )
    )


def prove_all(rank, size):
    """({model: verdict}, {fault: verdict}) with ``size`` ranks."""
    import trainer.quiet  # noqa: F401

    from mindspeed_cp import megatron_adaptor  # noqa: F401

    warnings.simplefilter("ignore")
    models = prove_models.possible()
    references = {name: _run(model, 1, steps=2) for name, model in models.items()}
    sound = {name: _described(references[name], _run(model, size, steps=2)) for name, model in models.items()}
    broken = {}
    for name, fault in prove_faults.possible(models).items():
        context, framework = fault.build()
        with context:
            found = _run(models[fault.model], size, framework)
        broken[name] = _described(references[fault.model], found)
    return sound, broken


def prove_as_a_framework(rank, size):
    """The result of the example of docs/prove.md on this rank: (equal, counts, what it prints); and the message if the
    world size does not fit.
    """
    import torch.distributed as dist
    import trainer.quiet  # noqa: F401

    from mindspeed_cp import ContextParallelConfig
    from mindspeed_cp.prove import prove

    page = (Path(__file__).resolve().parents[2] / "docs" / "prove.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    found, printed = {}, io.StringIO()
    with mock.patch.object(dist, "init_process_group"), contextlib.redirect_stdout(printed):  # this rank has one
        exec(compile(example, "docs/prove.md", "exec"), found)
    verdict, given = found["verdict"], [found[name] for name in ("model_provider", "batch", "forward_step")]
    try:
        prove(*given, config=ContextParallelConfig(context_parallel_size=2 * size))
    except ValueError as error:
        return (verdict.equal, verdict.comparison.counted), printed.getvalue(), str(error)
    return None


def _described(expected, found):
    """The verdict as JSON, and as text."""
    from mindspeed_cp.prove import hook, report

    verdict = hook.judge(expected, found, title="test")
    return report.as_json(verdict), report.text(verdict)
