"""Different dropout masks on ranks whose random generators are in the same state.

The flash attention operators of GPUs and NPUs draw their seed from the device's default generator, which Megatron seeds
equally on all context-parallel ranks. Their backward passes take the seed that the forward pass returned, so only the
forward pass must run inside ``random_stream``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

ODD = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: consecutive streams get seeds that differ in half of their bits
SEED = slice(-16, -8)  # of the state, which ends with seed and offset in every release


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that operators on ``device`` draw from."""
    if device.type == "cpu":
        return torch.default_generator
    module = getattr(torch, device.type)
    generators: tuple[torch.Generator, ...] = module.default_generators
    return generators[module.current_device() if device.index is None else device.index]


@contextmanager
def random_stream(device: torch.device, number: int) -> Iterator[None]:
    """Context manager in which the default generator of ``device`` uses stream ``number``; 0 leaves it unchanged.

    Afterwards the generator continues with its own seed, advanced by as much as was drawn inside. Nothing waits for the
    device, because the state of these generators, a seed and an offset, is in host memory.
    """
    if not number:
        yield
        return
    generator = default_generator(device)
    if device.type == "cpu":  # tests run fake operators on the CPU, whose generator has no offset to advance
        seed = int(torch.randint(1 << 62, (), generator=generator))
        after = generator.get_state()
        generator.manual_seed(_mixed(seed, number))
        try:
            yield
        finally:
            generator.set_state(after)
        return
    own = int(generator.get_state()[SEED].clone().view(torch.int64))
    _set(generator, seed=_mixed(own, number))
    try:
        yield
    finally:
        _set(generator, seed=own)


def _mixed(seed: int, number: int) -> int:
    return (seed ^ (number * ODD)) % (1 << 63)


def _set(generator: torch.Generator, seed: int) -> None:
    state = generator.get_state()
    state[SEED] = torch.tensor([seed], dtype=torch.int64).view(torch.uint8)
    generator.set_state(state)
