"""Where the demo checkpoints lie; the ones of tasks are assembled when they are asked for."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from fluxdeploy.bundle.files import disk_errors, is_private, user_cache
from fluxdeploy.errors import CheckpointError

__all__ = ["Folders"]


class Folders(Mapping[str, Path]):
    """Checkpoints in diffusers layout by the names that commands take for them.

    whole: folders as they are. tasks: folders of what a task changes of the checkpoint `base`; the
    checkpoint is written into the user's cache where it is not yet there.
    """

    def __init__(self, whole: Mapping[str, Path], tasks: Mapping[str, Path], base: Path) -> None:
        self._whole, self._tasks, self._base = whole, tasks, base

    def __iter__(self) -> Iterator[str]:
        yield from self._whole
        yield from self._tasks

    def __len__(self) -> int:
        return len(self._whole) + len(self._tasks)

    def __contains__(self, name: object) -> bool:
        return name in self._whole or name in self._tasks

    def __getitem__(self, name: str) -> Path:
        """The folder.

        Raises `BundleError` where the cache cannot be written, and `CheckpointError` where others
        can write it.
        """
        if name in self._whole:
            return self._whole[name]
        return _assembled(self._base, self._tasks[name])


def _assembled(base: Path, task: Path) -> Path:
    # Names alone are completed in a shell, which should not wait for NumPy.
    from fluxdeploy.demo.assemble import assemble

    cache = user_cache()
    if not is_private(cache):
        raise CheckpointError(
            f"demo:{task.name} is put together in {cache}, where other users can write. Take that "
            f"right from them (chmod go-w {cache}), or set XDG_CACHE_HOME to another folder."
        )
    folder = cache / f"demo-{task.name}-{_digest(base, task)[:16]}"
    with disk_errors("write", folder):
        if folder.is_dir():
            return folder
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=cache) as place:
            made = Path(place) / folder.name
            assemble(base, task, made)
            try:
                made.rename(folder)
            except OSError:
                # Another process was faster.
                if not folder.is_dir():
                    raise
    return folder


def _digest(*folders: Path) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
            digest.update(file.read_bytes())
    return digest.hexdigest()
