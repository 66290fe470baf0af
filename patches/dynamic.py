"""Dynamic context parallelism of Megatron 0.16 and later: every sub-batch brings a group of its own."""

FLAG = "--hybrid-context-parallel"


def refuse_dynamic(size: int | None = None) -> None:
    """Raise ValueError: a sub-batch, or the flag where ``size`` is None, asks for another context-parallel size."""
    given = "" if size is None else f" (here local_cp_size {size})"
    raise ValueError(
        f"{FLAG} gives every micro-batch a context-parallel size of its own{given}, which mindspeed_cp does not "
        f"support; leave out {FLAG}."
    )


def check_local_size(params, cp_size: int) -> None:
    """Raise ValueError when PackedSeqParams bring a context-parallel size that is not ``cp_size``."""
    size = getattr(params, "local_cp_size", None)  # absent before 0.16
    if size not in (None, cp_size):
        refuse_dynamic(size)
