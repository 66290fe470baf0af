"""Tables of the Megatron flags that prove changes: which are removed and why, and which are always set."""

from mindspeed_cp.arguments.declared import our_flags

# Flags that would touch the user's files or report to a service.
FILES = """
    --save --load --save-interval --save-retain-interval --pretrained-checkpoint --ckpt-convert-save
    --ckpt-convert-format --ckpt-step --non-persistent-save-interval --non-persistent-ckpt-type
    --non-persistent-global-ckpt-dir --non-persistent-local-ckpt-dir --async-save --use-checkpoint-args --finetune
    --no-load-optim --no-load-rng --exit-on-missing-checkpoint --dist-ckpt-strictness --tensorboard-dir
    --tensorboard-log-interval --tensorboard-queue-size --wandb-project --wandb-exp-name --wandb-entity --wandb-save-dir
    --log-file --one-logger-project --one-logger-run-name --enable-one-logger --record-memory-history
    --memory-snapshot-path --profile --use-pytorch-profiler --use-checkpoint-opt_param-scheduler
    --override-opt_param-scheduler --adlr-autoresume --log-timers-to-tensorboard --log-validation-ppl-to-tensorboard
    --log-memory-to-tensorboard --log-world-size-to-tensorboard --log-throughput --log-progress --config-logger-dir
    --error-injection-rate --inprocess-restart --enable-ft-package --ckpt-assume-constant-structure
    --ckpt-fully-parallel-load --auto-detect-ckpt-format --use-persistent-ckpt-worker
""".split()
# When a run ends, and how its learning rate changes.
SCHEDULE = """
    --train-samples --lr-warmup-iters --lr-warmup-samples --lr-warmup-fraction --lr-warmup-init --lr-decay-iters
    --lr-decay-samples --lr-wsd-decay-iters --lr-wsd-decay-samples --lr-wsd-decay-style --rampup-batch-size
    --exit-interval --exit-duration-in-mins --exit-signal-handler --skip-train --full-validation --start-weight-decay
    --end-weight-decay --weight-decay-incr-style --decoupled-lr --decoupled-min-lr --iterations-to-skip
""".split()


def _by_flag(lost: dict[str, str]) -> dict[str, str]:
    """Flag -> what is not tested without it, from the flags of each such feature."""
    return {flag: what for what, flags in lost.items() for flag in flags.split()}


# Flags that hide gradients or parameters.
OPTIMIZER = _by_flag(
    {
        "the distributed optimizer (its shards hold no whole gradients)": "--use-distributed-optimizer",
        "the distributed optimizer": "--num-distributed-optimizer-instances",
        "the overlap of gradient reduction": "--overlap-grad-reduce",
        "the overlap of parameter gathering": "--overlap-param-gather --overlap-param-gather-with-optimizer-step",
        "Megatron's FSDP": "--use-megatron-fsdp --use-custom-fsdp --data-parallel-sharding-strategy",
        "torch's FSDP": "--use-torch-fsdp2",
        "the precision-aware optimizer": "--use-precision-aware-optimizer",
        "the optimizer on the CPU": "--optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d",
        "MindSpeed's shared memory of parameters": "--reuse-fp32-param",
    }
)
PRECISION = """
    --bf16 --fp16 --fp8-format --fp8-recipe --fp8-margin --fp8-interval --fp8-amax-history-len --fp8-amax-compute-algo
    --no-fp8-wgrad --fp8-param-gather --first-last-layers-bf16 --num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16
    --fp4-format --fp4-recipe --grad-reduce-in-bf16 --fp16-lm-cross-entropy --main-grads-dtype --main-params-dtype
    --exp-avg-dtype --exp-avg-sq-dtype --loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window
    --hysteresis --accumulate-allreduce-grads-in-fp32
""".split()
# Flags for devices only.
DEVICE = _by_flag(
    {
        "grouped matrix products of experts (the CPU computes one expert after another)": "--moe-grouped-gemm",
        "the fused permutation of experts' tokens": "--moe-permute-fusion",
        "the fused router of experts": "--moe-router-fusion",
        "DeepEP": "--moe-enable-deepep",
        "the overlap of shared experts": "--moe-shared-expert-overlap",
        "the overlap of experts' communication": "--overlap-moe-expert-parallel-comm",
        "delayed weight gradients": "--delay-wgrad-compute",
        "the fused cross entropy": "--cross-entropy-loss-fusion --cross-entropy-fusion-impl",
        "Transformer Engine's overlap of tensor-parallel communication": "--tp-comm-overlap --tp-comm-overlap-cfg",
        "CUDA graphs": "--enable-cuda-graph --external-cuda-graph --cuda-graph-impl --cuda-graph-scope",
        "activations on the CPU": "--fine-grained-activation-offloading --offload-modules --cpu-offloading-num-layers",
        "the attention kernels of the device": "--attention-backend",
        "norms whose weights count from 1 (torch's count from 0)": "--apply-layernorm-1p",
        "MindSpeed's fused kernels": "--use-fused-rmsnorm --use-fused-swiglu --use-fused-rotary-pos-emb",
        "registered communication buffers": "--use-nccl-ub",
        "settings of NCCL": "--nccl-communicator-config-path",
        "streams": "--high-priority-stream-groups",
    }
)
# Flags that pretrain_gpt.py needs without an accelerator.
PLAIN_CPU = """
    --no-gradient-accumulation-fusion --no-persist-layer-norm --no-rope-fusion --no-masked-softmax-fusion
""".split()
# flag -> value that is always set.
DROPOUT = {"--attention-dropout": 0, "--hidden-dropout": 0}
STEADY = {
    "--lr": "1e-3",
    "--min-lr": "1e-3",
    "--lr-decay-style": "constant",
    "--eval-iters": 0,
    "--eval-interval": 1000,
}
# Flags that count the layers of single pipeline stages, which is wrong with fewer layers.
STAGES = """
    --decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers --num-layers-at-start
    --pipeline-model-parallel-layout --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split
    --pipeline-model-parallel-split-rank --noop-layers --microbatch-group-size-per-virtual-pipeline-stage
""".split()
MEANT_WITHOUT = ("--cp-attention-mask-type", "--attention-mask-type", "--use-flash-attn")
MEGATRONS_OWN = ("--cp-comm-type", "--hierarchical-context-parallel-sizes", "--max-seqlen-per-dp-cp-rank")


def of_context_parallelism() -> set[str]:
    """The flags that say how a sequence is split and that do not change the model."""
    ours = {flag for each in our_flags() for flag in each.flags}
    return (ours | set(MEGATRONS_OWN)) - set(MEANT_WITHOUT)
