"""Writes docs/settings.md from the settings tree: `make settings-doc`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from configs.settings import FIELDS, SECTIONS, presets

PATH: Final = Path(__file__).parents[1] / "docs" / "settings.md"

_INTRO: Final = """\
<!-- Written by `make settings-doc` from configs/settings.py; a test compares the two. -->

# Settings

Every setting is a flag of `quire serve`, an environment variable and a key of the YAML file that
`--config` (or `QUIRE_CONFIG`) names. Flags win over the environment, the environment over the
file, the file over the defaults. A name that does not exist is an error that tells the nearest
one; a value out of range is one line with the field, the limit and the value, and exit code 2.

    quire serve ./model --block-size 32
    QUIRE_BLOCK_SIZE=32 quire serve ./model
    quire serve ./model --config small-gpu

In a file the keys are flat, written `block_size` or `block-size`. An empty variable counts as not
set. Sizes in bytes are a number, or a number with a unit: `512MB` is 512,000,000 and `512MiB` is
536,870,912. `quire serve MODEL` is short for `--model MODEL`.

Names of files that come along, for `--config`: """

_OUTRO: Final = """
## What cannot be set

Where the engine runs is no setting: `quire serve` always puts it into its own process. Sampling
defaults are those of the OpenAI API, whatever the checkpoint recommends.
"""


def _rows() -> Iterator[str]:
    for section, about in SECTIONS.items():
        yield f"\n## {section}\n\n{about}\n"
        yield "| flag | variable | default | meaning |"
        yield "|---|---|---|---|"
        for setting in FIELDS.values():
            if setting.section == section:
                default = f"`{setting.default_text}`" if setting.default_text else ""
                yield (
                    f"| `{setting.flag}` | `{setting.variable}` | {default} "
                    f"| {setting.description} |"
                )


def render() -> str:
    """The whole page."""
    names = ", ".join(f"`{name}`" for name in presets())
    return _INTRO + names + ".\n" + "\n".join(_rows()) + "\n" + _OUTRO


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
