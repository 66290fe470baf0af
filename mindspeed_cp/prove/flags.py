"""Tables of the Megatron flags that prove changes: which are removed and why, and which are always set."""

from mindspeed_cp.arguments.declared import our_flags

# Flags that would touch the user's files or report to a service.
FILES = (
    *"--save --load --save-interval --save-retain-interval --pretrained-checkpoint --ckpt-convert-save".split(),
    *"--ckpt-convert-format --ckpt-step --non-persistent-save-interval --non-persistent-ckpt-type".split(),
    *"--non-persistent-global-ckpt-dir --non-persistent-local-ckpt-dir --async-save --use-checkpoint-args".split(),
    *"--finetune --no-load-optim --no-load-rng --exit-on-missing-checkpoint --dist-ckpt-strictness".split(),
    *"--tensorboard-dir --tensorboard-log-interval --tensorboard-queue-size --wandb-project --wandb-exp-name".split(),
    *"--wandb-entity --wandb-save-dir --log-file --one-logger-project --one-logger-run-name".split(),
    *"--enable-one-logger --record-memory-history --memory-snapshot-path --profile --use-pytorch-profiler".split(),
    *"--use-checkpoint-opt_param-scheduler --override-opt_param-scheduler --adlr-autoresume".split(),
    *"--log-timers-to-tensorboard --log-validation-ppl-to-tensorboard --log-memory-to-tensorboard".split(),
    *"--log-world-size-to-tensorboard --log-throughput --log-progress --config-logger-dir".split(),
    *"--error-injection-rate --inprocess-restart --enable-ft-package --ckpt-assume-constant-structure".split(),
    *"--ckpt-fully-parallel-load --auto-detect-ckpt-format --use-persistent-ckpt-worker".split(),
)
# When a run ends, and how its learning rate changes.
SCHEDULE = (
    *"--train-samples --lr-warmup-iters --lr-warmup-samples --lr-warmup-fraction --lr-warmup-init".split(),
    *"--lr-decay-iters --lr-decay-samples --lr-wsd-decay-iters --lr-wsd-decay-samples --lr-wsd-decay-style".split(),
    *"--rampup-batch-size --exit-interval --exit-duration-in-mins --exit-signal-handler --skip-train".split(),
    *"--full-validation --start-weight-decay --end-weight-decay --weight-decay-incr-style".split(),
    *"--decoupled-lr --decoupled-min-lr --iterations-to-skip".split(),
)
# flag -> what is not tested without it.
OPTIMIZER = {
    "--use-distributed-optimizer": "the distributed optimizer (its shards hold no whole gradients)",
    "--overlap-grad-reduce": "the overlap of gradient reduction",
    "--overlap-param-gather": "the overlap of parameter gathering",
    "--overlap-param-gather-with-optimizer-step": "the overlap of parameter gathering",
    "--use-megatron-fsdp": "Megatron's FSDP",
    "--use-custom-fsdp": "Megatron's FSDP",
    "--use-torch-fsdp2": "torch's FSDP",
    "--data-parallel-sharding-strategy": "Megatron's FSDP",
    "--use-precision-aware-optimizer": "the precision-aware optimizer",
    "--optimizer-cpu-offload": "the optimizer on the CPU",
    "--overlap-cpu-optimizer-d2h-h2d": "the optimizer on the CPU",
    "--num-distributed-optimizer-instances": "the distributed optimizer",
    "--reuse-fp32-param": "MindSpeed's shared memory of parameters",
}
PRECISION = (
    *"--bf16 --fp16 --fp8-format --fp8-recipe --fp8-margin --fp8-interval --fp8-amax-history-len".split(),
    *"--fp8-amax-compute-algo --no-fp8-wgrad --fp8-param-gather --first-last-layers-bf16".split(),
    *"--num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16 --fp4-format --fp4-recipe".split(),
    *"--grad-reduce-in-bf16 --fp16-lm-cross-entropy --main-grads-dtype --main-params-dtype".split(),
    *"--exp-avg-dtype --exp-avg-sq-dtype --loss-scale --initial-loss-scale --min-loss-scale".split(),
    *"--loss-scale-window --hysteresis --accumulate-allreduce-grads-in-fp32".split(),
)
# Flags for devices only: flag -> what is not tested without it.
DEVICE = {
    "--moe-grouped-gemm": "grouped matrix products of experts (the CPU computes one expert after another)",
    "--moe-permute-fusion": "the fused permutation of experts' tokens",
    "--moe-router-fusion": "the fused router of experts",
    "--moe-enable-deepep": "DeepEP",
    "--moe-shared-expert-overlap": "the overlap of shared experts",
    "--overlap-moe-expert-parallel-comm": "the overlap of experts' communication",
    "--delay-wgrad-compute": "delayed weight gradients",
    "--cross-entropy-loss-fusion": "the fused cross entropy",
    "--cross-entropy-fusion-impl": "the fused cross entropy",
    "--tp-comm-overlap": "Transformer Engine's overlap of tensor-parallel communication",
    "--tp-comm-overlap-cfg": "Transformer Engine's overlap of tensor-parallel communication",
    "--enable-cuda-graph": "CUDA graphs",
    "--external-cuda-graph": "CUDA graphs",
    "--cuda-graph-impl": "CUDA graphs",
    "--cuda-graph-scope": "CUDA graphs",
    "--fine-grained-activation-offloading": "activations on the CPU",
    "--offload-modules": "activations on the CPU",
    "--cpu-offloading-num-layers": "activations on the CPU",
    "--attention-backend": "the attention kernels of the device",
    "--apply-layernorm-1p": "norms whose weights count from 1 (torch's count from 0)",
    "--use-fused-rmsnorm": "MindSpeed's fused kernels",
    "--use-fused-swiglu": "MindSpeed's fused kernels",
    "--use-fused-rotary-pos-emb": "MindSpeed's fused kernels",
    "--use-nccl-ub": "registered communication buffers",
    "--nccl-communicator-config-path": "settings of NCCL",
    "--high-priority-stream-groups": "streams",
}
# Flags that pretrain_gpt.py needs without an accelerator.
PLAIN_CPU = (
    *"--no-gradient-accumulation-fusion --no-persist-layer-norm --no-rope-fusion".split(),
    "--no-masked-softmax-fusion",
)
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
STAGES = (
    *"--decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers --num-layers-at-start".split(),
    *"--pipeline-model-parallel-layout --account-for-embedding-in-pipeline-split".split(),
    *"--account-for-loss-in-pipeline-split --pipeline-model-parallel-split-rank --noop-layers".split(),
    "--microbatch-group-size-per-virtual-pipeline-stage",
)
MEANT_WITHOUT = ("--cp-attention-mask-type", "--attention-mask-type", "--use-flash-attn")
MEGATRONS_OWN = ("--cp-comm-type", "--hierarchical-context-parallel-sizes", "--max-seqlen-per-dp-cp-rank")


def of_context_parallelism() -> set[str]:
    """The flags that say how a sequence is split and that do not change the model."""
    ours = {flag for each in our_flags() for flag in each.flags}
    return (ours | set(MEGATRONS_OWN)) - set(MEANT_WITHOUT)
