"""Measures Quire and other servers in turn: `make bench-compare`, `python -m benchmarks.compare`.

    python -m benchmarks.peers.install      # once: an environment for each peer below .peers/
    python -m benchmarks.compare --rounds 5 --out comparison.json

Same machine, same checkpoint, same client, one after another within each round. What was measured
is kept in the file of --out: a run that was cut off goes on from there, more rounds add to it.
docs/benchmarks.md tells what each peer is and what cannot be compared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.catalogue import peers
from benchmarks.peers.comparison import Comparison, plain, tell
from benchmarks.peers.home import home
from benchmarks.peers.peer import Peer
from benchmarks.peers.record import Record
from benchmarks.peers.tables import tables
from benchmarks.peers.task import TASKS


def main(argv: Sequence[str] | None = None) -> int:
    for ended_by in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ended_by, signal.default_int_handler)  # the peers are ended in any case
    known = {peer.name: peer for peer in peers()}
    given = _arguments(argv, list(known))
    tasks = [task for task in TASKS if task.name in given.workloads]
    tasks = [task.quick() for task in tasks] if given.quick else tasks
    folder = home()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        record = Record.read(
            given.out or folder / ("quick.json" if given.quick else "comparison.json")
        )
        for task in tasks:
            record.settle(task.name, plain(task))
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    record.machine = machine()
    record.failures = []  # who failed in another run gets another try
    there = present([known[name] for name in known if name in given.peers])
    rounds = 1 if given.quick else given.rounds
    comparison = Comparison(there, tasks, record, folder, rounds=rounds, limit_s=given.limit)
    left = len(list(comparison.left()))
    tell(f"{left} rounds to measure, about {comparison.seconds() / 60:.0f} minutes; {record.file}")
    try:
        comparison.run()
    except KeyboardInterrupt:
        return 130
    print(json.dumps(record.content(), indent=1) if given.json else tables(record))
    return 0


def present(wanted: Sequence[Peer]) -> list[Peer]:
    """Those that can be measured here; a line for each other one."""
    absent = {peer.name: peer.absent() for peer in wanted}
    for name, why in absent.items():
        if why:
            tell(f"without {name}: {why}")
    return [peer for peer in wanted if absent[peer.name] is None]


def machine() -> dict[str, str]:
    model = "unknown"
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        names = [line for line in cpus.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "cores": str(os.cpu_count()),
        "CPU": model,
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def _arguments(argv: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare", description="Measure Quire and other servers in turn.", allow_abbrev=False
    )
    workloads = [task.name for task in TASKS]
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"of {', '.join(names)} (default: all)",
    )
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=workloads,
        default=workloads,
        metavar="NAME",
        help=f"of {', '.join(workloads)} (default: all)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each workload (default 5)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where results are kept (default: comparison.json beside the peers)",
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=180,
        metavar="SECONDS",
        help="a peer that takes longer for a round is given up (default 180)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one short round of everything, to see that it works"
    )
    parser.add_argument("--json", action="store_true", help="JSON in place of the tables")
    given = parser.parse_args(argv)
    if given.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {given.rounds}")
    return given


if __name__ == "__main__":
    raise SystemExit(main())
