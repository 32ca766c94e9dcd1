"""What is told before loading is what loading makes."""

from pathlib import Path

import pytest

from configs.settings import Settings
from engine.build import StartError, build, check
from models import shards
from tests.models import checkpoints


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("pool", [{}, {"num_gpu_blocks_override": 9}], ids=["ample", "short"])
def test_the_check_tells_what_is_built(tmp_path: Path, kind: str, pool: dict[str, int]):
    path = checkpoints.make(kind, tmp_path)
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": "8MiB"}
    settings = Settings.of(model=str(path), dtype="float32", cpu_threads=1, **limits | pool)
    told = check(settings)
    assert told == build(settings).info
    assert (told.max_model_len < checkpoints.MAX_POSITIONS) == bool(pool)


def test_it_reads_no_weights(tmp_path: Path):
    path = checkpoints.make("llama", tmp_path)
    for file in shards.weight_files(path):
        file.unlink()
    assert check(Settings.of(model=str(path), dtype="float32")).architecture == "LlamaForCausalLM"


def test_what_does_not_fit_is_told(tmp_path: Path):
    settings = Settings.of(model=str(checkpoints.make("llama", tmp_path)), kv_cache_memory_bytes=9)
    with pytest.raises(StartError, match="one KV block takes"):
        check(settings)
