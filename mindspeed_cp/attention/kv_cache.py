"""The KV cache policy: which of key and value forward keeps, and which are communicated again in backward."""

from dataclasses import dataclass
from typing import Literal

Name = Literal["key", "value"]
NAMES: tuple[Name, ...] = ("key", "value")


@dataclass(frozen=True)
class KVCache:
    """What happens to keys and values between forward and backward, by name.

    Args:
        keep: those that a ring's forward keeps after receiving them; backward communicates the others again.
        refetch: those that Ulysses saves before communication and communicates again in backward; it keeps the others.
    """

    keep: frozenset[Name] = frozenset()
    refetch: frozenset[Name] = frozenset()

    @classmethod
    def resolve(cls, policy: Literal["full", "half"] | None, ring_size: int) -> "KVCache":
        """Resolve a policy: with a ring it saves communication; with only Ulysses it saves memory."""
        names: frozenset[Name] = frozenset({None: (), "half": ("key",), "full": NAMES}[policy])
        return cls(keep=names) if ring_size > 1 else cls(refetch=names)
