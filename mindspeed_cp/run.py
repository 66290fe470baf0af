"""Run a training script of Megatron-LM, unchanged, with context parallelism.

    torchrun --nproc-per-node 4 -m mindspeed_cp.run pretrain_gpt.py --context-parallel-size 4 ...

The script runs as ``__main__`` with its own command line and with its folder first on the import path, as with plain
``python pretrain_gpt.py``; so a checkout's own megatron.core is patched and used.
"""

import os
import sys
from pathlib import Path

# Tells a spawned process the script, because the import machinery overwrites sys.argv[0] there.
SCRIPT_VARIABLE = "MINDSPEED_CP_SCRIPT"
USAGE = """\
usage: torchrun ... -m mindspeed_cp.run SCRIPT.py [arguments of the script ...]

Runs a training script of Megatron-LM, unchanged, with context parallelism: Megatron is patched first, and the flags
of context parallelism are part of its command line. For instance, from a Megatron-LM checkout:

    torchrun --nproc-per-node 4 -m mindspeed_cp.run pretrain_gpt.py --context-parallel-size 4 ...

python -m mindspeed_cp.megatron_adaptor lists what is patched.
"""


def main() -> None:
    """Import the adaptor and run the script on the command line.

    Raises:
        SystemExit: with status 2 if no script is given or it does not exist; otherwise the script's own.
    """
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="", file=sys.stdout if argv else sys.stderr)
        raise SystemExit(0 if argv else 2)
    script = Path(argv[0])
    if not script.is_file():
        print(
            f"mindspeed_cp.run: error: {script} does not exist; give the path of a script, such as "
            "MEGATRON_LM_PATH/pretrain_gpt.py.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    sys.argv[:] = argv
    sys.path[0] = str(script.resolve().parent)
    os.environ[SCRIPT_VARIABLE] = str(script.resolve())
    execute("__main__")


def execute(name: str) -> None:
    """Run the script in the namespace of the module ``name``.

    That module keeps this module's spec, so that a process spawned by multiprocessing (Megatron's checkpoint writers)
    also runs this module: it imports the adaptor before the script's imports, which could fail without it.
    """
    import mindspeed_cp.megatron_adaptor  # noqa: F401  after the path is set, before the script imports Megatron

    script, namespace = os.environ[SCRIPT_VARIABLE], vars(sys.modules[name])
    namespace["__file__"] = script
    exec(compile(Path(script).read_bytes(), script, "exec"), namespace)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # spawned: the parent's command line and path are already set
    execute(__name__)
