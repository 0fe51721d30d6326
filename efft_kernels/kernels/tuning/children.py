"""Runs the tuner's jobs in child processes with limits, and finds out which plan a process died or hung at."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

WORKER = [sys.executable, "-m", f"{__package__}.worker"]
LATE = "no time was left"
STARTING = 180.0  # seconds until a child's first event: it imports torch and makes a context on the GPU


class Death(NamedTuple):
    """Where a child was when it ended, and how it ended."""

    at: dict  # the last event that said what comes next; empty before the first one
    reason: str
    out_of_time: bool  # the tuner's time was up; nobody is to blame


class Child:
    """One process, which is given jobs one after the other and started again when it is gone."""

    def __init__(self, command: list[str]):
        self.command, self.process = command, None

    def start(self) -> None:
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, start_new_session=True
        )
        self.lines: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, args=(self.process.stdout, self.lines), daemon=True).start()

    @staticmethod
    def _read(pipe, lines: queue.Queue) -> None:
        for line in pipe:
            lines.put(line)
        lines.put(None)

    def run(self, job: dict, on_event: Callable[[dict], None], limit: float, deadline: float) -> Death | None:
        """One job. A step that takes longer than `limit` seconds counts as hung; None if all went well."""
        at: dict = {}
        fresh = self.process is None
        if fresh:
            self.start()
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return self._dead(at, "it ended")
        while True:
            patience = STARTING if fresh and not at else limit
            left = deadline - time.monotonic()
            try:
                line = self.lines.get(timeout=max(0.01, min(patience, left)))
            except queue.Empty:
                self.stop()
                late = patience > left
                return Death(at, LATE if late else f"no answer for {patience:.0f} s, stopped", late)
            if line is None:
                return self._dead(at, "it ended")
            event = json.loads(line)
            if event.get("done"):
                return None
            if "at" in event:
                at = event
            else:
                on_event(event)

    def _dead(self, at: dict, what: str) -> Death:
        code = self.process.wait()
        self.errors.seek(0)
        last = self.errors.read().decode(errors="replace").strip().splitlines()[-1:]
        how = f"by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"with exit status {code}"
        self.stop()
        return Death(at, " ".join([f"its process ended {how}:", *last]).rstrip(":"), False)

    def stop(self) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):  # with all that it started
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(OSError):  # what it did not read is written at the close
            self.process.stdin.close()
        self.errors.close()
        self.process = None
