"""Downloads from the Hugging Face Hub: only the files that serving reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    from huggingface_hub import snapshot_download

    with _explained(model, revision):
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
                tqdm_class=_bar(model, progress),
            )
        )


def read_headers(model: str, revision: str | None) -> tuple[Path, dict[str, list[int]]]:
    """What can be known without the weights: the local path of the `config.json`, and the shape
    of every tensor by name, from the headers of the safetensors files.

    Without a network the config comes from the local cache, and there are no shapes; neither are
    there for a model without safetensors files.

    Raises CheckpointError saying what failed and what to do.
    """
    from huggingface_hub import errors, get_safetensors_metadata, hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    shapes: dict[str, list[int]] = {}
    offline = False
    with _explained(model, revision):
        try:
            # First, because it fails at once where a download goes on trying.
            found = get_safetensors_metadata(model, revision=revision)
            for file in found.files_metadata.values():
                shapes |= {name: list(tensor.shape) for name, tensor in file.tensors.items()}
        except errors.NotASafetensorsRepoError:
            pass
        except (errors.HfHubHTTPError, errors.HFValidationError):
            raise
        except Exception:  # of the HTTP client, which is another one from version to version
            offline = True
        config = hf_hub_download(model, "config.json", revision=revision, local_files_only=offline)
    return Path(config), shapes


@contextmanager
def _explained(model: str, revision: str | None) -> Iterator[None]:
    """Turns what a download raises into one line."""
    from huggingface_hub import errors

    where = f"https://huggingface.co/{model}"
    try:
        yield
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
                progress("download", seen["done"], seen["total"], model)
            return changed

    return Bar
