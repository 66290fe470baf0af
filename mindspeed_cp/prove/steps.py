"""The loss of a step, from the loss functions' results on its ranks and micro-batches."""

from collections.abc import Sequence

from mindspeed_cp.prove.recording import Record, Step


def by_step(records: Sequence[Record]) -> list[list[Step]]:
    """The steps of the ranks that compute the loss: one per context-parallel rank, on the last pipeline stage."""
    last = [
        record
        for record in records
        if record.place["pp"] == record.place["pp_size"] - 1 and not record.place["tp"] and not record.place["dp"]
    ]
    return [list(steps) for steps in zip(*(record.steps for record in last))]


def loss_of(steps: Sequence[Step]) -> tuple[float, float | None]:
    """(loss, tokens) of one step over its ranks and micro-batches, of the first reported loss."""
    found = [batch for step in steps for batch in step.losses]
    if not found:
        return float("nan"), None
    name = next(iter(found[0]))
    pairs = [batch[name] for batch in found if name in batch]
    counts = [batch.get("objective", (0.0, None))[1] for batch in found]
    tokens = None if any(count is None for count in counts) else sum(count for count in counts if count is not None)
    if all(count is not None for _, count in pairs):
        total = sum(count for _, count in pairs if count is not None)
        return sum(value for value, _ in pairs) / max(total, 1e-30), tokens
    if name == "objective":  # the ranks' shares of the mean over all tokens
        return sum(value for value, _ in pairs) * len(steps) / len(found), tokens
    return sum(value for value, _ in pairs) / len(pairs), tokens


def off(found: float, expected: float) -> float:
    """Relative error; infinite if one of the two is NaN or infinite."""
    error = abs(found - expected) / max(abs(expected), 1e-30)
    return error if error == error else float("inf")
