"""`python -m server` is the command `quire`."""

from __future__ import annotations

from server.cli import main

# The engine process is spawned and imports this file again: nothing may start without the guard.
if __name__ == "__main__":
    raise SystemExit(main())
