"""The API keys that are let in, and whose they are."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable
from pathlib import Path

from configs.settings import HttpSettings, SettingsError

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class KeyRing:
    """Keys by their digests; without any, everybody is let in.

    Args:
        keys: pairs of a key and its owner's name; "" makes a name of the key's digest.
    """

    def __init__(self, keys: Iterable[tuple[str, str]] = ()) -> None:
        digests = ((_digest(key.encode()), name) for key, name in keys)
        self._tenants = {digest: name or f"key-{digest.hex()[:8]}" for digest, name in digests}

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def tenant(self, given: bytes) -> str | None:
        """Whose key `given` is; "" where there are no keys, None where it is none of them.

        Every key is compared, so that the time tells nothing.
        """
        if not self._tenants:
            return ""
        digest, owner = _digest(given), None
        for known, name in self._tenants.items():
            if hmac.compare_digest(known, digest):
                owner = name
        return owner

    @classmethod
    def read(cls, settings: HttpSettings) -> KeyRing:
        """The keys of the settings and of their file.

        Raises:
            SettingsError: the file cannot be read or has a line that is no key.
        """
        keys = [(key.get_secret_value(), "") for key in settings.api_key]
        if settings.api_key_file is not None:
            keys += _from_file(settings.api_key_file)
        return cls(keys)


def _digest(key: bytes) -> bytes:
    """Not reversible for random keys; the label keeps it apart from digests made elsewhere."""
    return hashlib.blake2b(key, digest_size=32, person=b"quire api key").digest()


def _from_file(name: str) -> list[tuple[str, str]]:
    """Lines `name:key` or `key`; empty ones and comments (#) count for nothing. Several keys may
    have one name, as while one is replaced by the next."""
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"api_key_file {name} cannot be read: {error}") from None
    keys = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        before, colon, after = (part.strip() for part in line.partition(":"))
        owner, key = (before, after) if colon else ("", before)
        if not key or len(key.split()) > 1 or (colon and not _NAME.fullmatch(owner)):
            raise SettingsError(f"api_key_file {name}, line {number}: must be `name:key` or `key`")
        keys.append((key, owner))
    if not keys:
        raise SettingsError(f"api_key_file {name} must hold at least one key, got none")
    return keys


def require_keys(host: str, keys: KeyRing, *, no_auth: bool) -> None:
    """Refuses to serve everybody by oversight.

    Args:
        host: the numeric address that is bound.

    Raises:
        SettingsError: others can reach it, there is no key, and nobody said that this is meant.
    """
    if keys or no_auth or ipaddress.ip_address(host).is_loopback:
        return
    raise SettingsError(
        f"host {host} can be reached by others and no key is set: give --api-key or "
        "--api-key-file, or say --no-auth"
    )
