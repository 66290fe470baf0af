"""Process groups and seeds, made after all flags have been checked, and released at the end."""

import logging
import os
import random
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

import mindspeed_cp.megatron_adaptor as megatron_adaptor
from trainer.checks import of_same_name
from trainer.rendezvous import attempt_store


def initialize(args):
    """Join the world, make Megatron's groups, seed everything. Returns whether this call made the default group."""
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)  # its messages are irrelevant here
    made = not dist.is_initialized()
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    if made:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        _defaults_for_one_process()
        rank = int(os.environ["RANK"])
        store = attempt_store(rank, args.world_size, timeout)
        dist.init_process_group("nccl", timeout=timeout, world_size=args.world_size, rank=rank, store=store)
    megatron_adaptor.compare_on_all_ranks(args, program="pretrain_gpt.py")
    megatron_adaptor.configure(args.cp_config_resolved, setup=args.cp_setup, kernel=args.cp_kernel)
    parallel_state.initialize_model_parallel(
        **of_same_name(args, "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size"),
        virtual_pipeline_model_parallel_size=args.num_virtual_stages_per_pipeline_rank,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
    )
    seed_everything(args)
    return made


def _defaults_for_one_process():
    """Set the variables that torchrun would set, so that plain python can start the trainer."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        os.environ.setdefault(name, value)


def seed_everything(args):
    """Pipeline stages draw different weights; context-parallel and data-parallel ranks draw the same."""
    seed = args.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def shut_down(made):
    """Release Megatron's groups, and the default group if ``initialize`` made it."""
    parallel_state.destroy_model_parallel()
    # megatron-core 0.12 does not reset these, and the next run in this process may have another pipeline.
    parallel_state._EMBEDDING_GLOBAL_RANKS = parallel_state._POSITION_EMBEDDING_GLOBAL_RANKS = None
    if made:
        dist.destroy_process_group()
