"""The vision-language model of docs/vision-language.md on several ranks, with context parallelism and without."""

import re
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from kept_groups import megatron_groups
from model_cases import RECOMPUTE, packed_params

PAGE = Path(__file__).resolve().parents[2] / "docs" / "vision-language.md"
DOCUMENTS = (0, 19, 20)  # and the end


@cache
def example(as_script=False):
    """The names of the example, which runs as a script in ranks that have their process group already."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    names = {"__name__": "__main__" if as_script else "example"}
    with mock.patch.object(dist, "init_process_group"), mock.patch.object(dist, "destroy_process_group"):
        exec(compile(code, str(PAGE), "exec"), names)
    return SimpleNamespace(**names)


def batch_of(names, case, length):
    """(whole batch, documents, PackedSeqParams); packed documents are one row, of which the first two see no image."""
    batch = names.sample(length, rows=1 if case == "packed" else 2, first=21 if case == "packed" else 5)
    if case != "packed":
        return batch, None, None
    ends = (*DOCUMENTS, length)
    starts = torch.tensor(ends[:-1])
    batch["position_ids"] -= batch["position_ids"][:, :, starts].repeat_interleave(torch.tensor(ends).diff(), dim=2)
    return batch, ends, packed_params(DOCUMENTS, length)


def by_a_framework(names, whole_ids=False):
    """(model, batch, documents, params) -> (losses, this rank's part), cut in a zigzag by somebody else, who gives the
    language model whole tokens beside rows of its own, as mcore-bridge does; documents are in the position ids.
    """

    def losses_of(model, batch, documents, params):
        from mindspeed_cp import megatron_adaptor

        state, features = megatron_adaptor.state(), model.features(batch["images"])
        held = state.layout(batch["tokens"].size(1)).positions(state.cp_rank)
        rows = model.embedded(batch["tokens"], batch["image_index"], features)[held]
        local = {name: batch[name][..., held] for name in ("position_ids", "labels", "loss_mask", "image_index")}
        ids = batch["position_ids"] if whole_ids else local["position_ids"]
        return model(batch["tokens"], ids, local["labels"], local["image_index"], None, (features, rows)), local

    return losses_of


def outcome(names, losses_of, case, cp_size, length):
    """name -> whole losses "losses" and gradients of all parameters, summed over the ranks."""
    from mindspeed_cp import megatron_adaptor

    model = names.built(cp_size, 2 * length, **(RECOMPUTE if case == "recomputed" else {}))
    losses, local = losses_of(model, *batch_of(names, case, length))
    state = megatron_adaptor.state()
    (losses * local["loss_mask"]).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    for value in found.values() if cp_size > 1 else ():
        dist.all_reduce(value)
    return found | {"losses": state.gather_sequence(losses).detach()}


def difference(found, expected):
    """Largest over all gradients, and of the losses, beside the largest of its tensor, at least a thousandth of all."""
    assert set(found) == set(expected) and len(found) > 60
    least = 1e-3 * max(float(value.abs().max()) for value in expected.values())
    return max(
        float((found[name] - value).abs().max()) / max(least, float(value.abs().max()))
        for name, value in expected.items()
    )


def compare(rank, size, length, runs, cases):
    """(name of the run, way, case) -> difference from one process that embeds all.

    Args:
        runs: name -> (settings of ContextParallelConfig, ways).
    """
    import trainer.quiet  # noqa: F401

    from mindspeed_cp import ContextParallelConfig, TrainingSetup, megatron_adaptor

    names, found, expected = example(as_script=True), {}, {}
    ways = {"after": names.losses_after, "before": names.losses_before}
    ways |= {"a framework": by_a_framework(names), "a framework, whole ids": by_a_framework(names, whole_ids=True)}
    for run, (settings, chosen) in {"alone": ({}, ("before", "after")), **runs}.items():
        cp_size = size if settings else 1
        config = ContextParallelConfig(context_parallel_size=cp_size, **settings)
        setup = TrainingSetup(num_attention_heads=4, gather_size_calculator="dynamic")
        setup = setup if config.algorithm.startswith("ulysses") else None
        megatron_adaptor.configure(config, setup=setup)
        with megatron_groups(context_parallel_size=cp_size):
            for way, case in product(chosen, cases):
                in_the_ids = case == "packed" and way.startswith("a framework")
                megatron_adaptor.configure(config, setup=setup, documents_from_position_ids=in_the_ids)
                result = outcome(names, ways[way], case, cp_size, length)
                found[run, way, case] = difference(result, expected.setdefault(case, result))
    return found
