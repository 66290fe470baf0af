"""Run prove for several commands of one script, with one process that has imported Megatron."""

import tempfile
from pathlib import Path

from mindspeed_cp.prove import command, shrinking
from mindspeed_cp.prove.launching import Server
from mindspeed_cp.prove.shrinking import Wish


def proofs(script, commands, limit=200, **wish):
    """name -> Verdict of each command (name -> flags)."""
    found = {}
    with tempfile.TemporaryDirectory() as imports, Server(Path(imports)) as server:
        for name, flags in commands.items():
            with tempfile.TemporaryDirectory() as folder:
                plan = shrinking.plan(script, flags, Wish(limit=limit, **wish), Path(folder))
                found[name] = command.proved(plan, server)
    return found
