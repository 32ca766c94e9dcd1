"""The composition root: settings in, a running engine out. Nothing else reads the whole tree."""

from __future__ import annotations

import bisect
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from configs.settings import (
    CPU_KV_CACHE_BYTES,
    DISK_STAGING_BYTES,
    CacheSettings,
    Settings,
    format_bytes,
)
from engine import planner
from engine.grammar import GrammarCache, GrammarCompiler
from engine.grammar_masks import GrammarMasks
from engine.graphs import CudaCapture, batch_sizes
from engine.jit_compiles import JitCompiles
from engine.kv_disk import DiskFlush, open_disk
from engine.loop import EngineLoop
from engine.memory import available_bytes, available_host_bytes
from engine.protocol import COMMON_LENGTH, EngineInfo
from engine.runner import Runner
from engine.step_trace import StepTrace
from kernels import dispatch
from models import loader
from models.config import CheckpointError, ModelConfig
from models.decoder import CausalLM
from paged_cache.disk_tier import DiskTier, DiskTierError
from paged_cache.host_pages import STAGED_BYTES, HostPages
from paged_cache.host_tier import HostTier
from paged_cache.layout import KVFormat, KVLayout, group_layers, most_blocks
from paged_cache.manager import KVCacheManager
from paged_cache.pool import BlockPool
from scheduler.fairness import FairShares
from scheduler.pace import Pace
from scheduler.plan import Admitted, ScheduledSeq, StepPlan
from scheduler.preemption import Preemption, PreemptionMode
from scheduler.request import SamplingParams
from scheduler.scheduler import Scheduler

logger = logging.getLogger("quire.engine")

# The largest step is measured with what takes the most memory per sampled row.
COSTLY = SamplingParams(top_p=0.9, repetition_penalty=1.1, presence_penalty=1.0, logprobs=20)


class StartError(Exception):
    """The engine cannot start as it is set up; the message is one line that says what to change."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What was computed from settings, model and memory."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


def build(settings: Settings, report: loader.Progress = loader.quiet) -> EngineLoop:
    """Loads the model, plans the memory, compiles the kernels.

    Raises:
        StartError: something that the operator can change stands in the way.
    """
    device = _device(settings.model.device)
    _set_threads(settings.model.cpu_threads)
    try:
        path = loader.resolve(settings.model.model, settings.model.revision, report)
        config = loader.load_config(path)
        dtype = loader.resolve_dtype(settings.model.dtype, config, device)
        _require_weights_fit(weight_bytes(config, dtype), dtype, device)
        model = loader.load_model(
            path,
            config,
            dtype=dtype,
            device=device,
            quantization=settings.model.quantization,
            progress=report,
        )
    except (CheckpointError, ValueError) as error:
        raise StartError(str(error)) from None
    return assemble(model, settings, device, path, report)


def check(settings: Settings) -> EngineInfo:
    """What `build` would make of the settings; loads and downloads no weights.

    On a GPU the pool is an upper bound: what a step needs beside it is only known once one has run.

    Raises:
        StartError: as `build` would, as far as it can be known before.
    """
    device = _device(settings.model.device)
    try:
        path = loader.resolve_config(settings.model.model, settings.model.revision)
        config = loader.load_config(path)
        dtype = loader.resolve_dtype(settings.model.dtype, config, device)
    except (CheckpointError, ValueError) as error:
        raise StartError(str(error)) from None
    _require_weights_fit(weight_bytes(config, dtype), dtype, device)
    weights = weight_bytes(config, dtype, settings.model.quantization)

    def gpu_pool(layout: KVLayout, limits: Limits) -> int:
        free, total = torch.cuda.mem_get_info(device)
        return int(total * settings.cache.gpu_memory_utilization) - (total - free) - weights

    format = _kv_format(settings.cache.kv_cache_dtype, dtype, config.head_dim)
    layout, limits, host_blocks = _plan_memory(settings, config, format, device, gpu_pool, weights)
    return _info(
        path,
        config,
        dtype,
        layout,
        limits,
        device,
        host_blocks,
        settings,
    )


def assemble(
    model: CausalLM,
    settings: Settings,
    device: torch.device,
    path: Path,
    report: loader.Progress = loader.quiet,
) -> EngineLoop:
    """Everything that follows once there is a model."""
    config, dtype = model.config, model.embed.weight.dtype
    graphs = device.type == "cuda" and not settings.model.enforce_eager
    backend = dispatch.backend(device)
    format = _kv_format(settings.cache.kv_cache_dtype, dtype, model.head_dim)
    report("kernels", 0, 1, "compiling or loading from the cache")
    for window in sorted(set(model.layer_windows)):
        dispatch.warm_up(
            backend,
            device=device,
            dtype=dtype,
            heads=config.num_heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            block_size=settings.cache.block_size,
            window=window,
            softcap=config.attention_softcap,
            kv_format=format.dtype if format.quantized else None,
        )
    report("kernels", 1, 1, backend.name)
    report("memory", 0, 1, "planning the KV pool")
    eos = list(config.eos_token_ids)
    grammars = GrammarCache(GrammarCompiler(path, config.vocab_size, eos))
    masks = GrammarMasks(grammars, config.vocab_size)

    def gpu_pool(layout: KVLayout, limits: Limits) -> int:
        share = settings.cache.gpu_memory_utilization
        return _free_after_profile(model, layout, limits, masks, share, device, graphs)

    layout, limits, host_blocks = _plan_memory(settings, config, format, device, gpu_pool)
    try:
        disk = open_disk(settings.cache, path, _computed_by(backend, dtype, settings), layout)
    except DiskTierError as error:
        raise StartError(str(error)) from None
    runner = _runner(model, layout, backend, limits, masks, device, host_blocks, disk)
    report("memory", 1, 1, f"{layout.num_blocks} KV blocks of {layout.block_size} tokens")
    report("warm-up", 0, 1, "first steps")
    _warm_up(runner, limits)
    report("warm-up", 1, 1, "first steps")
    if graphs:
        sizes = batch_sizes(limits.max_num_seqs)
        report("graphs", 0, 1, f"capturing decode steps of {len(sizes)} sizes")
        runner.capture_decodes(CudaCapture(device), sizes)
        report("graphs", 1, 1, f"decode steps of up to {sizes[-1]} sequences")
    keep = settings.observability.trace_steps
    trace = StepTrace(keep, limits.max_num_seqs) if keep else None
    prefix_cache = settings.cache.enable_prefix_caching
    cache = KVCacheManager(
        BlockPool(layout.num_blocks),
        layout.block_size,
        layout.windows,
        prefix_cache=prefix_cache,
        isolate_tenants=settings.cache.isolate_prefix_cache,
        host=HostTier(host_blocks, keep=prefix_cache),
        disk=disk,
        hash_key=disk.hash_key if disk else None,
    )
    scheduler = Scheduler(
        cache,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        eos_token_ids=frozenset(config.eos_token_ids),
        watermark=math.ceil(settings.scheduling.admission_watermark * layout.num_blocks),
        reserve=settings.scheduling.admission == "reserve",
        shares=FairShares(settings.scheduling.weights),
        journal=trace,
        preemption=_preemption(settings.scheduling.preemption, layout, runner.host),
        pace=Pace(settings.scheduling.prefill_stretch),
    )
    info = _info(path, config, dtype, layout, limits, device, host_blocks, settings)
    return EngineLoop(
        scheduler,
        runner,
        info,
        trace,
        grammars=grammars,
        jit_compiles=JitCompiles().watch(),
        overlap=_overlaps(settings.scheduling.async_scheduling, device),
        at_end=DiskFlush(cache, runner.host, disk) if runner.host and disk else None,
    )


def _overlaps(wanted: str, device: torch.device) -> bool:
    return wanted == "on" or (wanted == "auto" and device.type == "cuda")


def _preemption(mode: PreemptionMode, layout: KVLayout, host: HostPages | None) -> Preemption:
    if host is None:
        return Preemption()
    host.probe()
    return Preemption(mode, layout.bytes_per_block, host.copying)


def _computed_by(backend: dispatch.Backend, dtype: torch.dtype, settings: Settings) -> str:
    """What the numbers in KV blocks depend on, beside the checkpoint."""
    quantization = settings.model.quantization
    weights = "" if quantization == "none" else f", {quantization} weights"
    return f"{backend.name}, {str(dtype).removeprefix('torch.')}{weights}"


def _info(
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    layout: KVLayout,
    limits: Limits,
    device: torch.device,
    host_blocks: int,
    settings: Settings,
) -> EngineInfo:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    length = min(COMMON_LENGTH, limits.max_model_len)
    return EngineInfo(
        model_path=str(path),
        architecture=config.architecture,
        device=name,
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=config.vocab_size,
        max_model_len=limits.max_model_len,
        eos_token_ids=list(config.eos_token_ids),
        block_size=layout.block_size,
        num_blocks=layout.num_blocks,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        kv_bytes_per_token=layout.bytes_per_token,
        weight_bytes=weight_bytes(config, dtype, settings.model.quantization),
        quantization=settings.model.quantization,
        num_host_blocks=host_blocks,
        kv_cache_dtype=layout.format.dtype,
        prefix_caching=settings.cache.enable_prefix_caching,
        kv_groups=len(layout.groups),
        concurrency=min(
            layout.sequences_in(layout.num_blocks, length, limits.max_num_batched_tokens),
            limits.max_num_seqs,
        ),
    )


# ---------------------------------------------------------------------- device and limits


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise StartError("--device cuda: no GPU can be used here; use --device cpu or auto")
    return torch.device(name)


def _set_threads(count: int | None) -> None:
    """One thread per core that this process may use, for torch and for the Numba kernels."""
    count = count or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)


def _kv_format(name: str, dtype: torch.dtype, head_dim: int) -> KVFormat:
    format = KVFormat(str(dtype).removeprefix("torch.") if name == "auto" else name)
    if not format.holds(head_dim):
        raise StartError(
            f"--kv-cache-dtype {name} needs a head size that 32 divides, the model's is "
            f"{head_dim}: use int8"
        )
    return format


def _context_length(wanted: int | None, config: ModelConfig) -> int:
    longest = config.max_position_embeddings
    if wanted is not None and wanted > longest:
        raise StartError(
            f"--max-model-len {wanted} is beyond the {longest} positions that the model was made "
            f"for; use at most {longest}"
        )
    return wanted or longest


def _fit_context(limits: Limits, layout: KVLayout, wanted: int | None) -> Limits:
    """Without a wish of the operator's, the longest context is what the pool can hold."""

    def fits(length: int) -> bool:
        chunk = limits.max_num_batched_tokens
        return most_blocks(layout.windows, layout.block_size, length, chunk) <= layout.num_blocks

    if fits(limits.max_model_len):
        return limits
    longest = (
        bisect.bisect_left(range(limits.max_model_len + 1), True, key=lambda n: not fits(n)) - 1
    )
    logger.warning(
        "the KV pool holds %d tokens of one sequence, less than the context of %d",
        longest,
        limits.max_model_len,
    )
    if longest < 2 and not wanted:
        raise StartError(
            f"{layout.num_blocks} KV blocks hold no sequence of even 2 tokens: raise "
            "--kv-cache-memory-bytes"
        )
    return limits if wanted else replace(limits, max_model_len=longest)


# ---------------------------------------------------------------------- memory


def weight_bytes(config: ModelConfig, dtype: torch.dtype, quantization: str = "none") -> int:
    """Bytes of a model's weights, from its shape alone."""
    # Not by a model on the meta device: its first `arange` imports a compiler, which takes seconds.
    count = planner.parameters(config)
    return planner.weight_bytes(config, count, dtype.itemsize, quantization)


def _require_weights_fit(needed: int, dtype: torch.dtype, device: torch.device) -> None:
    """Fails before the first byte is read rather than after minutes of loading.

    They are loaded as `dtype` whatever they are quantized to.
    """
    free = available_bytes(device)
    if needed > free:
        raise StartError(
            f"the weights take {format_bytes(needed)} as {str(dtype).removeprefix('torch.')}, but "
            f"only {format_bytes(free)} of memory are free: use a smaller model or free memory"
        )


GpuPool = Callable[[KVLayout, Limits], int]
"""Bytes that a GPU has for the pool."""


def _plan_memory(
    settings: Settings,
    config: ModelConfig,
    format: KVFormat,
    device: torch.device,
    gpu_pool: GpuPool,
    unloaded: int = 0,
) -> tuple[KVLayout, Limits, int]:
    """The layout with all its blocks, the limits that follow, and the blocks in host memory.

    `unloaded`: bytes that the weights will still take.
    """
    limits = Limits(
        _context_length(settings.model.max_model_len, config),
        settings.scheduling.max_num_seqs,
        settings.scheduling.max_num_batched_tokens,
    )
    layout = KVLayout(
        block_size=settings.cache.block_size,
        num_blocks=1,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        groups=group_layers(config.layer_windows),
        format=format,
    )
    blocks = _num_blocks(settings.cache, layout, limits, device, gpu_pool)
    layout = replace(layout, num_blocks=blocks)
    _require_pool_fits(layout.num_bytes + unloaded, device)
    limits = _fit_context(limits, layout, settings.model.max_model_len)
    return layout, limits, _host_blocks(settings.cache, layout)


def _num_blocks(
    cache: CacheSettings,
    layout: KVLayout,
    limits: Limits,
    device: torch.device,
    gpu_pool: GpuPool,
) -> int:
    """How many KV blocks the pool gets."""
    if cache.num_gpu_blocks_override is not None:
        return cache.num_gpu_blocks_override
    if cache.kv_cache_memory_bytes is not None:
        pool = cache.kv_cache_memory_bytes
    elif device.type == "cuda":
        pool = gpu_pool(layout, limits)
        if cache.host_kv_bytes is not None or cache.disk_kv_path is not None:
            pool -= 2 * STAGED_BYTES
    else:
        pool = CPU_KV_CACHE_BYTES
    per_sequence = most_blocks(
        layout.windows, layout.block_size, limits.max_model_len, limits.max_num_batched_tokens
    )
    # More blocks than every slot at full length could use would only be memory taken from others.
    blocks = min(layout.blocks_in(pool), per_sequence * limits.max_num_seqs)
    if blocks < 1:
        raise StartError(
            f"one KV block takes {format_bytes(layout.bytes_per_block)}, but the pool has "
            f"{format_bytes(max(pool, 0))}: raise --kv-cache-memory-bytes or "
            "--gpu-memory-utilization, or lower --max-num-batched-tokens"
        )
    return blocks


def _host_blocks(cache: CacheSettings, layout: KVLayout) -> int:
    """How many KV blocks the tier in host memory gets; a disk tier alone needs some to pass
    through."""
    num_bytes = cache.host_kv_bytes
    if num_bytes is None:
        return max(layout.blocks_in(DISK_STAGING_BYTES), 1) if cache.disk_kv_path else 0
    blocks = layout.blocks_in(num_bytes)
    if blocks < 1:
        raise StartError(
            "host_kv_bytes must hold at least one KV block of "
            f"{format_bytes(layout.bytes_per_block)}, got {format_bytes(num_bytes)}"
        )
    free = available_host_bytes()
    if num_bytes > free:
        raise StartError(
            f"host_kv_bytes must be at most the {format_bytes(free)} of host memory that are free, "
            f"got {format_bytes(num_bytes)}"
        )
    return blocks


def _require_pool_fits(num_bytes: int, device: torch.device) -> None:
    free = available_bytes(device)
    if num_bytes > free:
        raise StartError(
            f"the KV pool takes {format_bytes(num_bytes)}, but only {format_bytes(free)} of memory "
            "are free: lower --kv-cache-memory-bytes"
        )


def _free_after_profile(
    model: CausalLM,
    layout: KVLayout,
    limits: Limits,
    masks: GrammarMasks,
    utilization: float,
    device: torch.device,
    graphs: bool,
) -> int:
    """GPU bytes left for the pool, measured by running one largest step on a pool of one block,
    and capturing the largest graphs."""
    torch.cuda.reset_peak_memory_stats(device)
    runner = _runner(model, layout, dispatch.backend(device), limits, masks, device)
    _largest_step(runner, limits)
    peak = torch.cuda.max_memory_allocated(device)
    if graphs:
        before = torch.cuda.memory_reserved(device)
        runner.capture_decodes(CudaCapture(device), [limits.max_num_seqs])
        peak += torch.cuda.memory_reserved(device) - before
    del runner
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)  # other processes, CUDA's own
    return int(total * utilization) - others - peak


# ---------------------------------------------------------------------- warm-up


def _runner(
    model: CausalLM,
    layout: KVLayout,
    backend: dispatch.Backend,
    limits: Limits,
    masks: GrammarMasks,
    device: torch.device,
    num_host_blocks: int = 0,
    disk: DiskTier | None = None,
) -> Runner:
    return Runner(
        model,
        layout,
        backend,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=limits.max_model_len,
        grammars=masks,
        device=device,
        num_host_blocks=num_host_blocks,
        disk=disk,
    )


def _largest_step(runner: Runner, limits: Limits) -> None:
    """Runs prompts that fill the whole token budget, every slot sampling a token.

    All blocks of a sequence may be the same one here: what is computed is of no interest.
    """
    seqs = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    longest = limits.max_model_len - 1
    budget = min(limits.max_num_batched_tokens, seqs * longest)
    counts = [budget // seqs + (i < budget % seqs) for i in range(seqs)]
    runner.run(_prompts(counts, COSTLY))


def _warm_up(runner: Runner, limits: Limits) -> None:
    """A prompt and a few decode batches, so that the first request finds everything allocated."""
    length = min(16, limits.max_model_len - 2)
    for seqs in sorted({1, min(4, limits.max_num_seqs), min(16, limits.max_num_seqs)}):
        if seqs * length > limits.max_num_batched_tokens:
            break
        runner.run(_prompts([length] * seqs, SamplingParams(temperature=0)))
        decodes = [ScheduledSeq(slot, length, 1, True) for slot in range(seqs)]
        runner.run(StepPlan(-1, scheduled=decodes))


def _prompts(counts: list[int], sampling: SamplingParams) -> StepPlan:
    """A plan that reads `counts[slot]` tokens into each slot and samples. Fresh tables are all
    zeros, so everything is written into block 0."""
    items = sorted(enumerate(counts), key=lambda item: item[1] > 1)
    return StepPlan(
        -1,
        admitted=[Admitted(slot, [0] * count, count, sampling) for slot, count in items],
        scheduled=[ScheduledSeq(slot, 0, count, True) for slot, count in items],
    )
