"""`quire trace`: the last steps of a running server as a file for Perfetto."""

from __future__ import annotations

import sys

import httpx


def run(url: str, api_key: str | None, path: str) -> int:
    """Fetches and writes; the exit code."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    source = f"{url.rstrip('/')}/debug/steps?format=perfetto"
    try:
        with httpx.stream("GET", source, headers=headers, timeout=60) as answer:
            if answer.is_error:
                answer.read()
                print(f"quire: {source}: {answer.status_code} {answer.text}", file=sys.stderr)
                return 1
            with open(path, "wb") as out:
                for data in answer.iter_bytes():
                    out.write(data)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        print(f"quire: {url} does not answer: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"quire: {path} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{path}: open it at https://ui.perfetto.dev")
    return 0
