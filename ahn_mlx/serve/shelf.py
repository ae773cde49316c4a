"""Sessions that wait for a next question, in a bounded number of bytes.

A conversation is found by what has been said in it up to the end of a message; a window with
a memory cannot be cut at any token, so there is nothing to look up between messages.
"""

import threading
from collections import OrderedDict
from typing import NamedTuple

from ..reading.session import Session


class Kept(NamedTuple):
    """A session, which nobody changes: it is forked. unread: tokens that come next. system:
    message of its conversation. ended: text of the token that ended the last answer, if it ended
    by itself."""

    session: Session
    unread: tuple[int, ...] = ()
    system: str = ""
    ended: str = ""

    @property
    def tokens(self) -> int:
        """Of the conversation so far."""
        return self.session.tokens + len(self.unread)


class Shelf:
    """Least recently used ones go first. limit: bytes. Any thread may ask."""

    def __init__(self, limit: int):
        self.limit = limit
        self._lock = threading.Lock()
        # One session may be found by several keys.
        self._kept: OrderedDict[str, tuple[Kept, int]] = OrderedDict()

    def get(self, key: str) -> Kept | None:
        with self._lock:
            if key not in self._kept:
                return None
            found = self._kept[key][0]
            # By whatever key it is found again: one that is lost alone frees nothing.
            for other in [k for k, (kept, _) in self._kept.items() if kept is found]:
                self._kept.move_to_end(other)
            return found

    def put(self, kept: Kept, *keys: str) -> None:
        """Keep it, unless it alone is too large."""
        size = kept.session.nbytes
        if size > self.limit:
            return
        with self._lock:
            for key in keys:
                self._kept.pop(key, None)
                self._kept[key] = (kept, size)
            while self._bytes() > self.limit:
                self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all, as if forks shared nothing."""
        with self._lock:
            return self._bytes()

    def __len__(self) -> int:
        with self._lock:
            return len({id(kept) for kept, _ in self._kept.values()})

    def _bytes(self) -> int:
        return sum({id(kept): size for kept, size in self._kept.values()}.values())
