"""``megatron_sft_main`` of ms-swift, as its command line calls it, with every algorithm; prints what was found as JSON.

    python tests/frameworks/ms_swift_runs.py ORDER

ORDER says who comes first:

    ours    import mindspeed_cp.megatron_adaptor and configure_from stand before ms-swift's own import
    theirs  ms-swift is imported first, and calls MindSpeed's repatch with all of its arguments once it has made the
            process groups: what it does where torch_npu is
"""

import json
import os
import sys
import tempfile
from itertools import product
from pathlib import Path

from algorithms import ALGORITHMS, sizes
from forked_ranks import print_found

STEPS = 3
MODELS = {"Qwen2.5": ("qwen2", "qwen2_5"), "Qwen3": ("qwen3", "qwen3")}  # transformers' and ms-swift's names
BATCHES = {"packed": "true", "padded": "false"}  # --padding_free
FLAGS = """--torch_dtype float32 --fp16 false --bf16 false --ddp_backend gloo --tuner_type full --finetune true
    --micro_batch_size 2 --global_batch_size 4 --train_iters 3 --lr 1e-3 --min_lr 1e-3 --max_length 256
    --logging_steps 1 --split_dataset_ratio 0 --dataset_num_proc 1 --dataloader_num_workers 0 --dataset_shuffle false
    --apply_rope_fusion false --gradient_accumulation_fusion false --masked_softmax_fusion false --add_version false
    --no_save_optim true --no_save_rng true --save_safetensors false --check_model false"""


def activate(order, settings):
    """Tell mindspeed_cp the algorithm, where the order has its place for it."""
    from swift.megatron.pipelines.train import sft

    from mindspeed_cp import megatron_adaptor

    if order == "ours":
        megatron_adaptor.configure_from(settings)
    else:
        sft.apply_mindspeed_patches = lambda arguments: megatron_adaptor.repatch(arguments | settings)


def train(rank, order, model, batch, algorithm, folder):
    """[(loss, gradient norm) of each step], calls of Transformer Engine's own attention, the configuration."""
    import transformer_engine.pytorch
    from swift.megatron import megatron_sft_main
    from swift.megatron.pipelines.train import sft
    from swift.megatron.trainers import MegatronTrainer

    from mindspeed_cp import megatron_adaptor

    MegatronTrainer.save_checkpoint = sft.plot_images = lambda *given: None  # take longer than the training
    cp_size, settings = ALGORITHMS.get(algorithm, (1, {}))
    activate(order, settings)
    kind, template = MODELS[model]
    output = f"{folder}/{order} {model} {batch} {algorithm}"
    names = ["--model", f"{folder}/{model}", "--model_type", kind, "--template", template]
    files = ["--dataset", f"{folder}/conversations.jsonl", "--output_dir", output]
    sizes = ["--padding_free", BATCHES[batch], "--context_parallel_size", str(cp_size)]
    megatron_sft_main([*names, *files, *sizes, *FLAGS.split()])
    lines = map(json.loads, Path(output, "logging.jsonl").read_text().splitlines())
    steps = [(line["loss"], line["grad_norm"]) for line in lines if "iteration" in line]
    config = megatron_adaptor.state().config
    return steps, transformer_engine.pytorch.DotProductAttention.calls, config and config.describe()


def main(order, only=""):
    import transformer_engine_on_cpu

    transformer_engine_on_cpu.install()
    if order == "ours":
        import mindspeed_cp.megatron_adaptor  # noqa: F401
    import swift.megatron
    import swift.megatron.pipelines.train.sft
    import swift.megatron.trainers  # noqa: F401
    import tiny_models

    import mindspeed_cp.megatron_adaptor  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        tiny_models.make_conversations(f"{folder}/conversations.jsonl", 24)
        for model, (kind, _) in MODELS.items():
            tiny_models.make_model(f"{folder}/{model}", kind)
        cases = [
            (f"{model}, {batch}, {algorithm}", size, (order, model, batch, algorithm, folder))
            for model, batch, (algorithm, size) in product(MODELS, BATCHES, sizes())
        ]
        print_found(cases, train, only)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    main(*sys.argv[1:])
