"""What is read off the engine's newest snapshot when somebody scrapes."""

from __future__ import annotations

from dataclasses import dataclass

from engine.protocol import EngineInfo, EngineStats
from server.metrics.exposition import Registry


@dataclass(frozen=True, slots=True)
class EngineState:
    """The engine at one moment.

    Attributes:
        last_step: end of the newest step, in seconds since 1970; 0 before there was one.
        stalled: it has work and makes no step.
    """

    stats: EngineStats
    last_step: float
    stalled: bool

    @property
    def usage(self) -> float:
        """Share of the KV blocks in use, 0 to 1."""
        return self.stats.blocks_used / self.stats.blocks_total if self.stats.blocks_total else 0.0

    @property
    def blocks_free(self) -> int:
        """Blocks that hold nothing to be found again."""
        return self.stats.blocks_total - self.stats.blocks_used - self.stats.blocks_cached


def read_engine(registry: Registry[EngineState], info: EngineInfo) -> None:
    """Registers the engine's gauges and counters."""
    read = registry.read
    read(
        "gauge",
        "vllm:num_requests_running",
        "Sequences that the engine computes.",
        lambda state: state.stats.running,
    )
    read(
        "gauge",
        "vllm:num_requests_waiting",
        "Sequences that wait for their first step, or for one after a preemption.",
        lambda state: state.stats.waiting,
    )
    waiting = "Waiting sequences: for room (capacity), or held back on purpose (deferred)."
    read(
        "gauge",
        "vllm:num_requests_waiting_by_reason",
        waiting,
        lambda state: state.stats.waiting - state.stats.waiting_deferred,
        reason="capacity",
    )
    read(
        "gauge",
        "vllm:num_requests_waiting_by_reason",
        waiting,
        lambda state: state.stats.waiting_deferred,
        reason="deferred",
    )
    read(
        "gauge",
        "vllm:kv_cache_usage_perc",
        "Share of the KV blocks in use, 0 to 1.",
        lambda state: state.usage,
    )
    registry.constant(
        "vllm:cache_config_info",
        "How the KV cache is set up.",
        1,
        block_size=str(info.block_size),
        num_gpu_blocks=str(info.num_blocks),
        num_cpu_blocks=str(info.num_host_blocks),
        cache_dtype=info.kv_cache_dtype,
        enable_prefix_caching=str(info.prefix_caching),
    )
    registry.constant(
        "quire:model_info",
        "In which numbers the model computes, and its weights are kept if they are quantized.",
        1,
        dtype=info.dtype,
        quantization=info.quantization,
    )
    blocks = "KV blocks by what they are."
    read(
        "gauge",
        "quire:kv_blocks",
        blocks,
        lambda state: state.blocks_free,
        state="free",
    )
    read(
        "gauge",
        "quire:kv_blocks",
        blocks,
        lambda state: state.stats.blocks_cached,
        state="cached",
    )
    read(
        "gauge",
        "quire:kv_blocks",
        blocks,
        lambda state: state.stats.blocks_used,
        state="active",
    )
    host = "KV blocks of the tier in host memory."
    read(
        "gauge",
        "quire:kv_host_blocks",
        host,
        lambda state: state.stats.host_blocks_total - state.stats.host_blocks_used,
        state="free",
    )
    read(
        "gauge",
        "quire:kv_host_blocks",
        host,
        lambda state: state.stats.host_blocks_used,
        state="used",
    )
    read(
        "gauge",
        "quire:kv_disk_blocks",
        "KV blocks of the tier on disk.",
        lambda state: state.stats.disk_blocks,
    )
    read(
        "gauge",
        "quire:kv_disk_bytes",
        "Bytes of the files of the tier on disk.",
        lambda state: state.stats.disk_bytes,
    )
    read(
        "gauge",
        "quire:kv_fragmentation_ratio",
        "Share of the places in blocks in use that hold no token, 0 to 1.",
        lambda state: state.stats.fragmentation,
    )
    read(
        "gauge",
        "quire:engine_last_step_timestamp_seconds",
        "End of the newest step, since 1970.",
        lambda state: state.last_step,
    )
    read(
        "gauge",
        "quire:engine_stalled",
        "1 while the engine has work and makes no step.",
        lambda state: state.stalled,
    )
    read(
        "counter",
        "vllm:prefix_cache_queries_total",
        "Prompt tokens looked up.",
        lambda state: state.stats.prefix_queries,
    )
    read(
        "counter",
        "vllm:prefix_cache_hits_total",
        "Prompt tokens found cached.",
        lambda state: state.stats.prefix_hits,
    )
    read(
        "counter",
        "quire:prefix_cache_recovered_total",
        "Tokens found cached again after a preemption.",
        lambda state: state.stats.prefix_recovered,
    )
    read(
        "counter",
        "vllm:num_preemptions_total",
        "Sequences put back to make room.",
        lambda state: state.stats.preemptions,
    )
    kinds = "Sequences put back to make room, by what became of their blocks."
    read(
        "counter",
        "quire:preemptions_total",
        kinds,
        lambda state: state.stats.preemptions_swap,
        mode="swap",
    )
    read(
        "counter",
        "quire:preemptions_total",
        kinds,
        lambda state: state.stats.preemptions_recompute,
        mode="recompute",
    )
    read(
        "counter",
        "quire:kv_host_hits_total",
        "Tokens whose blocks came back from host memory.",
        lambda state: state.stats.host_hits,
    )
    read(
        "counter",
        "quire:kv_disk_hits_total",
        "Tokens whose blocks came back from disk.",
        lambda state: state.stats.disk_hits,
    )
    read(
        "counter",
        "quire:kv_disk_errors_total",
        "Blocks that could not be written to disk, or read and used.",
        lambda state: state.stats.disk_errors,
    )
    read(
        "counter",
        "quire:kv_blocks_evicted_total",
        "Cached blocks given up for others.",
        lambda state: state.stats.blocks_evicted,
    )
    read(
        "counter",
        "quire:jit_compiles_after_ready_total",
        "Kernels compiled since the engine was ready.",
        lambda state: state.stats.jit_compiles,
    )
