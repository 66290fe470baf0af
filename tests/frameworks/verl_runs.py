"""verl's engines, called as its workers call them, with every algorithm; prints what was found as JSON.

    python tests/frameworks/verl_runs.py ORDER [PART OF A NAME]

ORDER says who comes first:

    ours    verl itself imports mindspeed_cp.megatron_adaptor, which a variable names, and then its engines, of which
            MindSpeed's finds repatch; the engine's configuration names the algorithm
    theirs  verl and its engine are there already; configure_from names the algorithm before the engine is built
"""

import os
import sys
import tempfile
from itertools import product

from algorithms import ALGORITHMS, sizes
from forked_ranks import print_found

STEPS, RATE = 3, 1e-3
LENGTHS = (13, 5, 24, 7, 18, 9)  # of the sequences of a batch, two in each micro-batch
BATCHES = {"packed": True, "padded": False}  # use_remove_padding
ENGINES = {  # name -> class, whether it is built by mbridge, else by Megatron-Bridge
    "MegatronEngine": ("MegatronEngineWithLMHead", False),
    "MegatronEngine of mbridge": ("MegatronEngineWithLMHead", True),
    "MindspeedEngine": ("MindspeedEngineWithLMHead", True),
}
OF_ORDER = {"ours": tuple(ENGINES), "theirs": ("MegatronEngine",)}


def make_engine(name, folder, batch, cp_size, settings):
    """An engine with weights, optimizer and process groups, in float32."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers import engine
    from verl.workers.config import HFModelConfig, McoreEngineConfig, McoreOptimizerConfig

    kind, by_mbridge = ENGINES[name]

    class InFloat32(McoreEngineConfig):  # the published one knows half precision alone
        def __post_init__(self):
            super().__post_init__()
            object.__setattr__(self, "dtype", "float32")

    engine_config = InFloat32(
        context_parallel_size=cp_size,
        use_remove_padding=BATCHES[batch],
        vanilla_mbridge=by_mbridge,
        use_dynamic_bsz=False,
        override_transformer_config={**settings, "gradient_accumulation_fusion": False, "masked_softmax_fusion": False},
    )
    made = getattr(engine, kind)(
        HFModelConfig(path=folder, use_remove_padding=BATCHES[batch]),
        engine_config,
        McoreOptimizerConfig(lr=RATE, total_training_steps=100, lr_warmup_steps=0, weight_decay=0.0),
        CheckpointConfig(),
    )
    made.initialize()
    return made


def without_a_device():
    """What verl leaves out or cannot do where there is no accelerator: seed Megatron's generators, and move a batch."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from verl.workers.engine.megatron import transformer_impl

    transformer_impl.set_random_seed = model_parallel_cuda_manual_seed
    transformer_impl.get_device_id = lambda: "cpu"


def make_batch(step):
    """A TensorDict of sequences of ``LENGTHS``, of which all but the first tokens count."""
    import torch
    from verl.utils import tensordict_utils as tu

    drawn = torch.Generator().manual_seed(step)
    rows = [torch.randint(3, 300, (length,), generator=drawn) for length in LENGTHS]
    masks = [torch.arange(length) >= 2 for length in LENGTHS]
    nested = {
        "input_ids": torch.nested.as_nested_tensor(rows, layout=torch.jagged),
        "loss_mask": torch.nested.as_nested_tensor(masks, layout=torch.jagged),
        "position_ids": torch.nested.as_nested_tensor([torch.arange(n) for n in LENGTHS], layout=torch.jagged),
        "temperature": torch.ones(len(LENGTHS)),
    }
    return tu.get_tensordict(
        nested, non_tensor_dict={"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2, "global_batch_size": 6}
    )


def train(rank, order, engine, batch, algorithm, folder):
    """([(loss, gradient norm) of each step], log-probabilities of infer_batch), stand-in's calls, the configuration."""
    from functools import partial

    import torch.distributed as dist
    import transformer_engine.pytorch
    from verl.workers.utils.losses import sft_loss

    from mindspeed_cp import megatron_adaptor

    dist.init_process_group("gloo")
    cp_size, settings = ALGORITHMS.get(algorithm, (1, {}))
    if order == "theirs":
        megatron_adaptor.configure_from(settings)
    without_a_device()
    made = make_engine(engine, folder, batch, cp_size, settings if order == "ours" else {})
    steps = []
    with made.train_mode():
        for step in range(STEPS):
            output = made.train_batch(make_batch(step), partial(sft_loss, None))
            steps.append((sum(output["loss"]), float(output["metrics"].get("grad_norm", 0.0))))
    with made.eval_mode():
        output = made.infer_batch(make_batch(STEPS), partial(sft_loss, None))
        steps.append((sum(output["loss"]), 0.0))
        # The label of a sequence's last token is whatever verl rolls there; nobody reads it.
        told = output["model_output"]["log_probs"]
        steps += [(float(row[:-1].double().sum()), 0.0) for row in told.unbind()]
    config = megatron_adaptor.state().config
    return steps, transformer_engine.pytorch.DotProductAttention.calls, config and config.describe()


def main(order, only=""):
    import transformer_engine_on_cpu

    transformer_engine_on_cpu.install()
    if order == "ours":
        os.environ["VERL_USE_EXTERNAL_MODULES"] = "mindspeed_cp.megatron_adaptor"
    import tiny_models
    import verl.workers.engine
    import verl.workers.utils.losses  # noqa: F401

    import mindspeed_cp.megatron_adaptor  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        tiny_models.make_model(folder, "qwen2")
        cases = [
            (f"{engine}, {batch}, {algorithm}", size, (order, engine, batch, algorithm, folder))
            for engine, batch, (algorithm, size) in product(OF_ORDER[order], BATCHES, sizes())
        ]
        print_found(cases, train, only)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    main(*sys.argv[1:])
