"""The proof: a training command computes the same with context parallelism as without, shown on the user's own script.
``python -m mindspeed_cp.prove SCRIPT ARGS``; ``prove`` and ``report`` for frameworks that are no scripts.

``shrinking`` makes the command small, ``ranks`` runs it twice, ``watching`` and ``recording`` keep what every rank
computes, ``comparing`` finds the first difference, ``signature`` says what it looks like, ``report`` says it all.
"""

from mindspeed_cp.prove import report
from mindspeed_cp.prove.command import main
from mindspeed_cp.prove.hook import prove

__all__ = ["main", "prove", "report"]
