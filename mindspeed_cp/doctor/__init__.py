"""The doctor says whether context parallelism is on here, and if not, what to do. ``python -m mindspeed_cp.doctor``.

``finding`` is what every check yields; ``command`` puts the checks on a screen. Each other module checks one thing.
Nothing is imported with this package that could fail on a broken installation; torch is imported by a check.
"""

from mindspeed_cp.doctor.command import main

__all__ = ["main"]
