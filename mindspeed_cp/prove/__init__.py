"""Check on the user's own script that a training command computes the same with and without context parallelism.
``python -m mindspeed_cp.prove SCRIPT ARGS``; ``prove`` and ``report`` for frameworks without a training script.

``shrinking`` makes the command small, ``ranks`` runs it twice, ``watching`` and ``recording`` record what every rank
computes, ``comparing`` finds the first difference, ``signature`` classifies it, ``report`` prints the result.
"""

from mindspeed_cp.prove import report
from mindspeed_cp.prove.command import main
from mindspeed_cp.prove.hook import prove

__all__ = ["main", "prove", "report"]
