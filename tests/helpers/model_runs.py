"""Whole GPT models on several ranks, with context parallelism and without; ``compare`` runs on each rank.

Every run trains on the same samples, one per rank of the world: without context parallelism each rank computes one of
them; with it each group computes as many as it has ranks, one micro batch after another. Loss, gradients and updates
must not depend on that.
"""

import contextlib
import math
import warnings
from functools import partial
from importlib.util import find_spec
from unittest import mock

import reference
import torch
import torch.distributed as dist
from kept_groups import megatron_groups
from model_cases import BATCH, CASES, IN_BF16, MODEL, RATE, REMARKABLE, VERSION, build, packed_params, samples


class Trainer:
    """One model of one case at one context-parallel size."""

    def __init__(self, case, cp_size, seq_len, bf16=False):
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        _forget_logged_losses()
        torch.manual_seed(7)
        model_parallel_cuda_manual_seed(7)
        self.case, self.cp_size, self.seq_len = case, cp_size, seq_len
        self.config, self.model = build(case, cp_size, parallel_state.get_expert_model_parallel_world_size(), bf16)
        whole = list(samples(seq_len, dist.get_world_size(), case.documents, case.targets, case.multimodal))
        group = dist.get_rank() // cp_size
        self.mine = list(enumerate(whole))[group * cp_size : (group + 1) * cp_size]
        rows = whole[0]["tokens"].size(0)
        self.losses = torch.zeros(len(whole), rows, seq_len, dtype=torch.float64)

    def load(self, weights):
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(weights[name])

    def weights(self):
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}

    def named_parameters(self):
        """(name in a model that holds all experts, parameter)"""
        from megatron.core import parallel_state

        experts = (self.config.num_moe_experts or 0) // self.config.expert_model_parallel_size
        first = experts * parallel_state.get_expert_model_parallel_rank()
        for name, parameter in self.model.named_parameters():
            head, local, tail = name.rpartition("module.")[2].partition("local_experts.")
            index, dot, tail = tail.partition(".")
            yield (f"{head}{local}{int(index) + first}{dot}{tail}" if local else head), parameter

    def split(self, sample):
        """This rank's part of a sample; documents are passed only if the layout depends on them."""
        from megatron.core.utils import get_batch_on_this_cp_rank

        from mindspeed_cp import megatron_adaptor

        state = megatron_adaptor.state()
        if state.config.batch_layout != "balanced":
            return get_batch_on_this_cp_rank(dict(sample))
        local = state.shard_batch(sample, cu_seqlens=(*self.case.documents, self.seq_len))
        layout = state.records.find(local.values()).layout
        assert layout.kind == "balanced" and layout != state.layout(self.seq_len), "the zigzag would not show anything"
        return local

    def forward_step(self, iterator, model):
        index, sample = next(iterator)
        local = self.split(sample)
        padding = {}
        if self.case.padding:
            padding["padding_mask"] = local["position_ids"] >= self.seq_len - self.case.padding
        losses = model(
            local["tokens"],
            local["position_ids"],
            None,
            labels=local["labels"],
            loss_mask=local["loss_mask"],
            packed_seq_params=packed_params(self.case.documents, self.seq_len),
            **padding,
        )
        return losses, partial(self.loss, index, sample["loss_mask"], local)

    def loss(self, index, whole_mask, local, losses):
        """As in Megatron's own pretrain_gpt.py: 0.12 needs the token count of the whole sequence, later versions that
        of the rank.
        """
        from mindspeed_cp import megatron_adaptor

        state, mask, where = megatron_adaptor.state(), local["loss_mask"], slice(None)
        if self.cp_size > 1:
            where = state.records.find(local.values()).layout.positions(state.cp_rank)
        self.losses[index][:, where] = losses.detach().double()
        count = (whole_mask if VERSION < (0, 13) else mask).sum().to(torch.int)
        return (losses.float() * mask).sum(), count, {}

    def run(self):
        """[(per-token losses, loss of multi-token prediction, name -> gradient)] of each step."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        results = []
        for _ in range(self.case.steps):
            self.model.zero_grad_buffer()
            self.losses.zero_()
            get_forward_backward_func()(
                forward_step_func=self.forward_step,
                data_iterator=iter(self.mine),
                model=[self.model],
                num_microbatches=self.cp_size,
                seq_length=self.seq_len,
                micro_batch_size=BATCH,
                forward_only=False,
            )
            results.append((self._sum(self.losses.clone()), self._mtp_loss(), self._gradients()))
            self._update()
        return results

    def _gradients(self):
        """name -> gradient of all parameters, including experts on other ranks."""
        own = {name: parameter.main_grad.detach().clone() for name, parameter in self.named_parameters()}
        if self.config.expert_model_parallel_size == 1:
            return own
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        return {name: gradient for gradients in (*everyone, own) for name, gradient in gradients.items()}

    def _update(self):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.sub_(RATE * parameter.main_grad)

    def _mtp_loss(self):
        """Megatron's own losses as it would log them: the mean over the micro batches, summed over the ranks."""
        if getattr(self.config, "experimental_attention_variant", None) == "dsa":
            from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossLoggingHelper

            ranks = 1 if self.config.calculate_per_token_loss else self.cp_size  # sums are added, means averaged
            return self._sum(DSAIndexerLossLoggingHelper.tracker.pop("values") / ranks)
        from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

        tracker = MTPLossLoggingHelper.tracker
        values = tracker.get("loss_values", tracker.get("values", torch.zeros(1)))  # the former from 0.19 on
        tracker.clear()
        return self._sum(values / self.cp_size) if self.config.mtp_num_layers else torch.zeros(1)

    @staticmethod
    def _sum(tensor):
        dist.all_reduce(tensor)
        return tensor


def _forget_logged_losses():
    """Clear Megatron's global tables of losses, which have one entry per layer of the first model."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()

    if find_spec("megatron.core.transformer.moe.moe_logging"):  # from 0.18 on
        from megatron.core.transformer.moe import moe_logging

        moe_logging.destroy_moe_metrics_tracker()
        return
    where = moe_utils if hasattr(moe_utils, "get_moe_layer_wise_logging_tracker") else parallel_state
    where.get_moe_layer_wise_logging_tracker().clear()


def dense_attention(
    query, key, value, *, config, softmax_scale, cu_seqlens, softmax_offset, sliding_window=None, **unused
):
    """Reference attention in place of ours, for features that Megatron's own local attention does not support."""
    causal = config.attention_mask_type == "causal"
    allowed = reference.allowed_pairs(query.size(0), causal=causal, cu_seqlens=cu_seqlens, window=sliding_window)
    return reference.attention(query, key, value, allowed, softmax_scale=softmax_scale, sinks=softmax_offset)


def difference(results, expected):
    """Largest relative difference over all steps: (per-token loss, gradient norm, one parameter's gradient, its
    name).
    """
    worst = [0.0, 0.0, 0.0, ""]
    for (losses, mtp, gradients), (all_losses, all_mtp, all_gradients) in zip(results, expected, strict=True):
        worst[0] = max(worst[0], relative(losses, all_losses), relative(mtp, all_mtp))
        worst[1] = max(worst[1], abs(norm(gradients) - norm(all_gradients)) / norm(all_gradients))
        smallest = 1e-3 * max(float(gradient.abs().max()) for gradient in all_gradients.values())
        for name, gradient in all_gradients.items():
            found = float((gradients[name] - gradient).abs().max()) / max(float(gradient.abs().max()), smallest)
            worst[2:] = max(worst[2:], [found, name])
        assert math.isfinite(norm(gradients) + float(losses.sum() + mtp.sum())), "max() above ignores NaN"
    return worst


def relative(value, expected):
    scale = float(expected.abs().max())
    return float((value - expected).abs().max()) / scale if scale else float(value.abs().max())


def norm(gradients):
    return sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5


def compare(rank, seq_len, parallel, cases=CASES):
    """Name of the run -> name of the case -> result.

    The result is the ``difference`` from the run without context parallelism, for training in bfloat16 the ``errors``
    of both runs, and for REMARKABLE cases what is ``said``.

    Args:
        parallel: name -> (settings of ContextParallelConfig, names of cases).
        cases: name -> case.
    """
    import trainer.quiet  # noqa: F401

    from mindspeed_cp import megatron_adaptor  # noqa: F401

    wanted = {case for _, chosen in parallel.values() for case in chosen}
    with groups({"context_parallel_size": 1}):
        expected = {name: start(case, seq_len) for name, case in cases.items() if name in wanted}
        expected |= {name: start_in_bf16(case, seq_len) for name, case in IN_BF16.items() if name in wanted}
    return {name: _run_all(seq_len, settings, chosen, expected, cases) for name, (settings, chosen) in parallel.items()}


def _run_all(seq_len, settings, chosen, expected, cases):
    size, found = settings["context_parallel_size"], {}
    with groups(settings):
        for name in chosen:
            if name in REMARKABLE:
                found[name] = said(REMARKABLE[name], size, seq_len)
            elif name in IN_BF16:
                weights, exact, alone = expected[name]
                found[name] = errors(rerun(IN_BF16[name], size, seq_len, weights, bf16=True), exact), alone
            else:
                weights, alone = expected[name]
                found[name] = difference(rerun(cases[name], size, seq_len, weights), alone)
    return found


def start(case, seq_len):
    """(weights, results) without context parallelism."""
    import mindspeed_cp.megatron.bridge

    runner = Trainer(case, 1, seq_len)
    weights = runner.weights()
    with mock.patch.object(mindspeed_cp.megatron.bridge, "context_parallel_attention", dense_attention):
        return weights, runner.run()


def rerun(case, cp_size, seq_len, weights, bf16=False):
    runner = Trainer(case, cp_size, seq_len, bf16)
    runner.load(weights)
    return runner.run()


def start_in_bf16(case, seq_len):
    """(weights that bfloat16 holds, results in float32 with them, errors of bfloat16 without context parallelism)."""
    weights = {name: value.bfloat16().float() for name, value in Trainer(case, 1, seq_len).weights().items()}
    exact = rerun(case, 1, seq_len, weights)
    return weights, exact, errors(rerun(case, 1, seq_len, weights, bf16=True), exact)


def said(case, cp_size, seq_len):
    """Warnings while one step runs, and the message of a ValueError that ends it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            Trainer(case, cp_size, seq_len).run()
        except ValueError as error:
            return str(error)
    return " ".join({str(warning.message) for warning in caught})


def errors(results, exact):
    """Relative error (2-norm) of the per-token losses and of all gradients together."""
    (losses, _, gradients), (all_losses, _, all_gradients) = results[0], exact[0]
    off = {name: gradients[name] - gradient for name, gradient in all_gradients.items()}
    return [float((losses - all_losses).norm() / all_losses.norm()), norm(off) / norm(all_gradients)]


@contextlib.contextmanager
def groups(settings):
    """Context manager: Megatron's process groups for settings of ContextParallelConfig and two other parallel sizes."""
    from mindspeed_cp import ContextParallelConfig, TrainingSetup, megatron_adaptor

    settings = dict(settings)
    calculator, ep_size = settings.pop("gather_size_calculator", None), settings.pop("expert_model_parallel_size", 1)
    config = ContextParallelConfig(**settings)
    setup = TrainingSetup(
        num_attention_heads=MODEL["num_attention_heads"], gather_size_calculator=calculator or "default"
    )
    megatron_adaptor.configure(config, setup=setup)
    with megatron_groups(context_parallel_size=config.context_parallel_size, expert_model_parallel_size=ep_size):
        yield
