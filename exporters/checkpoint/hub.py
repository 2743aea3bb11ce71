"""Checkpoints from a model hub, where there is a network.

Only what is read is fetched. Names are asked for first, then configs and indexes, which can refuse
a repository before its weights come; of files in Black Forest Labs' layout the headers.
"""

from __future__ import annotations

import errno
import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporters.checkpoint.checkpoint import read_json
from exporters.checkpoint.contents import Contents, contents_of
from exporters.checkpoint.foreign import check_config, check_pipeline
from exporters.checkpoint.weight_files import (
    PICKLES,
    Chosen,
    choose,
    is_weight_file,
    read_index,
)
from fluxdeploy.errors import CheckpointError

__all__ = ["download"]

_PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
_CONFIGS = re.compile(
    r"model_index\.json|config\.json|scheduler/scheduler_config\.json"
    r"|(?:vae|transformer|text_encoder(?:_2)?)/(?:adapter_)?config\.json"
    r"|tokenizer(?:_2)?/(?:[\w-]+\.json|merges\.txt|spiece\.model)"
)
"""What is read of a checkpoint beside its weights and their indexes."""

_MOST_HEADERS = 32
"""Weight files in a repository's root whose headers are asked for."""


def download(repository: str, revision: str | None = None) -> tuple[Path, str]:
    """The local folder of a hub repository, and its commit.

    `revision` is a branch, tag or commit; None is the newest. What the hub's cache has is not
    fetched again, a download that was cut off goes on where it was, and without a network the
    cache is what there is.

    Raises `CheckpointError` without a network or access, for an unknown repository or revision,
    for a full disk, and for a repository without a FLUX.1 checkpoint.
    """
    with _telling(repository, revision):
        names = _list(repository, revision)
        if names is None:
            root = _fetch(repository, revision, [], local=True)
        elif "model_index.json" in names:
            root = _fetch_parts(repository, revision, names, _PARTS)
        else:
            files, parts = _choose_files(repository, revision, names)
            root = _fetch_parts(repository, revision, names, parts, files)
    # The hub's cache keeps every commit in a folder of its name.
    return root, root.name


def _list(repository: str, revision: str | None) -> list[str] | None:
    """The names in a repository; None where the hub does not tell, and its cache has some."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(repository, revision=revision)
    except Exception as error:  # noqa: BLE001 - whatever it is, the cache may do
        try:
            _fetch(repository, revision, [], local=True)
        except Exception:  # noqa: BLE001
            raise error from None
        return None


def _fetch(
    repository: str, revision: str | None, names: Sequence[str], local: bool = False
) -> Path:
    """Have these files in the hub's cache; returns the folder of their commit."""
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(name) for name in names]
    return Path(
        snapshot_download(
            repository, revision=revision, allow_patterns=patterns, local_files_only=local
        )
    )


def _fetch_parts(
    repository: str,
    revision: str | None,
    names: Sequence[str],
    parts: Sequence[str],
    files: Sequence[str] = (),
) -> Path:
    """Fetch the configs, then `files` and the weights of some folders."""
    chosen = _choose_parts(repository, names, parts)
    configs = [name for name in names if _CONFIGS.fullmatch(name)]
    if "model_index.json" in configs and "config.json" in configs:
        # The transformer's in Black Forest Labs' layout alone.
        configs.remove("config.json")
    indices = [f"{part}/{each.index}" for part, each in chosen.items() if each.index]
    root = _fetch(repository, revision, [*configs, *indices] or files)
    for name in configs:
        if name == "model_index.json":
            check_pipeline(read_json(root / name), repository)
        elif name.endswith("/config.json"):
            check_config(read_json(root / name), f"{name} of {repository}")
    weights = list(files)
    for part, each in chosen.items():
        shards = [] if each.index is None else read_index(root / part, each.index).shards
        weights += [f"{part}/{name}" for name in (*each.files, *shards)]
    # Of the same commit, should the branch have moved on meanwhile.
    return _fetch(repository, root.name, weights)


def _choose_parts(repository: str, names: Sequence[str], parts: Sequence[str]) -> dict[str, Chosen]:
    """The weight files of those folders that there are."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.partition("/")
        if file and "/" not in file:
            folders.setdefault(folder, []).append(file)
    return {
        part: choose(f"{repository}/{part}", folders[part]) for part in parts if part in folders
    }


def _choose_files(
    repository: str, revision: str | None, names: Sequence[str]
) -> tuple[list[str], list[str]]:
    """In Black Forest Labs' layout: the files of the root and the folders that hold the parts."""
    held = _contents(repository, revision, [name for name in names if is_weight_file(name)])
    transformers = [name for name, contents in held.items() if "transformer" in contents.parts]
    if len(transformers) > 1:
        raise CheckpointError(
            f"{repository} holds several transformers ({', '.join(transformers)}): download the "
            "one that is meant, and give its path."
        )
    if not transformers:
        raise CheckpointError(_nothing_in(repository, names, held))
    vaes = [name for name, contents in held.items() if contents.parts == {"vae"}]
    has_vae = bool(vaes) or "vae" in held[transformers[0]].parts
    parts = [
        part
        for part in (_PARTS[2:] if has_vae else _PARTS[1:])
        if any(name.startswith(f"{part}/") and is_weight_file(name) for name in names)
    ]
    return [*transformers, *vaes], parts


def _contents(
    repository: str, revision: str | None, names: Sequence[str]
) -> Mapping[str, Contents]:
    """What the weight files of a repository's root hold, by their headers alone."""
    from huggingface_hub import HfApi

    names = [name for name in names if "/" not in name]
    if len(names) > _MOST_HEADERS:
        raise CheckpointError(
            f"{repository} is a collection of {len(names)} weight files: download the one that is "
            "meant, and give its path."
        )
    api = HfApi()
    return {
        name: contents_of(
            api.parse_safetensors_file_metadata(repository, name, revision=revision).tensors
        )
        for name in names
    }


def _nothing_in(repository: str, names: Sequence[str], held: Mapping[str, Contents]) -> str:
    """What to say of a repository that has no transformer in its root and no model_index.json."""
    begin = f"{repository} holds no FLUX.1 checkpoint"
    for name, contents in held.items():
        advice = f" {contents.advice}." if contents.advice else ""
        return f"{begin}: {name} is {contents}.{advice}"
    for suffixes, kind in (((".gguf",), "GGUF"), (PICKLES, "pickled"), ((".onnx",), "ONNX")):
        for name in names:
            if name.lower().endswith(suffixes):
                fetch = (
                    " Download the one that is meant, and give its path with --base for what it "
                    "lacks."
                )
                told = f"{begin} in safetensors files: it has {kind} files ({name})."
                return told + (fetch if kind == "GGUF" else "")
    return f"{begin}: it has neither model_index.json nor a safetensors file in its root."


_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def _telling(repository: str, revision: str | None) -> Iterator[None]:
    """Make a CheckpointError of what the hub's library raises, whose own texts may hold tokens."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(_reason(repository, revision, error)) from error


def _reason(repository: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )

    causes = list(_causes(error))
    cache = constants.HF_HUB_CACHE
    if any(_is_full(cause) for cause in causes):
        return (
            f"The disk of the hub's cache, {cache}, is full: {repository} is not whole. Make room, "
            "or set HF_HOME to a folder on another disk, and run the command again: what was "
            "downloaded is kept."
        )
    if any(getattr(cause, "errno", None) in _CLOSED for cause in causes):
        return (
            f"The hub's cache, {cache}, cannot be written: set HF_HOME to a folder that can be, or "
            "give a folder with the checkpoint."
        )
    if isinstance(error, GatedRepoError):
        return (
            f"{repository} is gated: accept its licence on the hub, then log in with "
            "`hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"The hub's repository {repository} has no revision {revision}."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is neither a local path nor a hub repository {repository}; "
            "a private one needs `hf auth login`."
        )
    if isinstance(error, HFValidationError):
        return (
            f"There is no local path {repository}, and it cannot be the id of a hub repository: "
            "give a folder, a safetensors file or a hub id."
        )
    if isinstance(error, SafetensorsParsingError):
        return f"{repository} holds a file that is named as safetensors and is none."
    begin = f"There is no local path {repository}, and the hub could not be reached"
    if constants.HF_HUB_OFFLINE or any(isinstance(c, OfflineModeIsEnabled) for c in causes):
        return (
            f"{begin}, as HF_HUB_OFFLINE is set: unset it to download a repository of that name, "
            "or give a folder."
        )
    status = _status(causes)
    if status == 401:
        return (
            f"The hub does not know your token: log in again with `hf auth login` ({repository})."
        )
    if status is not None:
        return (
            f"There is no local path {repository}, and the hub answered with the error {status} "
            "when a repository of that name was asked for: try again later, or give a folder."
        )
    return (
        f"{begin} to download a repository of that name ({type(error).__name__}): check the "
        "network or give a folder."
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _is_full(error: BaseException) -> bool:
    # The library that fetches large files is native, and tells of a full disk in its text alone.
    return getattr(error, "errno", None) in _FULL or bool(
        re.search(r"os error (?:28|122)\b|No space left|Disk quota", str(error))
    )


def _status(causes: Sequence[Any]) -> int | None:
    """The HTTP status that the hub answered with, where it did."""
    for cause in causes:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None
