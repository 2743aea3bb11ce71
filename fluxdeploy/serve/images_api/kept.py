"""Pictures that are answered by URL: kept in memory, for a while, within bounds."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["KeptPicture", "KeptPictures"]


@dataclass(frozen=True)
class KeptPicture:
    """A picture's file; `until` is a time of the keeper's clock."""

    data: bytes
    media_type: str
    until: float


class KeptPictures:
    """Keeps up to `capacity` bytes of pictures, each for up to `seconds`; the oldest go first.

    Their names cannot be guessed, so that whoever has one may have the picture without a key, as a
    page's `img` does.
    """

    def __init__(
        self, capacity: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._capacity = capacity
        self._seconds = seconds
        self._clock = clock
        self._pictures: OrderedDict[str, KeptPicture] = OrderedDict()
        self._bytes = 0

    def keep(self, data: bytes, media_type: str) -> str:
        """Keep a picture; its name."""
        name = secrets.token_urlsafe(24)
        self._pictures[name] = KeptPicture(data, media_type, self._clock() + self._seconds)
        self._bytes += len(data)
        self._drop()
        return name

    def get(self, name: str) -> KeptPicture | None:
        """The picture of that name, while it is kept."""
        self._drop()
        return self._pictures.get(name)

    def _drop(self) -> None:
        now = self._clock()
        while self._pictures:
            oldest = next(iter(self._pictures.values()))
            if self._bytes <= self._capacity and now < oldest.until:
                return
            self._bytes -= len(self._pictures.popitem(last=False)[1].data)
