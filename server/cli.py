"""The command `quire`: serve, check, run-batch, chat, bench, plan, kv, trace, health.

This module is imported again by the spawned engine process and answers `--help`, so it imports
nothing heavy: each command fetches what it needs when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

from configs.settings import CONFIG, FIELDS, SECTIONS, Settings, SettingsError, nearest
from server import __version__, plan_command

OK: Final = 0
FAILED: Final = 1
MISUSED: Final = 2  # the operator can put it right; one line says how

Run = Callable[[argparse.Namespace], int]

_USAGE: Final = "quire serve [MODEL] [--FLAG VALUE ...]"
_HINT: Final = "every setting is also a variable (QUIRE_BLOCK_SIZE) and a key of a --config file"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:  # has its own flags
        from benchmarks.serve import main as bench

        return bench(arguments[1:])
    parser, commands = _parser()
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse(commands[parsed.command], unknown[0])
    run: Run = parsed.run
    try:
        return run(parsed)
    except SettingsError as error:
        print(f"quire: {error}", file=sys.stderr)
        return MISUSED


class _Parser(argparse.ArgumentParser):
    """Mistakes are one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISUSED, f"{self.prog}: {message}\n")


def _refuse(parser: argparse.ArgumentParser, argument: str) -> NoReturn:
    known = list(parser._option_string_actions)
    flag = argument.partition("=")[0]
    if flag.startswith("-"):
        parser.error(f"unknown flag {flag}; the nearest is {nearest(flag, known)}")
    parser.error(f"unexpected argument {argument}")


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(prog="quire", description="A paged-KV serving server for language models.")
    parser.add_argument("--version", action="version", version=f"quire {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(
        name: str, text: str, run: Run, usage: str | None = None, epilog: str | None = None
    ) -> _Parser:
        made = commands.add_parser(
            name,
            help=text,
            description=f"{text}.",
            usage=usage,
            epilog=epilog,
            allow_abbrev=False,
        )
        made.set_defaults(run=run)
        return made

    _add_settings(command("serve", "Serve a model over HTTP", _serve, usage=_USAGE, epilog=_HINT))
    text = "Tell how a model would be served, without loading it; takes what serve takes"
    usage = _USAGE.replace("serve", "check")
    _add_settings(command("check", text, _check, usage=usage, epilog=_HINT))
    batch = command("run-batch", "Answer a file of requests in OpenAI's batch format", _run_batch)
    _add_batch(batch)
    _add_chat(command("chat", "Talk to a running server", _chat))
    commands.add_parser("bench", help="Measure a server: tokens/s, TTFT, TPOT, ITL (own --help)")
    plan = command("plan", "Tell how much memory a model will take", plan_command.run)
    plan_command.add_arguments(plan)
    kv = command("kv", "Show the KV blocks of a running server", _kv)
    kv.add_argument("--url", help="default: where QUIRE_HOST and QUIRE_PORT point")
    trace = command("trace", "Write the last steps of a running server to a Perfetto file", _trace)
    trace.add_argument("FILE", help="such as out.json")
    trace.add_argument("--url", help="default: where QUIRE_HOST and QUIRE_PORT point")
    health = command("health", "Ask a running server whether it is well", _health)
    health.add_argument("--url", help="default: where QUIRE_HOST and QUIRE_PORT point")
    health.add_argument("--timeout", type=float, default=3.0, help="seconds (default 3)")
    return parser, dict(commands.choices)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("MODEL", nargs="?", help="the same as --model")
    parser.add_argument("--config", metavar="FILE", help="YAML file, or a preset of configs/")
    groups = {name: parser.add_argument_group(name, text) for name, text in SECTIONS.items()}
    for setting in FIELDS.values():
        default = f" (default {setting.default_text})" if setting.default_text else ""
        text = (setting.description + default).replace("`", "").replace("%", "%%")
        if setting.name.startswith("no_"):
            groups[setting.section].add_argument(
                setting.flag, dest=setting.name, action="store_const", const=True, help=text
            )
            continue
        if isinstance(setting.default, bool):  # --enable-x and --no-enable-x
            groups[setting.section].add_argument(
                setting.flag,
                dest=setting.name,
                action=argparse.BooleanOptionalAction,
                default=None,
                help=text,
            )
            continue
        groups[setting.section].add_argument(
            setting.flag,
            dest=setting.name,
            nargs="+" if setting.many else None,
            metavar="NAME" if setting.many and not setting.secret else "VALUE",
            help=text,
        )


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("IN", help="JSON lines: custom_id, method, url, body")
    parser.add_argument("OUT", help="answers; what is there already is not asked for again")
    parser.add_argument("--errors", metavar="FILE", help="failures (default: OUT.errors.jsonl)")
    parser.add_argument(
        "--concurrency", type=int, default=64, help="most requests at a time (default 64)"
    )
    parser.add_argument("--url", help="ask this server (default: start the model for the batch)")
    _add_settings(parser)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="default: where QUIRE_HOST and QUIRE_PORT point")
    parser.add_argument("--model", help="default: the first that the server names")
    parser.add_argument("--system", help="a system message to start from")
    parser.add_argument("--max-tokens", type=int, help="longest answer (default: the context)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the server's)")


def _serve(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    from server.launch import serve

    return serve(settings)


def _check(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    from server.check_command import run

    return run(settings)


def _run_batch(arguments: argparse.Namespace) -> int:
    if arguments.concurrency < 1:
        raise SettingsError(f"--concurrency must be at least 1, got {arguments.concurrency}")
    from pathlib import Path

    from server.batch_command import Options, run_against, run_here

    errors = None if arguments.errors is None else Path(arguments.errors)
    options = Options(Path(arguments.IN), Path(arguments.OUT), errors, arguments.concurrency)
    if arguments.url is not None:
        return run_against(options, arguments.url, _local_key())
    return run_here(options, _settings(arguments))


def _settings(arguments: argparse.Namespace) -> Settings:
    """What the flags of `_add_settings`, the environment and a file add up to."""
    flags = {name: getattr(arguments, name) for name in (*FIELDS, CONFIG)}
    if arguments.MODEL is not None:
        if arguments.model not in (None, arguments.MODEL):
            raise SettingsError(
                f"model must be given once, got {arguments.MODEL} and --model {arguments.model}"
            )
        flags["model"] = arguments.MODEL
    return Settings.read(flags)


def _chat(arguments: argparse.Namespace) -> int:
    from server.chat_repl import run

    return run(
        arguments.url or _local_url(),
        model=arguments.model,
        system=arguments.system,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        api_key=_local_key(),
    )


def _kv(arguments: argparse.Namespace) -> int:
    from server.kv_map import run

    return run(arguments.url or _local_url(), _local_key())


def _trace(arguments: argparse.Namespace) -> int:
    from server.trace_command import run

    return run(arguments.url or _local_url(), _local_key(), arguments.FILE)


def _health(arguments: argparse.Namespace) -> int:
    from http.client import HTTPException
    from urllib.request import ProxyHandler, build_opener

    url = (arguments.url or _local_url()).rstrip("/") + "/health"
    try:
        # A proxy that the environment names would answer for itself, not for the server.
        with build_opener(ProxyHandler({})).open(url, timeout=arguments.timeout) as answer:
            print(f"{url}: {answer.status}")
        return OK
    except (OSError, HTTPException) as error:  # an error status is an OSError too
        print(f"{url}: {error}", file=sys.stderr)
        return FAILED
    except ValueError:
        print(f"quire: --url must be like http://127.0.0.1:8000, got {url}", file=sys.stderr)
        return MISUSED


def _local_url() -> str:
    http = Settings.read({}).http
    host = reachable(http.host)
    return f"http://{host}:{http.port}"


def _local_key() -> str | None:
    """The first key of the variable that the server reads too."""
    return os.environ.get("QUIRE_API_KEY", "").partition(",")[0].strip() or None


def reachable(host: str) -> str:
    """An address to call for an address to listen on: every network includes this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


if __name__ == "__main__":
    raise SystemExit(main())
