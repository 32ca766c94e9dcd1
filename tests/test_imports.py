"""The floors of docs/design.md: imports go down only, and the heavy ones stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ALLOWED: dict[str, set[str]] = {
    "kernels": {"kernels"},
    "configs": {"configs"},
    "paged_cache": {"paged_cache", "configs"},
    "scheduler": {"scheduler", "paged_cache", "configs"},
    "models": {"models", "kernels"},
    "engine": {"engine", "models", "scheduler", "paged_cache", "kernels", "configs"},
    "server": {"server", "engine.client", "engine.protocol", "scheduler.request", "configs"},
}
ALLOWED_TO_ONE_FILE = {
    "paged_cache/storage.py": {"kernels"},
    "paged_cache/host_pages.py": {"kernels"},
    "server/cli.py": {"benchmarks.serve"},  # the command `quire bench`
    "server/plan_command.py": {"engine.planner"},  # the command `quire plan`, which needs no torch
    "server/plan_plot.py": {"engine.planner"},
}
WITHOUT_TORCH = {"server", "scheduler", "paged_cache", "configs"}
TORCH_EXCEPTIONS = {"paged_cache/storage.py", "paged_cache/host_pages.py"}
OURS = {*ALLOWED, "benchmarks", "tests"}


def files(folder: str) -> Iterator[str]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield path.relative_to(ROOT).as_posix()


def imported(file: str) -> Iterator[str]:
    """Dotted names that a file imports anywhere in it; `from a import b` counts as `a.b`."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; folders go by their own names"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def is_in(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_down_only(folder: str) -> None:
    for file in files(folder):
        allowed = ALLOWED[folder] | ALLOWED_TO_ONE_FILE.get(file, set())
        for name in imported(file):
            assert not is_in(name, OURS) or is_in(name, allowed), f"{file} imports {name}"


@pytest.mark.parametrize("folder", sorted(WITHOUT_TORCH))
def test_torch_stays_where_the_tensors_are(folder: str) -> None:
    for file in files(folder):
        if file not in TORCH_EXCEPTIONS:
            heavy = [name for name in imported(file) if is_in(name, {"torch", "triton", "numba"})]
            assert not heavy, f"{file} imports {heavy}"


@pytest.mark.parametrize("folder", ALLOWED)
def test_transformers_is_for_tests_only(folder: str) -> None:
    """It takes seconds to import; a server never waits for it."""
    for file in files(folder):
        assert not any(is_in(name, {"transformers"}) for name in imported(file)), file


def test_kernels_is_no_regular_package() -> None:
    """`transformers` runs a regular package of this name in place of the one it looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("models.registry", {"torch"}),
        ("engine.planner", {"torch", "huggingface_hub", "matplotlib"}),
        ("engine.client, engine.protocol", {"torch", "fastapi", "uvicorn"}),
        ("server.cli", {"torch", "fastapi", "uvicorn", "httpx", "engine", "tqdm"}),
        ("server.app", {"torch", "numba", "transformers"}),
        ("server.launch", {"torch", "numba", "transformers"}),
    ],
)
def test_importing_is_light(modules: str, absent: set[str]) -> None:
    script = f"import sys, {modules}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert not absent & set(done.stdout.split())
