"""A program together with all that it starts: one process group, stopped and continued as one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

END_SECONDS: Final = 20.0


class ProcessGroup:
    """Starts `command` in a process group of its own.

    Args:
        environment: added to this process's own.
        log: takes its error output, and its output too unless `piped`.
        piped: whether `stdin` and `stdout` are pipes for lines of text.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        piped: bool = False,
    ) -> None:
        self.log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else output,
                stderr=output,
                text=True,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self.stdin, self.stdout = self._process.stdin, self._process.stdout

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def pause(self) -> None:
        """Nothing of it runs from here on."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Continues a paused group, and pauses it again."""
        self.resume()
        try:
            yield
        finally:
            self.pause()

    def end(self) -> None:
        """Asks it to end, then kills what is left."""
        self._signal(signal.SIGTERM)
        self.resume()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self.stdin, self.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def last_words(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-1500:].strip()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
