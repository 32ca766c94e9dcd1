"""Runs a command against a real server, and says afterwards whether the server is still whole.

    python -m tests.compat.serve COMMAND [ARG ...]

The command finds the server in QUIRE_URL, its key in QUIRE_KEY and the model's name in QUIRE_MODEL.
Exits with the command's status, or 1 if the engine was restarted, blocks leaked, a counter does not
add up or a traceback was logged.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
KEY = "sk-compat"
MODEL = "quire-embedded"
READY_SECONDS = 180.0
IDLE_SECONDS = 60.0


class Server:
    """`quire serve` with the embedded model on a free port."""

    def __init__(self, log: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "server", "serve", "--port", "0", *flags]
        env = {k: v for k, v in os.environ.items() if not k.startswith("QUIRE_")}
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=out, env={**env, "QUIRE_API_KEY": KEY}
            )
        self.url = self._wait_for_url()
        self.started = self._children()  # later ones try grammars out

    def _wait_for_url(self) -> str:
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            text = self.log.read_text(errors="replace")
            if found := re.search(r"curl -N (http://127\.0\.0\.1:\d+)", text):
                return found[1]
            time.sleep(0.1)
        self.process.kill()
        raise SystemExit(f"the server did not start:\n{self.log.read_text(errors='replace')}")

    def _children(self) -> set[str]:
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return {pid for task in tasks for pid in task.read_text().split()}

    def problems(self) -> list[str]:
        """What is wrong with the server now that nobody asks it for anything."""
        found = []
        if self.process.poll() is not None:
            return [f"the server ended with {self.process.returncode}"]
        if not self.started <= self._children():
            found.append("the engine process is another one")
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=self.url, headers=headers, timeout=30) as client:
            end = time.monotonic() + IDLE_SECONDS
            while (busy := self._busy(client)) and time.monotonic() < end:
                time.sleep(0.2)
            if busy:
                found.append(f"not idle after {IDLE_SECONDS:.0f} s: {busy}")
            verdict = client.get("/debug/kv/verify").json()
            if not verdict["ok"]:
                found.append(f"the cache is broken: {verdict['problem']}")
            if client.get("/health").status_code != 200:
                found.append("/health is not 200")
        if "Traceback" in self.log.read_text(errors="replace"):
            found.append("a traceback was logged")
        return found

    def _busy(self, client: httpx.Client) -> dict[str, float]:
        text = client.get("/metrics").text
        wanted = {
            "running": r"vllm:num_requests_running{[^}]*} (\S+)",
            "waiting": r"vllm:num_requests_waiting{[^}]*} (\S+)",
            "active blocks": r'quire:kv_blocks{[^}]*state="active"[^}]*} (\S+)',
        }
        values = {name: re.search(line, text) for name, line in wanted.items()}
        assert all(values.values()), f"metrics without {values}"
        numbers = {name: float(found[1]) for name, found in values.items() if found}
        return {name: number for name, number in numbers.items() if number}

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


def main() -> int:
    """Serves, runs the command, looks at the server."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "server.log", "--max-num-seqs", "32")
        env = {"QUIRE_URL": server.url, "QUIRE_KEY": KEY, "QUIRE_MODEL": MODEL}
        try:
            status = subprocess.run(sys.argv[1:], env={**os.environ, **env}, check=False).returncode
            problems = server.problems()
        finally:
            ended = server.stop()
        problems += [f"the server's exit status is {ended}"] if ended else []
        for problem in problems:
            print(f"tests.compat.serve: {problem}", file=sys.stderr)
        if problems:
            print(server.log.read_text(errors="replace")[-5000:], file=sys.stderr)
        return status or int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
