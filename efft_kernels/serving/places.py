"""The room of one replica for images that are arriving, counted in bytes: slow clients hold next to nothing of it."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from .uploads import Refused, Room

T = TypeVar("T")
GRACE_S = 1.0  # an upload is not dropped for the bytes of another one before it is as old as this


class Uploads:
    """The uploads that are arriving, however many. When their bytes exceed ``most``, the oldest that has sent any is
    dropped for the next ones; all are dropped after ``seconds``. It belongs to one event loop.
    """

    def __init__(self, most: int, seconds: float):
        self.most, self.seconds, self.bytes = most, seconds, 0
        self._arriving: dict[asyncio.Task, float] = {}  # -> its start; the oldest first
        self._sizes: dict[asyncio.Task, int] = {}  # -> bytes that have arrived

    def __len__(self) -> int:
        return len(self._arriving)

    async def receive(self, read: Callable[[Room], Coroutine[Any, Any, T]]) -> T:
        """The result of ``read(room)``, which reads an upload and awaits ``room(n)`` for each ``n`` bytes of it.

        Raises:
            Refused: 408, the upload was dropped; and what ``read`` raises.
        """
        task = asyncio.ensure_future(read(self._room))
        self._arriving[task] = time.monotonic()
        try:
            await asyncio.wait({task}, timeout=self.seconds)
            if not task.done() or task.cancelled():
                raise Refused(408, f"the image must arrive within {self.seconds:g} s, or sooner while many do")
            return task.result()
        finally:
            self._drop(task)

    async def _room(self, count: int) -> None:
        """Wait for room for ``count`` more bytes of the upload that the current task reads. The oldest does not wait,
        so that one always goes on.
        """
        task = asyncio.current_task()
        while self.bytes + count > self.most:
            oldest = next((one for one in self._arriving if one is task or one in self._sizes), task)
            if oldest is task:
                break
            age = time.monotonic() - self._arriving[oldest]
            if age < GRACE_S:
                await asyncio.sleep(min(0.02, GRACE_S - age))
            else:
                self._drop(oldest)
        self.bytes += count
        self._sizes[task] = self._sizes.get(task, 0) + count

    def _drop(self, task: asyncio.Task) -> None:
        task.cancel()
        self._arriving.pop(task, None)
        self.bytes -= self._sizes.pop(task, 0)
