"""What a server says of itself once it is ready."""

from __future__ import annotations

import json

from configs.settings import DISK_STAGING_BYTES, CacheSettings, Settings, format_bytes
from engine.protocol import COMMON_LENGTH, EngineInfo
from server import __version__
from server.cli import reachable
from server.keys import KeyRing


def facts(
    settings: Settings, keys: KeyRing, info: EngineInfo, address: tuple[object, ...]
) -> dict[str, str]:
    """What runs and how large it is, and a first request to copy."""
    url = f"http://{reachable(settings.http.host)}:{address[1]}"
    tokens = info.num_blocks // info.kv_groups * info.block_size
    groups = f" / {info.kv_groups} layer groups" if info.kv_groups > 1 else ""
    length = min(COMMON_LENGTH, info.max_model_len)
    return {
        "address": url,
        "models": ", ".join(settings.model.names),
        "device": f"{info.device}, {info.dtype}",
        "weights": f"{format_bytes(info.weight_bytes)}{_as(info)} ({info.architecture})",
        "KV cache": f"{info.num_blocks:,} blocks x {info.block_size}{groups} = {tokens:,} tokens, "
        + format_bytes(tokens * info.kv_bytes_per_token),
        **_tiers(settings.cache, info.num_host_blocks),
        "context": f"{info.max_model_len:,} tokens at most",
        "at once": f"{info.concurrency:,} sequences of {length:,} tokens",
        "API key": "on" if keys else "off",
        "try": first_request(settings.model.names[0], url, with_key=bool(keys)),
    }


def _as(info: EngineInfo) -> str:
    return "" if info.quantization == "none" else f" as {info.quantization}"


def _tiers(cache: CacheSettings, host_blocks: int) -> dict[str, str]:
    """The tiers below the pool, where there are any."""
    if not host_blocks:
        return {}
    host = format_bytes(cache.host_kv_bytes or DISK_STAGING_BYTES)
    told = f"host {host} = {host_blocks:,} blocks"
    if cache.disk_kv_path is not None:
        told += f", disk {format_bytes(cache.disk_room)} at {cache.disk_kv_path}"
    return {"KV tiers": told}


def box(told: dict[str, str]) -> str:
    """The facts in a box, and below it the request, which must stay in one piece."""
    title = f"Quire {__version__}"
    lines = [f"{name:<10}{value}" for name, value in told.items() if name != "try"]
    width = max(map(len, [title, *lines]))
    return "\n".join(
        [
            f"+- {title} {'-' * (width - len(title) - 1)}+",
            *(f"| {line:<{width}} |" for line in lines),
            f"+{'-' * (width + 2)}+",
            told["try"],
        ]
    )


def first_request(model: str, url: str, *, with_key: bool) -> str:
    """A curl line; a key stays in the variable that holds it."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
    }
    key = ' -H "Authorization: Bearer $QUIRE_API_KEY"' if with_key else ""
    return (
        f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{key} "
        f"-d '{json.dumps(body)}'"
    )
