"""Check the context-parallel flags of a launch script and print their effect: the last part of DRY_RUN=1.

WORLD_SIZE=8 python scripts/launch/describe.py FLAGS...
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mindspeed_cp import SequenceLayout
from mindspeed_cp.arguments import readable_errors, validate
from mindspeed_cp.arguments.launch import read_flags


def main():
    with readable_errors("describe.py"):
        args, _ = read_flags(sys.argv[1:])
        config, _ = validate(args, int(os.environ["WORLD_SIZE"]))
        layout = SequenceLayout.build(config, args.seq_length)
    ulysses, window, windows = config.hierarchy
    lengths = sorted({layout.length(rank) for rank in range(config.context_parallel_size)})
    print("CONTEXT_PARALLEL=" + config.describe())
    print(f"HIERARCHY=ulysses {ulysses} x window {window} x windows {windows}")
    print("TOKENS_PER_RANK=" + " or ".join(map(str, lengths)))


if __name__ == "__main__":
    main()
