"""The KV cache policy, resolved once: which of key and value forward keeps, and which backward communicates again."""

from dataclasses import dataclass
from typing import Literal

Name = Literal["key", "value"]
NAMES: tuple[Name, ...] = ("key", "value")


@dataclass(frozen=True)
class KVCache:
    """What becomes of keys and values between forward and backward, by name.

    Args:
        keep: a ring's forward keeps what it received of them, and backward communicates the others again.
        refetch: Ulysses saves them before communication, and backward communicates them again; it keeps the others.
    """

    keep: frozenset[Name] = frozenset()
    refetch: frozenset[Name] = frozenset()

    @classmethod
    def resolve(cls, policy: Literal["full", "half"] | None, ring_size: int) -> "KVCache":
        """The policy saves communication where there is a ring, and memory where only Ulysses communicates."""
        names: frozenset[Name] = frozenset({None: (), "half": ("key",), "full": NAMES}[policy])
        return cls(keep=names) if ring_size > 1 else cls(refetch=names)
