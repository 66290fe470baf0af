"""The proof: a training command computes the same with context parallelism as without, shown on the user's own script.
``python -m mindspeed_cp.prove SCRIPT ARGS``.

``shrinking`` makes the command small, ``ranks`` runs it twice, ``watching`` and ``recording`` keep what every rank
computes, ``comparing`` finds the first difference, ``signature`` says what it looks like, ``report`` says it all.
"""

from mindspeed_cp.prove.command import main

__all__ = ["main"]
