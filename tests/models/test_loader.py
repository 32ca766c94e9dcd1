"""Checkpoints that load, and the one line that each broken one gives."""

from __future__ import annotations

import json
import logging
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels import dispatch
from models import hub, loader, registry
from models.config import CheckpointError
from tests.models import checkpoints
from tests.models.batches import Cache, run

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
PROMPT = torch.arange(3, 40)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make("llama", tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def load(folder: Path, progress=None):
    config = loader.load_config(folder)
    return loader.load_model(folder, config, dtype=torch.float32, device=CPU, progress=progress)


def logits(model) -> torch.Tensor:
    cache = Cache(model, dispatch.backend(CPU, "torch"), 16, torch.float32)
    return run(model, cache, [PROMPT], [[(0, 0, len(PROMPT))]])[0]


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def shard(folder: Path) -> list[Path]:
    """Splits the single file into three with an index; the fused projections are torn apart."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    parts: list[dict] = [{}, {}, {}]
    for i, name in enumerate(sorted(tensors)):
        parts[i % 3][name] = tensors[name]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [folder / name for name in names]


def assert_refused(folder: Path, *says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for part in says:
        assert part in message


def test_shards_equal_a_single_file(made, folder):
    expected = logits(load(made))
    shard(folder)
    assert torch.equal(logits(load(folder)), expected)


def test_a_single_file_of_any_name(made, folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert torch.equal(logits(load(folder)), logits(load(made)))


def test_names_without_the_prefix(made, folder):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_tensors(folder, strip)
    assert torch.equal(logits(load(folder)), logits(load(made)))


def test_gpt2_as_published(tmp_path, caplog):
    """Without prefix or head, and with the causal masks that old versions saved as tensors."""
    made = checkpoints.make("gpt2", tmp_path / "a")
    folder = Path(shutil.copytree(made, tmp_path / "b"))

    def publish(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(3):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8)
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    edit_tensors(folder, publish)
    assert torch.equal(logits(load(folder)), logits(load(made)))
    assert not caplog.records


def test_tied_embeddings_share_storage(tmp_path):
    folder = checkpoints.make("llama-tied", tmp_path)
    config = loader.load_config(folder)
    model = registry.build(config, torch.float32, CPU)
    assert model.head.weight is model.embed.weight
    assert "lm_head.weight" not in model.checkpoint_tensors()


def test_dtype_is_converted(folder):
    config = loader.load_config(folder)
    model = loader.load_model(folder, config, dtype=torch.bfloat16, device=CPU)
    assert model.embed.weight.dtype == model.norm.weight.dtype == torch.bfloat16
    assert model.config.dtype == "float32"


def test_progress_counts_bytes_up(folder):
    calls = []
    load(folder, lambda *call: calls.append(call))
    size = (folder / "model.safetensors").stat().st_size
    done = [call[1] for call in calls]
    assert done == sorted(done) and done[0] == 0 and done[-1] == size
    assert {(call[0], call[2]) for call in calls} == {("weights", size)}


def test_extra_tensors(folder, caplog):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["surprise.weight"] = torch.ones(4)

    edit_tensors(folder, add)
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert [r.getMessage() for r in caplog.records] == [
        f"{folder}: 1 tensors not used: surprise.weight"
    ]


def test_missing_tensors(folder):
    edit_tensors(folder, lambda t: [t.pop(n) for n in list(t) if "layers.1.mlp" in n])
    assert_refused(folder, "lacks 3 tensors of LlamaForCausalLM", "layers.1.mlp.down_proj.weight")


def test_many_missing_tensors_are_counted(folder):
    edit_tensors(folder, lambda t: [t.pop(n) for n in list(t) if "layers.1" in n])
    assert_refused(folder, "lacks 9 tensors", "input_layernorm.weight", ", ...")


def test_unexpected_shape(folder):
    edit_config(folder, intermediate_size=200)
    assert_refused(folder, "mlp.down_proj.weight has shape [128, 192]", "implies [128, 200]")


def test_quantized_tensors(folder):
    def quantize(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)

    edit_tensors(folder, quantize)
    assert_refused(folder, "model.norm.weight is torch.int8")


def test_truncated_data(folder):
    file = folder / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 1000)
    assert_refused(
        folder, f"{file} is truncated: expected {size} bytes, has {size - 1000}; download"
    )


def test_truncated_header(folder):
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(100)
    assert_refused(folder, f"{file} is truncated: expected at least ", "has 100")


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_empty_weights_file(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    assert_refused(folder, f"is truncated: expected a header, has {len(content)} bytes")


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n",
        struct.pack("<Q", 4) + b"{no}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 34) + b'{"a": {"data_offsets": [0, "end"]}}',
    ],
)
def test_not_safetensors(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    assert_refused(folder, "model.safetensors is not a safetensors file")


def test_truncated_shard(folder):
    file = shard(folder)[1]
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    assert_refused(folder, f"{file} is truncated")


def test_missing_shard(folder):
    shard(folder)[2].unlink()
    assert_refused(folder, "lacks 1 of 3 shards", "model-00003-of-00003.safetensors")


def test_index_without_a_map(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert_refused(folder, "has no weight_map")


def test_pytorch_weights_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert_refused(folder, "pytorch_model.bin", "save_pretrained(new_folder)")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "has no *.safetensors files")


def test_several_files_without_an_index(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert_refused(folder, "3 safetensors files and no model.safetensors.index.json")


def test_adapter(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    assert_refused(folder, "holds an adapter")


def test_empty_folder(tmp_path):
    assert_refused(tmp_path, f"{tmp_path} is empty")


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert_refused(folder, f"{folder} is not a checkpoint: it has no config.json")


@pytest.mark.parametrize(
    ("content", "says"), [("{", "cannot be read"), ("[]", "not a JSON object")]
)
def test_malformed_config(folder, content, says):
    (folder / "config.json").write_text(content)
    assert_refused(folder, str(folder / "config.json"), says)


def test_refusals_of_the_config_name_the_folder(folder):
    edit_config(folder, architectures=["T5ForConditionalGeneration"])
    assert_refused(folder, f"{folder}: architecture 'T5ForConditionalGeneration'")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_random_init(kind, tmp_path):
    config = loader.load_config(checkpoints.make(kind, tmp_path))
    first, same, other = (
        logits(loader.random_init(config, torch.float32, CPU, seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.isfinite().all() and first.std() > 0.1


def test_resolve_folders(folder, tmp_path):
    assert loader.resolve(str(folder)) == folder
    for model in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        with pytest.raises(CheckpointError, match="no folder at "):
            loader.resolve(model)
    with pytest.raises(CheckpointError, match="is a file"):
        loader.resolve(str(folder / "config.json"))


def test_resolve_passes_hub_ids_on(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "download", lambda *call: (tmp_path, call))
    assert loader.resolve("org/name", "v1", None) == (tmp_path, ("org/name", "v1", None))


def hub_response(status: int):
    import httpx

    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/org/name"))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (("GatedRepoError", 403), "org/name is gated: accept its terms at https://huggingface.co"),
        (("RepositoryNotFoundError", 404), "not a folder here and not at https://huggingface.co"),
        (("RevisionNotFoundError", 404), "has no revision 'v9'"),
        (("LocalEntryNotFoundError", None), "is not in the local cache and https://huggingface.co"),
        (("HfHubHTTPError", 500), "download of https://huggingface.co/org/name failed: no luck"),
        (("HFValidationError", None), "'org/name' is neither a folder nor a Hub model id"),
    ],
)
def test_hub_errors(monkeypatch, error, says):
    import huggingface_hub

    name, status = error
    extra = {} if status is None else {"response": hub_response(status)}

    def fail(*_, **__):
        raise getattr(huggingface_hub.errors, name)("no luck\nand more", **extra)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as caught:
        hub.download("org/name", "v9", None)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_hub_download_reports_bytes(monkeypatch, tmp_path):
    import huggingface_hub

    def download(model, *, revision, allow_patterns, ignore_patterns, tqdm_class):
        files = tqdm_class(total=2, desc="Fetching", unit="it")
        received = tqdm_class(total=0, unit="B", unit_scale=True, name="x")
        written = tqdm_class(total=0, unit="B", unit_scale=True)
        for size in (100, 50):
            received.total += size
            written.total += size
            received.update(size)
            written.update(size)
            files.update()
        return str(tmp_path)

    calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.download("org/name", None, lambda *call: calls.append(call)) == tmp_path
    assert calls[0] == ("download", 100.0, 100.0, "org/name")
    assert calls[-1] == ("download", 150.0, 150.0, "org/name")


def test_resolve_dtype(made, monkeypatch):
    config = loader.load_config(made)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert loader.resolve_dtype("auto", config, CPU) == torch.bfloat16
    assert loader.resolve_dtype("fp32", config, CPU) == torch.float32
    with pytest.raises(ValueError, match="not one of auto, float32"):
        loader.resolve_dtype("int8", config, CPU)
    with pytest.raises(ValueError, match="not supported on CPUs"):
        loader.resolve_dtype("float16", config, CPU)


def test_imports_stay_light():
    code = (
        "import sys, models.loader, models.registry;"
        "heavy = {'transformers', 'huggingface_hub', 'httpx', 'httpx2', 'aiohttp', 'numba'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
