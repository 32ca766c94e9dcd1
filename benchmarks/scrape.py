"""What scrapes cost the HTTP process of a running server, in CPU time:

python -m benchmarks.scrape --url http://127.0.0.1:8000 --rate 20
"""

from __future__ import annotations

import argparse
import re
import statistics
import time

import httpx


def share(client: httpx.Client, rate: float, seconds: float) -> float:
    """Percent of a core that the process used while it was scraped `rate` times a second."""
    before, began = _cpu_seconds(client), time.monotonic()
    scrapes = 0
    while (passed := time.monotonic() - began) < seconds:
        if rate:
            client.get("/metrics").raise_for_status()
            scrapes += 1
        due = scrapes / rate if rate else seconds
        time.sleep(max(due - passed, 0))
    passed = time.monotonic() - began
    time.sleep(0.15)  # a text is good for 0.1 s
    return 100 * (_cpu_seconds(client) - before) / passed


def _cpu_seconds(client: httpx.Client) -> float:
    found = re.search(
        r"^process_cpu_seconds_total (\S+)", client.get("/metrics").text, re.MULTILINE
    )
    assert found, "no process_cpu_seconds_total"
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--rate", type=float, default=20, help="scrapes a second")
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    idle, scraped = [], []
    with httpx.Client(base_url=args.url) as client:
        for _ in range(args.rounds):
            idle.append(share(client, 0, args.seconds))
            scraped.append(share(client, args.rate, args.seconds))
    print(f"idle: {statistics.median(idle):.2f} % of a core")
    print(
        f"{args.rate:g} scrapes/s: {statistics.median(scraped):.2f} %, least {min(scraped):.2f} %"
    )


if __name__ == "__main__":
    main()
