"""At the start, all ranks compare the settings that must be equal, through torch's rendezvous store.

Each rank publishes its settings; rank 0 reads them all and publishes a verdict, which every rank reads. No tensor is
sent, so this works before any group exists and whatever differs. A rank with invalid settings publishes the reason
instead.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from mindspeed_cp.settings.rules import consecutive
from mindspeed_cp.version import __version__

Value = TypeVar("Value")
KEY = "mindspeed_cp/agreement"
PATIENCE = timedelta(minutes=10)  # time to wait for late ranks
FAREWELL = timedelta(seconds=10)  # rank 0 may own the store, so it waits this long for others to read the verdict
SHOWN = 3  # differences shown in a message


class RanksDiffer(ValueError):
    """The ranks were started with different settings, or a rank's settings are invalid."""


SAID = "the command line is refused."  # the rank has printed the details itself


def agree(
    settings: Mapping[str, str],
    *,
    refusal: str | None = None,
    say: Callable[[str], None] = lambda message: None,
    patience: timedelta = PATIENCE,
    ranks: Sequence[int] | None = None,
) -> None:
    """Compare ``settings`` (flag -> value as text) with all other ranks; collective over the world, or over ``ranks``.

    Args:
        ranks: global ranks of a group; None for the world.
        refusal: why this rank's own settings are invalid; ``SAID`` if it has already printed the reason.
        say: called with the verdict on the first rank, before any other rank gets it and may exit.
        patience: how long to wait for late ranks.

    Raises:
        RanksDiffer: a setting differs, or a rank's settings are invalid; the message names flag, values and ranks.
        RuntimeError: a rank did not take part in time.
    """
    if not _is_comparable():
        if refusal is not None:
            say(refusal)
            raise RanksDiffer(refusal)
        return
    store, rank = _get_default_store(), dist.get_rank()
    everyone = range(dist.get_world_size()) if ranks is None else ranks
    first, key = everyone[0], KEY if ranks is None else f"{KEY}/{'-'.join(map(str, ranks))}"
    place = f"{key}/{store.add(f'{key}/{rank}', 1)}"  # every rank counts its own calls
    store.set(f"{place}/{rank}", json.dumps([refusal, dict(settings)]))
    if rank == first:
        said = [json.loads(_read(store, f"{place}/{other}", other, patience)) for other in everyone]
        verdict = _verdict(said, everyone)
        if verdict:
            say(verdict)
        store.set(f"{place}/verdict", verdict or "-")
    verdict = _read(store, f"{place}/verdict", first, 2 * patience).decode()
    store.delete_key(f"{place}/{rank}")
    if verdict != "-":
        _leave_last(store, place, rank, everyone)
        raise RanksDiffer(verdict)


def refuse(
    refusal: str, *, say: Callable[[str], None], backend: str = "nccl", patience: timedelta = timedelta(minutes=1)
) -> None:
    """Tell the other ranks, which are starting, that this rank cannot start; the caller then ends it.

    Without a process group, this rank joins the one that the others are about to make, if a launcher has set the
    variables for that; otherwise they would wait for it until their timeout.

    Args:
        say: called with the message on rank 0, or on this rank if there are no others or none answers.
        backend: the other ranks' backend, as they name it.
    """
    try:
        if not dist.is_initialized():
            dist.init_process_group(backend, timeout=patience)
        agree({}, refusal=refusal, say=say, patience=patience)
    except RanksDiffer:
        return
    except (ValueError, RuntimeError):  # no launcher, or the others did not join
        say(refusal)


def versions(**others: str) -> dict[str, str]:
    """The versions of torch and of this project, and ``others``, to be compared like settings."""
    return {"the version of torch": torch.__version__, "the version of mindspeed_cp": __version__, **others}


def settings_of(config: Any) -> dict[str, str]:
    """name -> value of every field of a dataclass, and the versions."""
    fields = dataclasses.fields(config)
    return {field.name: str(getattr(config, field.name)) for field in fields} | versions()


def _is_comparable() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() != "fake"


def _read(store: dist.Store, key: str, rank: int, patience: timedelta) -> bytes:
    try:
        store.wait([key], patience)
        value: bytes = store.get(key)
        return value
    except RuntimeError as error:  # DistStoreError is one
        raise RuntimeError(
            f"rank {rank} has not said within {patience.total_seconds():.0f} s which settings it runs with; see what "
            "it printed, it may have ended."
        ) from error


def _leave_last(store: dist.Store, place: str, rank: int, everyone: Sequence[int]) -> None:
    if store.add(f"{place}/left", 1) == len(everyone):
        store.set(f"{place}/all-left", "-")
    if rank == everyone[0]:
        try:
            store.wait([f"{place}/all-left"], FAREWELL)
        except RuntimeError:
            pass  # a rank has already exited; nobody else needs the store


def _verdict(said: list[tuple[str | None, dict[str, str]]], everyone: Sequence[int]) -> str:
    """The message that stops the ranks, or ""; ``said``: (refusal, settings) of each of ``everyone``."""
    by_refusal = _ranks_by([refusal for refusal, _ in said], everyone)
    accepting = by_refusal.pop(None, [])
    refusals = {refusal: ranks for refusal, ranks in by_refusal.items() if refusal is not None}
    if refusals:
        return _refused(refusals, accepting)
    names = dict.fromkeys(name for _, settings in said for name in settings)
    differing = {}
    for name in names:
        ranks = _ranks_by([settings.get(name, "not there") for _, settings in said], everyone)
        if len(ranks) > 1:
            differing[name] = ranks
    if not differing:
        return ""
    parts = [
        f"{name} is {' and '.join(f'{value} on {named(ranks)}' for value, ranks in differing[name].items())}"
        for name in list(differing)[:SHOWN]
    ]
    more = f"; {len(differing) - SHOWN} more differ" if len(differing) > SHOWN else ""
    return f"the ranks were started with different settings: {'; '.join(parts)}{more}; give all ranks the same."


def _refused(refusals: dict[str, list[int]], accepting: list[int]) -> str:
    if len(refusals) == 1 and not accepting:
        return next(iter(refusals))
    parts = [f"on {named(ranks)}: {message}" for message, ranks in refusals.items()]
    others = f" ({named(accepting)} can work with what was given there)" if accepting else ""
    return " ".join(parts[:SHOWN]) + others


def _ranks_by(values: Iterable[Value], everyone: Sequence[int]) -> dict[Value, list[int]]:
    """value -> the ranks that have it, ascending."""
    found: dict[Value, list[int]] = {}
    for rank, value in zip(everyone, values):
        found.setdefault(value, []).append(rank)
    return found


def named(ranks: list[int]) -> str:
    """ "rank 2", "ranks 0 and 3", "ranks 0, 2 to 7 and 9"."""
    parts = [
        text for run in consecutive(ranks) for text in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))
    ]
    text = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
