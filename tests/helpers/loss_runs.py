"""Loss functions in all conventions of Megatron's schedule, on two ranks of a sequence; ``compare`` runs on each."""

import warnings
from functools import partial

import torch
import torch.distributed as dist
from model_cases import RING, Case, build, samples
from model_runs import groups

SEQ = 31
# Convention -> (whether Megatron counts per token, whether the loss function is right).
CONVENTIONS = {
    "local, divided by the whole count": (False, True),
    "local, and its count": (False, True),
    "local, and its count, per token": (True, True),
    "gathered mean": (False, True),
    "gathered, and its share of the count": (False, True),
    "gathered, and its share of the count, per token": (True, True),
    "gathered, and the whole count": (False, False),
    "gathered, and the whole count, per token": (True, False),
    "local mean": (False, False),
}


def whole_samples():
    """One sample per rank, each with an odd number of tokens with loss, so that the ranks' shares differ."""
    for sample in samples(SEQ, dist.get_world_size(), None):
        sample["loss_mask"][0, 0] += 1 - sample["loss_mask"].sum() % 2
        assert sample["loss_mask"].sum() % 2 == 1
        yield sample


def loss(convention, cp_size, whole, local, output):
    """The result of the loss function of a convention."""
    from mindspeed_cp import megatron_adaptor
    from mindspeed_cp.megatron.losses import counts_are_added

    state, mask = megatron_adaptor.state(), local["loss_mask"]
    if convention.startswith("gathered"):
        output, mask = state.gather_sequence(output, of=local), whole["loss_mask"]
    total = whole["loss_mask"].sum()
    value, count = (output.float() * mask).sum(), mask.sum()
    report = {"lm loss": torch.stack([value.detach(), count])}
    if convention == "local mean":
        return value / count, {"lm loss": (value / count).detach()}
    if "count" not in convention or "divided" in convention:
        return value / total, report
    if "share" in convention:
        return value, state.share_of(total.to(torch.int)), report
    if "whole" not in convention and not counts_are_added():
        count = total
    return value, count.to(torch.int), report


def run(convention, cp_size):
    """(name -> gradient, (loss that Megatron's evaluation reports under --sft, number of tokens without))."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.utils import get_batch_on_this_cp_rank

    torch.manual_seed(7)
    model_parallel_cuda_manual_seed(7)
    per_token, _ = CONVENTIONS[convention]
    config, model = build(Case({"calculate_per_token_loss": per_token}), cp_size, 1, False)
    group = dist.get_rank() // cp_size
    mine = list(whole_samples())[group * cp_size : (group + 1) * cp_size]

    def forward_step(iterator, model):
        whole = next(iterator)
        local = get_batch_on_this_cp_rank(dict(whole))
        output = model(local["tokens"], local["position_ids"], None, labels=local["labels"])
        return output, partial(loss, convention, cp_size, whole, local)

    def step(forward_only):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(mine),
            model=[model],
            num_microbatches=len(mine),
            seq_length=SEQ,
            micro_batch_size=2,
            forward_only=forward_only,
        )

    step(False)
    gradients = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        reports = [report["lm loss"] for report in step(True)]
    if not all(report.numel() == 2 for report in reports):
        return gradients, (None, None)
    # Megatron's evaluate with --sft: a quotient for each micro-batch, averaged over all ranks that hold one. Without,
    # sums over all ranks.
    mean = torch.stack([report[0] / report[1] for report in reports]).mean()
    told = torch.stack([mean / dist.get_world_size(), sum(report[1] for report in reports)])
    dist.all_reduce(told)
    return gradients, told.tolist()


def compare(rank):
    """Convention -> (gradient norm / that of cp=1, largest difference, loss and count of an evaluation / those of cp=1,
    the warning).
    """
    import trainer.quiet  # noqa: F401

    from mindspeed_cp import megatron_adaptor  # noqa: F401

    with groups({"context_parallel_size": 1}):
        expected = {convention: run(convention, 1) for convention in CONVENTIONS}
    found = {}
    for convention in CONVENTIONS:
        with groups({"context_parallel_size": 2, "algorithm": RING}), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gradients, reported = run(convention, 2)
        of_one, reported_of_one = expected[convention]
        scale = max(float(gradient.abs().max()) for gradient in of_one.values())
        worst = max(float((gradients[name] - gradient).abs().max()) / scale for name, gradient in of_one.items())
        norms = [sum(float(value.square().sum()) for value in each.values()) ** 0.5 for each in (gradients, of_one)]
        said = [str(warning.message) for warning in caught if "gradients" in str(warning.message)]
        ratios = [value and value / one for value, one in zip(reported, reported_of_one)]
        found[convention] = norms[0] / norms[1], worst, ratios, said
    return found
