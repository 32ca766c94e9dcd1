"""Downloads from the Hugging Face Hub: only the files that serving reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.config import CheckpointError

WANTED = ["*.safetensors", "*.json", "*.jinja"]
UNWANTED = ["*/*", "consolidated*", "optimizer*", "training_args*"]


def download(
    model: str, revision: str | None, progress: Callable[[str, float, float, str], None] | None
) -> Path:
    """The local folder of a Hub model, downloaded or completed if needed.

    Raises CheckpointError saying what failed and what to do.
    """
    # Imported here: it brings an HTTP stack that serving from a folder never needs.
    from huggingface_hub import errors, snapshot_download

    where = f"https://huggingface.co/{model}"
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
                tqdm_class=_bar(model, progress),
            )
        )
    except errors.HFValidationError as error:
        raise CheckpointError(f"{model!r} is neither a folder nor a Hub model id") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model} is gated: accept its terms at {where}, then set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model} is not a folder here and not at {where}; if it is private, set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{where} has no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{model} is not in the local cache and {where} cannot be reached;"
            " go online once, or give the path of a folder"
        ) from error
    except (OSError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"download of {where} failed: {reason}") from error


class _Nowhere:
    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass


def _bar(model: str, progress: Callable[[str, float, float, str], None] | None) -> type:
    """A silent tqdm class that reports the bytes of all files together."""
    from tqdm import tqdm

    seen = {"done": 0.0, "total": 0.0}

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            kwargs.pop("name", None)
            kwargs["file"] = _Nowhere()
            super().__init__(*args, **kwargs)

        def update(self, n: float | None = 1) -> bool | None:
            changed = super().update(n)
            if progress is not None and self.unit == "B":
                # Several bars count the same bytes (received, written): the furthest one speaks.
                seen["done"] = max(seen["done"], float(self.n))
                seen["total"] = max(seen["total"], float(self.total or 0))
                progress("downloading", seen["done"], seen["total"], model)
            return changed

    return Bar
