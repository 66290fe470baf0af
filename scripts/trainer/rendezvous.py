"""How the ranks of one attempt find each other in a store to which earlier attempts have written.

``torchrun --max-restarts`` restarts all ranks after a failure. Its agent keeps one store for all attempts (static
rendezvous, the default) and, since torch 2.5, the ranks of a new attempt read it without a separate prefix
(pytorch/pytorch#135712 removed TORCHELASTIC_RESTART_COUNT, because each host has its own count, and #135957 renews the
store only for the c10d rendezvous). So they find addresses of processes that are gone, and gloo's connectFullMesh fails
until the restarts are used up. Here the ranks agree on a prefix by showing each other that they are alive. This can be
removed when torch gives every attempt its own store or prefix.
"""

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

PAUSE = 0.02  # seconds between two reads of the store


def attempt_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A store for the ranks of this attempt only: that of MASTER_ADDR and MASTER_PORT with a prefix.

    Raises:
        dist.DistStoreError: the other ranks did not appear within ``timeout``.
    """
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and not agents,
        timeout=timeout,
        multi_tenant=True,
    )
    return dist.PrefixStore(f"attempt/{meet(store, rank, world_size, timeout)}", store)


def meet(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Agree with the living ranks on a name that no other attempt has.

    Every rank writes a hello with a unique token. Rank 0 makes a named plan from the hellos that it finds; a rank
    confirms a plan that contains its token, and a plan is valid when all ranks have confirmed it. A hello of the last
    attempt is never confirmed, because its process is gone, and the new rank overwrites it.
    """
    store, token = dist.PrefixStore(f"meeting/{world_size}", store), uuid.uuid4().hex
    store.set(f"hello/{rank}", token)
    end, name, plan = time.monotonic() + timeout.total_seconds(), None, None

    def lead():
        nonlocal name, plan
        found = _read(store, [f"hello/{other}" for other in range(world_size)])
        if found is None:
            return False
        if found != plan:
            plan, name = found, uuid.uuid4().hex
            store.set("plan", json.dumps([name, plan]))
        if not store.check([f"confirmed/{name}/{other}" for other in range(1, world_size)]):
            return False
        store.set(f"good/{name}", "1")
        return True

    def follow():
        nonlocal name
        found = _read(store, ["plan"])
        current, tokens = json.loads(found[0]) if found else (None, [])
        if current != name and token in tokens:
            name = current
            store.set(f"confirmed/{name}/{rank}", "1")
        return name is not None and store.check([f"good/{name}"])

    have_met = lead if rank == 0 else follow
    while not have_met():
        if time.monotonic() > end:
            raise dist.DistStoreError(f"rank {rank} waited {timeout} for the other ranks of this attempt.")
        time.sleep(PAUSE)
    return name


def _read(store, keys):
    """Values of ``keys`` as text, None unless all exist."""
    return [value.decode() for value in store.multi_get(keys)] if store.check(keys) else None
