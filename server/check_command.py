"""`quire check`: what `quire serve` would say once it is ready, before anything is loaded."""

from __future__ import annotations

import sys

from configs.settings import Settings
from engine.client import EngineStartError, check
from server.banner import box, facts
from server.cli import FAILED, MISUSED, OK
from server.keys import KeyRing, require_keys
from server.launch import listening_socket


def run(settings: Settings) -> int:
    """Prints the box; the exit code.

    Raises:
        SettingsError: the port cannot be taken, or keys are missing or cannot be read.
    """
    keys = KeyRing.read(settings.http)
    with listening_socket(settings.http.host, settings.http.port) as listening:
        address = listening.getsockname()
        require_keys(address[0], keys, no_auth=settings.http.no_auth)
    try:
        info = check(settings)
    except EngineStartError as error:
        print(f"quire: {error.message}", file=sys.stderr)
        return MISUSED if error.expected else FAILED
    print(box(facts(settings, keys, info, address)))
    if info.device != "cpu":
        print("A step's own memory is not known yet: the pool will be somewhat smaller.")
    return OK
