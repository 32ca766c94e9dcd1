"""`quire plan`: its figures are those of the pool, and it asks for nothing but headers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from configs.settings import Settings, SettingsError
from engine import planner
from models import registry
from paged_cache.layout import KVFormat, most_blocks
from paged_cache.storage import KVStorage
from server import plan_plot
from server.cli import main

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
TINY = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 6,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
}
MIXED = TINY | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}


def model(raw: dict[str, Any]) -> planner.Model:
    config = registry.parse_config(raw)
    return planner.Model("tiny", config, planner.parameters(config), "config")


def folder(path: Path, raw: dict[str, Any], weights: dict[str, torch.Tensor] | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    if weights is not None:
        save_file(weights, path / "model.safetensors")
    return path


def empty_weights(raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    made = registry.build(registry.parse_config(raw), torch.float32, torch.device("meta"))
    return {
        name: torch.zeros(tensor.shape, dtype=torch.bfloat16)
        for name, tensor in made.checkpoint_tensors().items()
    }


def planned(name: str, **arguments: Any) -> planner.Plan:
    arguments = {"prompt": 2000, "output": 500} | arguments
    settings = Settings.of(**arguments.pop("settings", {}))
    return planner.plan(planner.find(name), settings, **arguments)


# ---------------------------------------------------------------------- known answers


def test_gpt2_takes_35_mib_for_1000_tokens() -> None:
    cache = planned("gpt2").caches["bfloat16"]
    assert cache.bytes_per_token * 1000 == 2 * 18_432_000
    assert round(cache.bytes_per_token * 1000 / (1 << 20), 1) == 35.2


def test_96_layers_of_96_heads_take_4_gib_for_1000_tokens() -> None:
    cache = planned("gpt3-175b").caches["bfloat16"]
    assert cache.bytes_per_token * 1000 == 2 * 2_359_296_000
    assert round(cache.bytes_per_token * 1000 / GIB, 1) == 4.4


def test_llama_on_80_gib() -> None:
    plan = planned("llama-3.1-8b", memory=80 * GIB)
    assert plan.weight_bytes == 2 * 8_030_261_248
    assert plan.memory is not None
    assert plan.memory.left_for_kv == int(80 * GIB * 0.9) - plan.weight_bytes
    cache = plan.caches["bfloat16"]
    assert (cache.bytes_per_token, cache.bytes_per_block) == (128 << 10, 2 << 20)
    assert cache.blocks_per_sequence == 157
    fit = cache.fit
    assert fit is not None
    assert fit.blocks == plan.memory.left_for_kv // (2 << 20)
    assert (fit.sequences_in_memory, fit.sequences) == (fit.blocks // 157, 128)
    assert (fit.limited_by, fit.longest_sequence) == ("max_num_seqs", 131072)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("llama-2-7b", 6_738_415_616),
        ("llama-3.1-8b", 8_030_261_248),
        ("mistral-7b", 7_241_732_096),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_published_parameter_counts(name: str, parameters: int) -> None:
    assert planner.find(name).parameters == parameters


@pytest.mark.parametrize(
    "raw",
    [
        *planner.SHAPES.values(),
        TINY,
        TINY | {"architectures": ["SmolLM3ForCausalLM"]},
        TINY | {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
    ],
)
def test_arithmetic_counts_what_a_decoder_allocates(raw: dict[str, Any]) -> None:
    config = registry.parse_config(raw)
    made = registry.build(config, torch.bfloat16, torch.device("meta"))
    assert planner.parameters(config) == sum(t.numel() for t in made.checkpoint_tensors().values())


# ---------------------------------------------------------------------- the pool's arithmetic


@pytest.mark.parametrize("dtype", planner.CACHE_DTYPES)
@pytest.mark.parametrize(
    ("layers", "sliding", "heads", "kv_heads", "head_dim", "block_size"),
    [
        (1, 0, 1, 1, 64, 16),
        (2, 0, 4, 4, 64, 8),
        (3, 0, 4, 2, 128, 16),
        (12, 0, 12, 12, 64, 16),
        (28, 0, 16, 8, 128, 32),
        (5, 0, 8, 1, 80, 64),
        (4, 4, 8, 2, 96, 16),
        (6, 4, 4, 2, 64, 128),
        (7, 5, 6, 3, 256, 16),
        (26, 22, 4, 1, 256, 16),
    ],
)
def test_planned_bytes_are_allocated_bytes(
    dtype: str, layers: int, sliding: int, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    if not KVFormat(dtype).holds(head_dim):
        pytest.skip("int4 has no pages for this head size")
    config = replace(
        model(TINY).config,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layer_windows=(0,) * (layers - sliding) + (64,) * sliding,
        rope_layers=(True,) * layers,
    )
    tiny = planner.Model("tiny", config, planner.parameters(config), "config")
    settings = Settings.of(block_size=block_size, max_num_seqs=4, gpu_memory_utilization=1)
    memory = 2 * tiny.parameters + (3 << 20)
    plan = planner.plan(tiny, settings, prompt=200, output=50, memory=memory, cache_dtype=dtype)
    cache = plan.caches[dtype]
    assert cache.fit is not None
    layout = planner.layout(config, dtype, block_size, num_blocks=cache.fit.blocks)
    allocated = KVStorage(layout, torch.device("cpu")).num_bytes
    assert allocated == cache.fit.blocks * cache.bytes_per_block <= 3 << 20
    assert allocated + cache.bytes_per_block > 3 << 20


@pytest.mark.parametrize("raw", [TINY, MIXED])
def test_host_memory_holds_as_many_blocks_as_the_pages_made_there(raw: dict[str, Any]) -> None:
    num_bytes = 1_000_000
    settings = Settings.of(host_kv_bytes=num_bytes)
    tiny = model(raw)
    plan = planner.plan(tiny, settings, prompt=200, output=50)
    for dtype, cache in plan.caches.items():
        assert cache.host is not None
        layout = planner.layout(tiny.config, dtype, 16, num_blocks=cache.host.blocks)
        allocated = KVStorage(layout, torch.device("cpu")).num_bytes
        assert allocated <= num_bytes < allocated + layout.bytes_per_block
        assert cache.host.tokens == cache.host.blocks // len(layout.groups) * 16


def test_groups_of_mixed_windows() -> None:
    plan = planner.plan(model(MIXED), Settings.of(), prompt=900, output=100, memory=GIB)
    cache = plan.caches["bfloat16"]
    full, sliding = cache.groups
    assert (full.window, full.layers, full.blocks_per_sequence) == (0, 2, 63)
    # 65 tokens are 5 blocks, and one is partly behind the window; 4 layers are two tables of 2.
    assert (sliding.window, sliding.layers, sliding.groups) == (64, 4, 2)
    assert sliding.blocks_per_sequence == 2 * 6
    assert cache.blocks_per_sequence == 63 + 12
    assert full.bytes_per_token + sliding.bytes_per_token == cache.bytes_per_token
    assert sliding.bytes_per_token == 2 * full.bytes_per_token


def test_a_prompt_that_is_being_read_takes_room_behind_its_window() -> None:
    tiny = model(MIXED)
    layout = planner.layout(tiny.config, "bfloat16", 16)
    reading = most_blocks(layout.windows, 16, 1000, chunk=256)
    settled = most_blocks(layout.windows, 16, 1000, chunk=1)
    settings = Settings.of(max_num_batched_tokens=256, gpu_memory_utilization=1)
    for blocks, sequences in [
        (reading - 1, 0),
        (reading, 1),
        (reading + settled - 1, 1),
        (reading + settled, 2),
    ]:
        memory = 2 * tiny.parameters + blocks * layout.bytes_per_block
        fit = (
            planner.plan(tiny, settings, prompt=900, output=100, memory=memory)
            .caches["bfloat16"]
            .fit
        )
        assert fit is not None
        assert (fit.sequences, fit.limited_by) == (sequences, "memory")


def test_small_models_take_no_more_than_their_slots_can_use() -> None:
    fit = planned("gpt2", memory=80 * GIB).caches["bfloat16"].fit
    assert fit is not None
    assert fit.pool_blocks == 128 * 1024 // 16 < fit.blocks


def test_dtype_of_the_weights() -> None:
    assert planned("gpt2").dtype == "bfloat16"
    half = planned("gpt2", settings={"dtype": "float32"})
    assert (half.dtype, half.cache_dtype) == ("float32", "float32")
    assert half.weight_bytes == 4 * 124_439_808
    assert planned("gpt2", cache_dtype="fp16").cache_dtype == "float16"


# ---------------------------------------------------------------------- where models come from


def test_a_folder_without_weights_is_counted_by_arithmetic(tmp_path: Path) -> None:
    found = planner.find(str(folder(tmp_path, TINY)))
    assert (found.parameters, found.counted_from) == (planner.parameters(found.config), "config")


def test_headers_count_what_is_loaded(tmp_path: Path) -> None:
    raw = planner.SHAPES["gpt2"] | {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 100}
    weights = empty_weights(raw)
    count = sum(tensor.numel() for tensor in weights.values())
    weights["transformer.h.0.attn.bias"] = torch.zeros(1, 1, 64, 64)
    weights["lm_head.weight"] = torch.zeros(100, 32)  # tied: a copy
    found = planner.find(str(folder(tmp_path, raw, weights)))
    assert (found.parameters, found.counted_from) == (count, "headers")
    assert count == planner.parameters(found.config)


class FakeHub(BaseHTTPRequestHandler):
    """Serves one repository, with ranges, and counts what it sends."""

    files: dict[str, bytes]
    sent: dict[str, int]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if name not in self.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, span = self.files[name], re.match(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if span:
            data = data[int(span[1]) : int(span[2]) + 1]
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{name}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
            self.sent[name] = self.sent.get(name, 0) + len(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[FakeHub]]]:
    handler = type("Handler", (FakeHub,), {"files": {}, "sent": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}", handler
        made.shutdown()


def quire(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own, which fails if it imports torch."""
    script = (
        "import sys; sys.modules['torch'] = None; from server.cli import main; sys.exit(main())"
    )
    return subprocess.run(
        [sys.executable, "-c", script, "plan", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environ,
    )


def test_only_headers_come_from_the_hub(hub: tuple[str, type[FakeHub]], tmp_path: Path) -> None:
    url, handler = hub
    weights = empty_weights(TINY | {"vocab_size": 50_000})
    made = folder(tmp_path / "made", TINY | {"vocab_size": 50_000}, weights)
    handler.files |= {path.name: path.read_bytes() for path in made.iterdir()}
    environ = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
    done = quire("org/tiny", "--json", **environ)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["model"]
    assert found["counted_from"] == "headers"
    assert found["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert handler.sent["model.safetensors"] <= 100_001 < len(handler.files["model.safetensors"])


# ---------------------------------------------------------------------- the command


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-3.1-8b", "--memory", "80GiB"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for line in (
        r"weights +15 GiB  8,030,261,248 parameters as bfloat16",
        r"KV cache .* bfloat16 \*",
        r"per token +128 KiB +65 KiB +65 KiB +38 KiB",
        r"blocks that fit +29,205 +57,512 +57,512 +98,377",
        r"limited by +max_num_seqs +max_num_seqs",
        r"128 sequences at once of 2,000 \+ 500 tokens \(157 blocks\) each",
    ):
        assert re.search(line, text), line


def test_groups_are_shown_where_windows_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(folder(tmp_path, MIXED)), "--prompt", "900", "--output", "100"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^full +2 +1 ", text, re.M)
    assert re.search(r"^window 64 +4 +2 ", text, re.M)


def test_json_has_raw_integers_and_no_torch() -> None:
    done = quire("gpt2", "--json", "--memory", "1GiB", "--prompt", "900", "--output", "100")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["weight_bytes"] == 248_879_616
    assert plan["caches"]["bfloat16"]["bytes_per_token"] == 36_864
    assert set(plan["caches"]) == {"bfloat16", "fp8_e4m3", "int8", "int4"}
    assert plan["warnings"] == []
    assert plan["host_kv_bytes"] is plan["caches"]["bfloat16"]["host"] is None


def test_host_memory(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "llama-3.1-8b", "--host-kv-bytes"]
    assert main([*arguments, "4GiB"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"^blocks in 4 GiB of host +2,048 ", text, re.M)
    assert re.search(r"^tokens there +32,768 ", text, re.M)
    assert main([*arguments, "4GiB", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["host_kv_bytes"] == 4 * GIB
    assert told["caches"]["bfloat16"]["host"] == {"blocks": 2048, "tokens": 32768}
    assert main([*arguments, "1MiB"]) == 0
    assert "warning: host_kv_bytes must hold at least one KV block" in capsys.readouterr().out


def test_lengths_beyond_the_context_are_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt2", "--prompt", "1000", "--output", "100"]) == 0
    assert "warning: prompt and output are 1,100 tokens" in capsys.readouterr().out
    plan = planned("llama-3.1-8b", memory=24 * GIB)
    assert "the server would offer 54," in plan.warnings[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["llama-3.1"], "unknown model llama-3.1; the nearest known name is llama-3.1-8b"),
        (["./nowhere"], "no folder at nowhere"),
        (["gpt2", "--kv-cache-dtype", "flaot16"], "the nearest is float16"),
        (["gpt2", "--dtype", "int3"], "dtype must be"),
        (["gpt2", "--block-size", "17"], "block_size must be one of 8, 16"),
        (["gpt2", "--memory", "much"], "--memory: must be bytes such as"),
        (["gpt2", "--prompt", "-3"], "--prompt: must be a count of at least 1, got -3"),
        (["gpt2", "--max-model-len", "2048"], "max_model_len must be at most the 1024 positions"),
        (["llama-3.1-8b", "--memory", "16GiB"], "is 14.4 GiB, 570.9 MiB too little"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["plan", *arguments])
    except SystemExit as stop:
        code = int(str(stop.code))
    answer = capsys.readouterr()
    assert (code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert says in answer.err


def test_an_unsupported_architecture_says_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="'T5Model' is not supported"):
        planner.find(str(folder(tmp_path, {"architectures": ["T5Model"]})))


# ---------------------------------------------------------------------- pictures


def test_variants_of_attention() -> None:
    def counts(heads: int, kv_heads: int) -> list[int]:
        config = replace(model(TINY).config, num_heads=heads, num_kv_heads=kv_heads)
        return [c.num_kv_heads for c in planner.attention_variants(config).values()]

    assert counts(32, 8) == [32, 8, 1]
    assert counts(12, 12) == [12, 3, 1]
    assert counts(32, 1) == [32, 8, 1]
    assert counts(7, 7) == [7, 1]


def test_curves_end_with_the_planned_bytes() -> None:
    plan = planned("llama-3.1-8b", settings={"max_model_len": 2500})
    for curves in (plan_plot.by_attention(plan), plan_plot.by_dtype(plan)):
        own = next(points for name, points in curves.items() if "this" in name or "bf" in name)
        assert own[-1] == (2500, plan.caches["bfloat16"].bytes_per_sequence)


def test_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "mistral-7b", "--memory", "80GiB", "--plot", f"{tmp_path}/out.png"]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plan", "gpt2", "--plot", f"{tmp_path}/out.nothing"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_without_matplotlib_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["plan", "gpt2", "--plot", "out.png"]) == 2
    answer = capsys.readouterr()
    assert answer.out == ""
    assert answer.err == "quire: --plot needs matplotlib: pip install matplotlib\n"
