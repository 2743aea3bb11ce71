"""What the operator of a server decides."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What the server is called, whom it serves, and how much of it one request may have.

    model: the name under which requests ask for the bundle; that of its checkpoint where None.
    keys: of which a request shows one; none is asked for where there are none.
    origins: pages of these origins may use the API from a browser.
    max_body: bytes of a request's body.
    max_pixels: of all pictures of a request together.
    max_steps: of a request.
    kept_bytes: of the pictures that are kept for their URLs, for `kept_seconds`.
    """

    model: str | None = None
    keys: tuple[str, ...] = field(default=(), repr=False)
    origins: tuple[str, ...] = ()
    max_body: int = 64 << 20
    max_pixels: int = 16 << 20
    max_steps: int = 200
    kept_bytes: int = 256 << 20
    kept_seconds: float = 3600.0

    def knows(self, key: str) -> bool:
        """Whether a key is one of ours. It takes as long whichever it is, and however much fits."""
        given = _digest(key)
        return sum(hmac.compare_digest(given, _digest(each)) for each in self.keys) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
