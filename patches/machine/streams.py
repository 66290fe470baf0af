"""``torch.cuda``'s streams and events for a machine where operations run in order."""

from typing import Any

import torch


class Stream:
    """A stream that is always empty."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")
        self.cuda_stream = 0

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def query(self) -> bool:
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()

    def synchronize(self) -> None:
        return None

    def wait_event(self, event: "Event") -> None:
        return None

    def wait_stream(self, stream: "Stream") -> None:
        return None


class Event:
    """An event that has always completed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def elapsed_time(self, end_event: "Event") -> float:
        return 0.0

    def query(self) -> bool:
        return True

    def record(self, stream: Stream | None = None) -> None:
        return None

    def synchronize(self) -> None:
        return None

    def wait(self, stream: Stream | None = None) -> None:
        return None
