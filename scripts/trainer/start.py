"""What rank 0 says right before the first step."""

import torch
import torch.distributed as dist

import mindspeed_cp.megatron_adaptor as megatron_adaptor
from mindspeed_cp import SequenceLayout
from mindspeed_cp.kernels import select_kernel
from mindspeed_cp.settings.start_block import Start, start_block

EXCHANGES = {
    "ring": "keys and values go round the ring", "direct": "each rank sends what its peer needs",
    "mesh": "slices of keys and values to all at once",
}  # fmt: skip


def announce(args, device: torch.device) -> None:
    """Print the block, where context parallelism is on."""
    if args.context_parallel_size == 1 or dist.get_rank():
        return
    config = args.cp_config_resolved
    layout = SequenceLayout.build(config, args.seq_length)
    lengths = [layout.length(rank) for rank in range(config.context_parallel_size)]
    sizes = {
        "tp": args.tensor_model_parallel_size,
        "pp": args.pipeline_model_parallel_size,
        "cp": args.context_parallel_size,
        "dp": args.data_parallel_size,
    }
    own = "heads for tokens" if config.hierarchy[0] > 1 else ""
    ring = EXCHANGES.get(config.kv_exchange, config.kv_exchange) if config.ring_size > 1 else ""
    applied = [row for row in megatron_adaptor.report() if row.applied]
    start = Start(
        config.describe(),
        sizes,
        args.seq_length,
        (min(lengths), max(lengths)),
        select_kernel(args.cp_kernel, device.type).name,
        ", then ".join(filter(None, (own, ring))),
        "kept apart" if args.reset_attention_mask else "not looked at",
        (len(applied), len(applied)),
    )
    print(start_block(start, has_log=bool(args.cp_log)), flush=True)
