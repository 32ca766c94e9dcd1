"""Everything an operator can set: one frozen tree, read from flags, environment and a file.

Every leaf has one flat name that is unique over the tree: `block_size` is the flag `--block-size`,
the variable `QUIRE_BLOCK_SIZE`, the key `block_size` of the file and `settings.cache.block_size`
in code. Flags win over the environment, the environment over the file, the file over defaults.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, InitSettingsSource, SettingsConfigDict

from configs.logs import LogFormat

ENV_PREFIX: Final = "QUIRE_"
CONFIG: Final = "config"  # names the file itself; never a key of the file
PRESETS_DIR: Final = Path(__file__).parent
EMBEDDED: Final = "embedded"
CPU_KV_CACHE_BYTES: Final = 1 << 30
"""KV pool on CPUs where none is set: host memory is shared, so it is never "the rest"."""
DISK_KV_BYTES: Final = 16 << 30
DISK_STAGING_BYTES: Final = 256 << 20
"""Host memory through which blocks pass to the disk and back where no `host_kv_bytes` is set."""

_UNITS: Final = {"": 1, "b": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for ending, base in (("b", 1000), ("ib", 1024))
}
# A Kubernetes Service called `quire` puts these into every pod of its namespace.
_SERVICE_LINK = re.compile(r"QUIRE_(SERVICE_(HOST|PORT)|PORT_\d+_(TCP|UDP|SCTP)).*")


class SettingsError(ValueError):
    """What is set cannot be used. The message is one line: the field, the limit, the value."""


def parse_bytes(value: object) -> object:
    """`"4GiB"` -> 4294967296, `"512MB"` -> 512000000; what is not text is left to pydantic."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", value.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError("must be bytes such as 536870912, 512MB or 4GiB")
    return int(float(match[1]) * _UNITS[match[2]]) if match[2] else int(float(match[1]))


def format_bytes(count: float) -> str:
    """1073741824 -> `1 GiB`; at most one decimal."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if count < 1024:
            break
        count, unit = count / 1024, larger
    return f"{count:.1f}".removesuffix(".0") + f" {unit}"


def _split_names(value: object) -> object:
    """Flags give a list, the environment `a,b`, a file either."""
    parts = [value] if isinstance(value, str) else value
    if isinstance(parts, list | tuple) and all(isinstance(part, str) for part in parts):
        return tuple(name.strip() for part in parts for name in part.split(",") if name.strip())
    return value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _weights(value: tuple[str, ...]) -> tuple[str, ...]:
    for pair in value:
        if not re.fullmatch(r"[^=]+=(\d+\.?\d*|\.\d+)", pair) or not float(pair.split("=")[1]):
            raise ValueError("must be names with a number above 0 such as ann=2")
    return value


def _stretch(value: float) -> float:
    if value and not 1 < value < float("inf"):
        raise ValueError("must be above 1, or 0")
    return value


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split_names)]
Secrets = Annotated[tuple[SecretStr, ...], BeforeValidator(_split_names)]
Count = Annotated[int, Field(ge=1)]


def _block_size(value: int) -> int:
    if value not in (8, 16, 32, 64, 128):
        raise ValueError("must be one of 8, 16, 32, 64, 128")
    return value


def _http_url(value: str | None) -> str | None:
    if value is not None and not value.startswith(("http://", "https://")):
        raise ValueError("must begin with http:// or https://")
    return value


class Section(BaseModel):
    """A frozen group of settings; an unknown name is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Section):
    """What is served, and in which numbers."""

    model: Annotated[
        str,
        Field(min_length=1, description=f"Folder, Hugging Face id, or `{EMBEDDED}` (comes along)"),
    ] = EMBEDDED
    revision: Annotated[
        str | None, Field(description="Branch, tag or commit of a Hugging Face id")
    ] = None
    served_model_name: Annotated[
        Names | None,
        Field(
            min_length=1,
            description="Names that clients may use; the first is reported. "
            "Default: the folder's name, the id, or `quire-embedded`",
        ),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(description="`auto`: bfloat16 where the device computes in it, else float32"),
    ] = "auto"
    quantization: Annotated[
        Literal["none", "int8"],
        Field(
            description="`int8` keeps the matrices of the model in half the bytes of bfloat16, "
            "quantized while it loads; activations stay `dtype`"
        ),
    ] = "none"
    tool_call_parser: Annotated[
        Literal["auto", "none", "hermes", "llama3_json", "mistral"],
        Field(description="How the model writes tool calls; `auto`: as its chat template shows"),
    ] = "auto"
    reasoning_parser: Annotated[
        Literal["auto", "none", "think", "mistral"],
        Field(description="What stands around thoughts: `<think>` or `[THINK]`; `auto` as above"),
    ] = "auto"
    max_model_len: Annotated[
        Count | None,
        Field(description="Longest prompt plus answer in tokens. Default: what the model allows"),
    ] = None
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Field(description="`auto`: a GPU if there is one")
    ] = "auto"
    cpu_threads: Annotated[
        Count | None,
        Field(description="Threads that compute on a CPU. Default: the cores this process may use"),
    ] = None
    enforce_eager: Annotated[
        bool,
        Field(description="Capture no CUDA graphs of decode steps; on a CPU there are none anyway"),
    ] = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names clients may use, at least one; the first is the one reported back."""
        if self.served_model_name:
            return self.served_model_name
        if self.model == EMBEDDED:
            return ("quire-embedded",)
        folder = Path(self.model)
        return (folder.resolve().name,) if folder.is_dir() else (self.model,)


class CacheSettings(Section):
    """The pool of KV blocks."""

    block_size: Annotated[
        int,
        AfterValidator(_block_size),
        Field(description="Tokens per KV block: 8, 16, 32, 64 or 128"),
    ] = 16
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8_e4m3", "int8", "int4"],
        Field(description="Numbers in KV blocks: `auto` is `dtype`, others are smaller"),
    ] = "auto"
    gpu_memory_utilization: Annotated[
        float,
        Field(gt=0, le=1, description="Share of GPU memory for weights, work space and KV blocks"),
    ] = 0.9
    kv_cache_memory_bytes: Annotated[
        Bytes | None,
        Field(
            gt=0,
            description="Size of the KV pool, such as `4GiB`. Default: what "
            f"`gpu_memory_utilization` leaves; on a CPU {format_bytes(CPU_KV_CACHE_BYTES)}",
        ),
    ] = None
    enable_prefix_caching: Annotated[
        bool, Field(description="Find the KV blocks of prompts that begin alike again")
    ] = True
    isolate_prefix_cache: Annotated[
        bool, Field(description="Never let the KV blocks of one API key be found by another")
    ] = False
    num_gpu_blocks_override: Annotated[
        Count | None,
        Field(description="KV blocks in the pool, whatever the memory; on any device"),
    ] = None
    host_kv_bytes: Annotated[
        Bytes | None,
        Field(
            gt=0,
            description="Host memory for KV blocks that the pool gives up, such as `8GiB`: they "
            "come back from there without being computed again. Default: none",
        ),
    ] = None
    disk_kv_path: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Folder for KV blocks that host memory gives up; they outlive the server",
        ),
    ] = None
    disk_kv_bytes: Annotated[
        Bytes | None,
        Field(
            gt=0,
            description="Most bytes of files in `disk_kv_path`. Default: "
            f"{format_bytes(DISK_KV_BYTES)}",
        ),
    ] = None

    @model_validator(mode="after")
    def _disk_tier_is_whole(self) -> CacheSettings:
        if self.disk_kv_bytes is not None and self.disk_kv_path is None:
            raise ValueError("disk_kv_bytes needs disk_kv_path")
        if self.disk_kv_path is not None and not self.enable_prefix_caching:
            raise ValueError("disk_kv_path needs enable_prefix_caching")
        return self

    @property
    def disk_room(self) -> int:
        """Most bytes of files in `disk_kv_path`."""
        return DISK_KV_BYTES if self.disk_kv_bytes is None else self.disk_kv_bytes


class SchedulingSettings(Section):
    """How much one step takes on."""

    max_num_seqs: Annotated[Count, Field(description="Most sequences in one step")] = 128
    max_num_batched_tokens: Annotated[
        Count, Field(description="Most tokens in one step; longer prompts are read in chunks")
    ] = 2048
    prefill_stretch: Annotated[
        float,
        AfterValidator(_stretch),
        Field(
            description="While others decode, prompts may make a step so many times as long as it "
            "is without them, or as much longer as gives everybody an equal share of the time; "
            "0 sets no bound but `max_num_batched_tokens`"
        ),
    ] = 0.0
    admission: Annotated[
        Literal["optimistic", "reserve"],
        Field(
            description="`optimistic` starts a request when its prompt fits and may preempt one "
            "later; `reserve` only when the longest answers of all fit, and never preempts"
        ),
    ] = "optimistic"
    admission_watermark: Annotated[
        float,
        Field(ge=0, lt=1, description="Share of the KV blocks that an admission leaves free"),
    ] = 0.01
    preemption: Annotated[
        Literal["recompute", "swap", "auto"],
        Field(
            description="KV blocks of a request that gives way are computed again, moved to host "
            "memory and back (needs `host_kv_bytes`), or whichever is estimated to be cheaper"
        ),
    ] = "auto"
    async_scheduling: Annotated[
        Literal["auto", "on", "off"],
        Field(
            description="Plan and launch a step before the tokens of the one before it are read; "
            "`auto`: on a GPU. On a CPU it gains nothing, since planning needs the same cores"
        ),
    ] = "auto"
    tenant_weights: Annotated[
        Names,
        AfterValidator(_weights),
        Field(description="Names of API keys that get more or less than a share of 1: `ann=2`"),
    ] = ()

    @property
    def weights(self) -> dict[str, float]:
        """`tenant_weights` by name."""
        pairs = (pair.split("=") for pair in self.tenant_weights)
        return {name: float(weight) for name, weight in pairs}

    @model_validator(mode="after")
    def _every_sequence_gets_a_token(self) -> SchedulingSettings:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens must be at least max_num_seqs ({self.max_num_seqs}), "
                f"got {self.max_num_batched_tokens}"
            )
        return self


class HttpSettings(Section):
    """Where clients knock."""

    host: Annotated[
        str, Field(min_length=1, description="Address to listen on; `0.0.0.0` is every network")
    ] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port; 0 takes a free one")] = 8000
    api_key: Annotated[
        Secrets,
        Field(
            description="Bearer keys, one of which clients must send; `a,b` is two. Better set in "
            "the environment or a file"
        ),
    ] = ()
    api_key_file: Annotated[
        str | None,
        Field(description="File of more keys: lines `name:key` or `key`, `#` begins a comment"),
    ] = None
    no_auth: Annotated[
        bool, Field(description="Serve without any key on an address that others can reach")
    ] = False
    metrics_without_key: Annotated[
        bool, Field(description="`/metrics` asks for no key, as the health checks never do")
    ] = False


class LifetimeSettings(Section):
    """When the server ends, and when it gives up."""

    shutdown_timeout: Annotated[
        float, Field(ge=0, description="Seconds that running answers get after SIGTERM or Ctrl-C")
    ] = 30.0
    stall_timeout: Annotated[
        float,
        Field(
            gt=0,
            description="Seconds without a step, while there is work, after which the engine "
            "counts as broken and the server ends",
        ),
    ] = 60.0


class LimitSettings(Section):
    """What one HTTP request may hold, and what may wait."""

    max_body_bytes: Annotated[Bytes, Field(ge=1, description="Largest request body")] = 4 << 20
    max_messages: Annotated[Count, Field(description="Most messages of one chat")] = 1000
    max_prompts: Annotated[Count, Field(description="Most prompts of one completion")] = 1000
    max_n: Annotated[Count, Field(description="Most answers to one prompt (`n`)")] = 128
    max_answers: Annotated[Count, Field(description="Most answers to all prompts together")] = (
        10_000
    )
    max_stop_strings: Annotated[Count, Field(description="Most strings in `stop`")] = 16
    max_stop_token_ids: Annotated[Count, Field(description="Most ids in `stop_token_ids`")] = 128
    max_logit_bias: Annotated[Count, Field(description="Most tokens in `logit_bias`")] = 300
    max_logprobs: Annotated[
        int,
        Field(ge=0, le=1000, description="Most log-probabilities told in place of one token"),
    ] = 20
    max_queued_requests: Annotated[
        Count, Field(description="Most prompts that wait for their first token; others get a 503")
    ] = 2048
    max_queued_tokens: Annotated[Count, Field(description="Most tokens of those prompts")] = 1 << 22
    max_queued_requests_per_key: Annotated[
        Count | None,
        Field(description="Most of them of one API key; others get a 429. Default: no such bound"),
    ] = None


class ObservabilitySettings(Section):
    """What the operator sees."""

    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        BeforeValidator(_lower),
        Field(description="Least important log line that is written"),
    ] = "info"
    log_format: Annotated[
        LogFormat, Field(description="`auto`: text on a terminal, else JSON lines")
    ] = "auto"
    access_log: Annotated[
        bool, Field(description="A log line for each request, but health checks and metrics")
    ] = True
    log_prompts: Annotated[
        bool, Field(description="Also log what clients send; otherwise no prompt is ever logged")
    ] = False
    trace_steps: Annotated[
        int,
        Field(ge=0, description="Steps of the scheduler that `/debug/steps` remembers; 0 is off"),
    ] = 1024
    otlp_traces_endpoint: Annotated[
        str | None,
        AfterValidator(_http_url),
        Field(
            description="Where OpenTelemetry spans go, such as "
            "`http://localhost:4318/v1/traces`; needs the extra `otel`. Default: nowhere",
        ),
    ] = None
    slo_ttft: Annotated[
        float,
        Field(gt=0, description="Seconds to the first token that `/metrics` counts as good"),
    ] = 1.0
    slo_tpot: Annotated[
        float,
        Field(gt=0, description="Seconds per further token that `/metrics` counts as good"),
    ] = 0.1


class Settings(BaseSettings):
    """The whole tree. `Settings()` is the defaults; `Settings.read` is what an operator set."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    model: ModelSettings = ModelSettings()
    cache: CacheSettings = CacheSettings()
    scheduling: SchedulingSettings = SchedulingSettings()
    http: HttpSettings = HttpSettings()
    lifetime: LifetimeSettings = LifetimeSettings()
    limits: LimitSettings = LimitSettings()
    observability: ObservabilitySettings = ObservabilitySettings()

    @model_validator(mode="after")
    def _swaps_have_somewhere_to_go(self) -> Settings:
        if self.scheduling.preemption == "swap" and self.cache.host_kv_bytes is None:
            raise ValueError("preemption swap needs host_kv_bytes")
        return self

    @classmethod
    def settings_customise_sources(  # only what `read` hands over: `Settings()` is the defaults
        cls, settings_cls: type[BaseSettings], init_settings: Any, *_: Any, **__: Any
    ) -> tuple[InitSettingsSource, ...]:
        return (init_settings,)

    @classmethod
    def of(cls, **flat: object) -> Settings:
        """`Settings.of(model="m", block_size=8)`: flat names, and nothing from outside."""
        return cls.read(flat, environ={})

    @classmethod
    def read(
        cls, flags: Mapping[str, object], environ: Mapping[str, str] | None = None
    ) -> Settings:
        """The settings that flags, environment and file add up to.

        Args:
            flags: flat names to values, only those given; `config` names a file or a preset.
            environ: in place of `os.environ`.

        Raises:
            SettingsError: an unknown name, a value out of range, a file that cannot be read.
        """
        variables = _from_environment(os.environ if environ is None else environ)
        given = {name: value for name, value in flags.items() if value is not None}
        _check_names(given, [*FIELDS, CONFIG], "setting", str)
        path = given.pop(CONFIG, variables.pop(CONFIG, None))
        in_file = {} if path is None else _from_file(str(path))
        origins = {
            **dict.fromkeys(in_file, f"the file {path}"),
            **{name: ENV_PREFIX + name.upper() for name in variables},
            **dict.fromkeys(given, ""),
        }
        sources = tuple(
            InitSettingsSource(cls, _nest(flat)) for flat in (given, variables, in_file)
        )
        try:
            return cls(_build_sources=(sources, {}))  # type: ignore[call-arg]  # of BaseSettings
        except ValidationError as error:
            lines = [_one_line(detail, origins) for detail in error.errors()]
            raise SettingsError("; ".join(lines)) from None


@dataclass(frozen=True)
class Setting:
    """One leaf of the tree, as flags, variables and the documentation see it."""

    name: str
    section: str
    description: str
    default: object
    many: bool
    secret: bool
    in_bytes: bool

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def default_text(self) -> str:
        """As an operator would write it; empty where the default depends on something else."""
        if self.default in (None, ()):
            return ""
        if self.in_bytes and isinstance(self.default, int):
            return format_bytes(self.default).replace(" ", "")
        return str(self.default)


def _leaves() -> dict[str, Setting]:
    leaves: dict[str, Setting] = {}
    for section, holder in Settings.model_fields.items():
        for name, field in type(holder.default).model_fields.items():
            assert name not in leaves, f"{name} is in two sections"
            leaves[name] = Setting(
                name=name,
                section=section,
                description=field.description or "",
                default=field.default,
                many="tuple" in str(field.annotation),
                secret="SecretStr" in str(field.annotation),
                in_bytes="bytes" in name,
            )
    return leaves


FIELDS: Final[Mapping[str, Setting]] = _leaves()
"""Every setting by its flat name, in the order of the tree."""

SECTIONS: Final[Mapping[str, str]] = {
    name: (type(holder.default).__doc__ or "").strip()
    for name, holder in Settings.model_fields.items()
}
"""Every section, with what it is about."""


def _nest(flat: Mapping[str, object]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        tree.setdefault(FIELDS[name].section, {})[name] = value
    return tree


def _from_environment(environ: Mapping[str, str]) -> dict[str, object]:
    """Variables that start with QUIRE_; an empty one counts as not set, as composing files do."""
    found = {
        name: value.strip()
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX)
        and not _SERVICE_LINK.fullmatch(name)
        and not (name == "QUIRE_PORT" and value.startswith("tcp://"))
    }
    spelled = {name: name.removeprefix(ENV_PREFIX).lower() for name in found}
    _check_names(spelled.values(), [*FIELDS, CONFIG], "environment variable", _variable_of)
    return {spelled[name]: value for name, value in found.items() if value}


def _variable_of(name: str) -> str:
    return ENV_PREFIX + name.upper()


def presets() -> dict[str, Path]:
    """The ready-made files by name."""
    return {path.stem: path for path in sorted(PRESETS_DIR.glob("*.yaml"))}


def _from_file(name: str) -> dict[str, object]:
    """The keys of a file, or of the preset of that name; `block-size` and `block_size` alike."""
    import yaml

    path = Path(name) if Path(name).is_file() else presets().get(name)
    if path is None:
        raise SettingsError(
            f"config must be a file or one of the presets {', '.join(presets())}, got {name}"
        )
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(
            f"config {name} cannot be read: {' '.join(str(error).split())}"
        ) from None
    if keys is None:
        return {}
    if not isinstance(keys, dict):
        raise SettingsError(f"config {name} must hold `name: value` lines")
    flat = {str(key).replace("-", "_"): value for key, value in keys.items()}
    _check_names(flat, list(FIELDS), f"key of {name}", str)
    return {key: value for key, value in flat.items() if value is not None}


def _check_names(
    names: Iterable[str], known: list[str], kind: str, spell: Callable[[str], str]
) -> None:
    for name in names:
        if name not in known:
            raise SettingsError(
                f"unknown {kind} {spell(name)}; the nearest is {spell(nearest(name, known))}"
            )


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that looks most like `name`."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def _one_line(detail: ErrorDetails, origins: Mapping[str, str]) -> str:
    message = re.sub(
        r"^(Input|Value) should ", "must ", detail["msg"].removeprefix("Value error, ")
    )
    message = message.partition(", unable to parse")[0]
    message = message[0].lower() + message[1:]
    if len(detail["loc"]) < 2:  # two settings that do not go together: the message names both
        return message
    name = str(detail["loc"][1])
    got = "" if FIELDS[name].secret else f", got {detail['input']}"
    origin = origins.get(name)
    return f"{name} {message}{got}" + (f" (from {origin})" if origin else "")
