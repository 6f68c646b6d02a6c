"""Named files out of a folder or an official .tar.gz, which is read in memory and never unpacked to disk."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from filtrun.data.images import readable
from filtrun.errors import UserError

_LARGEST = 1 << 29  # the largest official file is 184 MB; more is a broken or hostile header


def read_folder(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The files `names` of `folder`.

    Raises:
        UserError: one is missing, unreadable or absurdly large.
    """
    found = {}
    for name in names:
        path = folder / name
        with readable(path):
            if not path.is_file():
                raise UserError(f"{path} is missing; the set needs {', '.join(names)} in that folder")
            _check_size(str(path), path.stat().st_size)
            found[name] = path.read_bytes()
    return found


def read_tar(archive: Path, folder: str, names: Sequence[str]) -> dict[str, bytes]:
    """The members ``folder/name`` of a .tar.gz, in one pass.

    Raises:
        UserError: a link or a path that leads outside the archive is in it, a wanted member is missing, or it is
            cut off or corrupt.
    """
    wanted = {f"{folder}/{name}": name for name in names}
    found: dict[str, bytes] = {}
    try:
        with readable(archive), tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                path = member.name.removeprefix("./")
                if member.issym() or member.islnk() or path.startswith("/") or ".." in path.split("/"):
                    raise UserError(f"{archive} holds a link or a path outside itself ({member.name!r}); refused")
                if path in wanted:
                    stream = tar.extractfile(member) if member.isreg() else None
                    if stream is None:
                        raise UserError(f"{archive}: {member.name!r} is not a regular file")
                    _check_size(f"{archive}: {path}", member.size)
                    found[wanted[path]] = stream.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive} is truncated or not a .tar.gz ({error}); get it again") from error
    missing = [path for path, name in wanted.items() if name not in found]
    if missing:
        raise UserError(f"{archive} has no {missing[0]!r}")
    return found


def _check_size(where: str, size: int) -> None:
    if size > _LARGEST:
        raise UserError(f"{where} has {size} bytes, more than any official file; refused")
