"""What scrapes cost the HTTP process of a running server, in CPU time:

python -m benchmarks.scrape --url http://127.0.0.1:8000 --pid PID --rate 20
"""

from __future__ import annotations

import argparse
import statistics
import time

import httpx


def share(client: httpx.Client, pid: int, rate: float, seconds: float) -> float:
    """Percent of a core that the process used while it was scraped `rate` times a second."""
    before, began = _cpu_seconds(pid), time.monotonic()
    scrapes = 0
    while (passed := time.monotonic() - began) < seconds:
        if rate:
            client.get("/metrics").raise_for_status()
            scrapes += 1
        due = scrapes / rate if rate else seconds
        time.sleep(max(due - passed, 0))
    return 100 * (_cpu_seconds(pid) - before) / (time.monotonic() - began)


def _cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, to the nanosecond: /proc/PID/stat counts in 10 ms."""
    return time.clock_gettime((~pid << 3) | 2)  # Linux's name of that clock


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=int, required=True, help="the server's HTTP process")
    parser.add_argument("--rate", type=float, default=20, help="scrapes a second")
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    idle, scraped = [], []
    with httpx.Client(base_url=args.url) as client:
        for _ in range(args.rounds):
            idle.append(share(client, args.pid, 0, args.seconds))
            scraped.append(share(client, args.pid, args.rate, args.seconds))
    above = [busy - quiet for quiet, busy in zip(idle, scraped, strict=True)]
    print(f"idle: {statistics.median(idle):.2f} % of a core")
    print(f"{args.rate:g} scrapes/s: {statistics.median(scraped):.2f} %")
    print(f"above idle: {statistics.median(above):.2f} % ({min(above):.2f} to {max(above):.2f})")


if __name__ == "__main__":
    main()
