"""Checkpoints from a model hub, where there is a network."""

from __future__ import annotations

from pathlib import Path

from fluxdeploy.errors import CheckpointError

__all__ = ["download"]

# Never the pickles, and of a repository that holds both layouts only the diffusers one.
_PATTERNS = (
    "model_index.json",
    "scheduler/*.json",
    "transformer/*.json",
    "transformer/*.safetensors",
    "vae/*.json",
    "vae/*.safetensors",
    "text_encoder/*.json",
    "text_encoder/*.safetensors",
    "text_encoder_2/*.json",
    "text_encoder_2/*.safetensors",
    "tokenizer/*",
    "tokenizer_2/*",
)


def download(repository: str) -> Path:
    """The local folder of a hub repository, downloaded where it is not in the hub's cache.

    Raises `CheckpointError` without a network, without access, or for an unknown repository.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, allow_patterns=list(_PATTERNS)))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository} is gated: accept its licence on the hub, then log in with "
            "`hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is neither a local path nor a hub repository {repository}; "
            "a private one needs `hf auth login`."
        ) from error
    except HFValidationError as error:
        raise CheckpointError(
            f"There is no local path {repository}, and it cannot be the id of a hub repository: "
            "give a folder, a safetensors file or a hub id."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"There is no local path {repository}, and the hub could not be reached to download "
            "a repository of that name: check the network or give a folder."
        ) from error
