"""What was found out before and holds for ever: a bounded memory, of which the least recently used entry goes first."""

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)
Value = TypeVar("Value")


class Remembered(Generic[Name, Value]):
    """Values by name. Thread-safe.

    Args:
        most: Most values that are remembered.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = Lock()
        self._values: OrderedDict[Name, Value] = OrderedDict()

    def find(self, name: Name) -> Value | None:
        """Return a value, which is the most recently used one then; None if it is not remembered."""
        with self._lock:
            if name in self._values:
                self._values.move_to_end(name)
            return self._values.get(name)

    def keep(self, name: Name, value: Value) -> None:
        """Remember a value."""
        with self._lock:
            self._values[name] = value
            if len(self._values) > self._most:
                self._values.popitem(last=False)
