"""Run the training script on Ray Train's workers, one per device.

    python scripts/launch/ray_train.py --workers 8 scripts/pretrain_gpt.py --data-path data/my ...
    python scripts/launch/ray_train.py --workers 8 --dry-run scripts/pretrain_gpt.py ...    checks the flags

Ray creates the workers and torch's default process group, which the script uses. With --dry-run Ray need not be
installed.
"""

import argparse
import os
import runpy
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def train_loop(config: dict[str, Any]) -> None:
    """Run by every worker; Ray has set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for torch."""
    from ray import train

    context = train.get_context()
    os.environ |= {
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    sys.path[:0] = [str(REPOSITORY), str(Path(config["script"]).parent)]
    sys.argv = [config["script"], *config["flags"]]
    runpy.run_path(config["script"], run_name="__main__")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, required=True, help="ranks of the training, one for each device")
    parser.add_argument("--resource", default="GPU", help="what Ray calls a device: GPU, or NPU (default: GPU)")
    parser.add_argument("--dry-run", action="store_true", help="check the flags and start nothing")
    parser.add_argument("script", help="the training script")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="its flags")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(REPOSITORY))
    from mindspeed_cp.arguments import validate
    from mindspeed_cp.arguments.launch import read_flags

    try:
        if args.workers < 1:
            raise ValueError(f"--workers {args.workers} must be at least 1, such as 8.")
        config, _ = validate(read_flags(args.flags)[0], args.workers)
    except ValueError as error:
        print(f"ray_train.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.workers} workers with one {args.resource} each: {config.describe()}")
    if args.dry_run:
        return 0
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    backend = {"GPU": "nccl", "NPU": "hccl"}.get(args.resource, "gloo")
    scaling = ScalingConfig(
        num_workers=args.workers, use_gpu=args.resource == "GPU", resources_per_worker={args.resource: 1}
    )
    config = {"script": str(Path(args.script).resolve()), "flags": args.flags}
    TorchTrainer(
        train_loop, train_loop_config=config, scaling_config=scaling, torch_config=TorchConfig(backend=backend)
    ).fit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
