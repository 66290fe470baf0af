"""A recipe of Megatron-Bridge, trained by its ``pretrain`` with ``gpt_step``, with every algorithm; prints JSON.

    python tests/frameworks/megatron_bridge_runs.py ORDER [PART OF A NAME]

ORDER is who is imported first, ``ours`` or ``theirs``. Either way ``configure_from`` names the algorithm before
``pretrain`` makes the process groups.
"""

import os
import sys
import tempfile
from itertools import product
from types import ModuleType, SimpleNamespace

from algorithms import ALGORITHMS, sizes
from forked_ranks import print_found

STEPS = 3
RECIPES = ("qwen25_500m_pretrain_config",)


def leave_out_vision():
    """Let recipes be imported one by one: their package imports all, and those of vision need megatron-energon."""
    import megatron.bridge

    package = ModuleType("megatron.bridge.recipes")
    package.__path__ = [f"{megatron.bridge.__path__[0]}/recipes"]
    sys.modules[package.__name__] = megatron.bridge.recipes = package


def without_a_device():
    """What the trainer asks of a device, which mindspeed_cp answers for the trainer of a Megatron-LM checkout."""
    import torch
    from megatron.bridge.training import initialize
    from megatron.core.datasets import utils

    from mindspeed_cp.patches.machine import checkout

    torch.cuda.is_available, torch.cuda.device_count, torch.cuda.device_memory_used = (
        lambda: True,
        lambda: 1,
        lambda device=None: 0,
    )
    known = SimpleNamespace(name="cpu", major=9, minor=0, total_memory=0, multi_processor_count=1)
    torch.cuda.get_device_properties = lambda device=None: known
    initialize._warmup_jit_function = lambda *given: None
    checkout.compile_helpers.function(None, utils.compile_helpers)  # once, for this Python
    initialize.compile_helpers = lambda: None


def recipe(name, folder, cp_size):
    """The recipe with a tiny model, on the CPU, in float32."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.recipes.qwen import qwen2

    published = AutoBridge.from_hf_pretrained
    AutoBridge.from_hf_pretrained = classmethod(lambda cls, name: published(folder))
    config = getattr(qwen2, name)()
    config.model.context_parallel_size, config.model.seq_length, config.dataset.seq_length = cp_size, 64, 64
    config.model.gradient_accumulation_fusion = config.model.masked_softmax_fusion = False
    config.train.train_iters, config.train.global_batch_size, config.train.micro_batch_size = STEPS, 4, 2
    config.train.eval_iters, config.scheduler.lr_warmup_iters, config.optimizer.lr = 0, 0, 1e-3
    config.dataset.num_workers, config.mixed_precision, config.tokenizer.vocab_size = 0, None, 300
    config.dist.distributed_backend = "gloo"
    config.checkpoint.save = config.checkpoint.load = None
    config.logger.log_interval, config.logger.tensorboard_dir = 1, None
    return config


def train(rank, recipe_name, algorithm, folder):
    """[(loss, gradient norm) of each step], calls of Transformer Engine's own attention, the configuration."""
    import transformer_engine.pytorch
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    from mindspeed_cp import megatron_adaptor

    cp_size, settings = ALGORITHMS.get(algorithm, (1, {}))
    without_a_device()
    megatron_adaptor.configure_from(settings)
    steps = []

    class Record(Callback):
        def on_train_step_end(self, context):
            steps.append((float(context.loss_dict["lm loss"]), float(context.grad_norm)))

    pretrain(recipe(recipe_name, folder, cp_size), forward_step, callbacks=[Record()])
    config = megatron_adaptor.state().config
    return steps, transformer_engine.pytorch.DotProductAttention.calls, config and config.describe()


def main(order, only=""):
    import transformer_engine_on_cpu

    transformer_engine_on_cpu.install()
    if order == "ours":
        import mindspeed_cp.megatron_adaptor  # noqa: F401
    leave_out_vision()
    import megatron.bridge.recipes.qwen.qwen2
    import megatron.bridge.training.gpt_step
    import megatron.bridge.training.pretrain  # noqa: F401
    import tiny_models

    import mindspeed_cp.megatron_adaptor  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        tiny_models.make_model(folder, "qwen2")
        cases = [
            (f"{name}, rows, {algorithm}", size, (name, algorithm, folder))
            for name, (algorithm, size) in product(RECIPES, sizes())
        ]
        print_found(cases, train, only)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # inductor would ask for the properties of the device, too
    main(*sys.argv[1:])
