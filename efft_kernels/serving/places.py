"""The places of one replica: slow clients share a limited number of them, and never take those of complete requests."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from .uploads import Refused

T = TypeVar("T")
GRACE_S = 1.0  # an upload is not dropped for another one before it is as old as this


class Uploads:
    """The uploads that are arriving. When there are ``most``, the oldest is dropped for the next; all are dropped after
    ``seconds``. It belongs to one event loop.
    """

    def __init__(self, most: int, seconds: float):
        self.most, self.seconds = most, seconds
        self._arriving: dict[asyncio.Task, float] = {}  # -> its start; the oldest first

    def __len__(self) -> int:
        return len(self._arriving)

    async def receive(self, reading: Coroutine[Any, Any, T]) -> T:
        """The result of ``reading`` an upload.

        Raises:
            Refused: 408, the upload was dropped; and what ``reading`` raises.
        """
        try:
            while len(self._arriving) >= self.most:
                task, start = next(iter(self._arriving.items()))
                age = time.monotonic() - start
                if age < GRACE_S:
                    await asyncio.sleep(min(0.02, GRACE_S - age))
                else:
                    del self._arriving[task]
                    task.cancel()
        except asyncio.CancelledError:  # the client has left
            reading.close()
            raise
        task = asyncio.ensure_future(reading)
        self._arriving[task] = time.monotonic()
        try:
            await asyncio.wait({task}, timeout=self.seconds)
            if not task.done() or task.cancelled():
                raise Refused(408, f"the image must arrive within {self.seconds:g} s, or sooner while many do")
            return task.result()
        finally:
            self._arriving.pop(task, None)
            task.cancel()
