"""What the program tells of itself while it works: the places that metrics and traces hang on.

`Telemetry` does nothing; `metrics` and `tracing` override what they need, `Several` tells more than one. Methods are
called on the path of calls and passes: they return fast and never raise.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from qflare_server.context import Telemetry


class Several(Telemetry):
    """Tells each of several."""

    def __init__(self, hearers: Sequence[Telemetry]) -> None:
        self._hearers = tuple(hearers)

    def call_started(self, method: str, kind: str) -> None:
        """Tell each."""
        for hearer in self._hearers:
            hearer.call_started(method, kind)

    def message_received(self, method: str, kind: str) -> None:
        """Tell each."""
        for hearer in self._hearers:
            hearer.message_received(method, kind)

    def message_sent(self, method: str, kind: str) -> None:
        """Tell each."""
        for hearer in self._hearers:
            hearer.message_sent(method, kind)

    def call_handled(
        self, method: str, kind: str, code: str, duration_s: float, reason: str
    ) -> None:
        """Tell each."""
        for hearer in self._hearers:
            hearer.call_handled(method, kind, code, duration_s, reason)

    def bytes_received(self, count: int) -> None:
        """Tell each."""
        for hearer in self._hearers:
            hearer.bytes_received(count)

    def bytes_sent(self, count: int) -> None:
        """Tell each."""
        for hearer in self._hearers:
            hearer.bytes_sent(count)

    def updates_folded(self, count: int, size_bytes: int, duration_s: float) -> None:
        """Tell each."""
        for hearer in self._hearers:
            hearer.updates_folded(count, size_bytes, duration_s)

    def round_published(
        self, aggregated_count: int, rejected_count: int, collected_s: float, published_s: float
    ) -> None:
        """Tell each."""
        for hearer in self._hearers:
            hearer.round_published(aggregated_count, rejected_count, collected_s, published_s)

    def span(
        self, name: str, *, links: Sequence[str] = (), **attributes: Any
    ) -> AbstractContextManager[None]:
        """Open a block of each."""
        return self._spans(name, links, attributes)

    @contextmanager
    def _spans(self, name: str, links: Sequence[str], attributes: dict[str, Any]) -> Iterator[None]:
        with ExitStack() as stack:
            for hearer in self._hearers:
                stack.enter_context(hearer.span(name, links=links, **attributes))
            yield
