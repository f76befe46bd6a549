"""Compiled kernels on disk, so that the next process starts warm.

A kernel is machine code that gets loaded into the process, so the folder belongs to the user alone
(mode 0700, checked each time), and a file is loaded only if its hash is the one that was noted when
it was built. A damaged file is built again. Files appear under their final names complete, so that
any number of processes may share the folder without locks.

The folder is ``$STQ_CACHE_DIR``, else ``stq_compile`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. If it
cannot be used (it is no folder of this user's, it is full, libraries in it cannot be loaded),
kernels are built in a folder of this process alone, with a warning.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import warnings
from pathlib import Path

from stq_compile.errors import KernelCacheWarning

VARIABLE = "STQ_CACHE_DIR"
ROOM = 1 << 20
"""Bytes that a folder must take to count as not full; a kernel has a tenth of that."""

_USED: dict[Path, Path] = {}
"""The folder that is used in the place of each one that was asked for."""
_LOCK = threading.Lock()


def folder() -> Path:
    """The folder of this user, made and checked."""
    return _checked(_named())


def chosen() -> tuple[Path, str]:
    """The folder that kernels should be kept in, made; and why they cannot be, or nothing."""
    path = _named()
    return path, _problem(path)


def _named() -> Path:
    chosen = os.environ.get(VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(chosen) if chosen else Path(base) / "stq_compile"


def _checked(path: Path) -> Path:
    with _LOCK:
        used = _USED.get(path)
    if used is not None and used.is_dir():
        return used
    reason = _problem(path)
    if reason:
        return give_up(path, reason)
    with _LOCK:
        return _USED.setdefault(path, path)


def give_up(path: Path, reason: str) -> Path:
    """Use a folder of this process alone from now on, and say so; returns that folder."""
    with _LOCK:
        used = _USED.get(path, path)
        if used != path and used.is_dir():
            return used
        private = Path(tempfile.mkdtemp(prefix="stq_compile_"))  # mode 0700
        atexit.register(_remove, private, os.getpid())
        _USED[path] = private
    warnings.warn(KernelCacheWarning(folder=path, reason=reason, variable=VARIABLE), stacklevel=2)
    return private


def _remove(private: Path, owner: int) -> None:
    """Remove the folder of a process when it ends, and not when one that it forked does."""
    if os.getpid() == owner:
        shutil.rmtree(private, ignore_errors=True)


def to_blame(path: Path, error: Exception) -> bool:
    """Whether it is the folder's fault that a kernel could not be built or loaded in it."""
    if path not in _USED:  # it is of this process alone already
        return False
    given_up = _USED[path] != path  # by another thread
    return given_up or isinstance(error, OSError) or _full(path)


def _full(path: Path) -> bool:
    """Whether a folder takes no more files, or no larger ones."""
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(ROOM))
    except OSError:
        return True
    return False


def _problem(path: Path) -> str:
    """Why kernels cannot be kept in a folder; empty if they can, and then it exists."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = _unsafe(path)
        if not reason:
            with tempfile.TemporaryFile(dir=path):  # it can be written
                return ""
    except OSError as error:
        reason = str(error)
    return reason


def _unsafe(path: Path) -> str:
    """Why kernels must not be loaded from a folder; empty if they may."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return "it is not a folder"
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        return "it belongs to another user"
    above = path.parent.stat().st_mode
    if above & stat.S_IWOTH and not above & stat.S_ISVTX:
        return "anybody may replace it, since its parent folder is open to all"
    if found.st_mode & 0o077:
        path.chmod(0o700)
    return ""


def find(root: Path, key: str) -> Path | None:
    """The library that was kept in a folder under a key, if it is whole."""
    library, noted = _paths(root, key)
    try:
        if noted.read_text() == _digest(library.read_bytes()):
            return library
    except (OSError, UnicodeDecodeError):
        pass
    return None


def keep(root: Path, key: str, built: Path) -> Path:
    """Keep a library that was just built in a folder, and its hash."""
    library, noted = _paths(root, key)
    digest = built.with_suffix(".sha256")
    digest.write_text(_digest(built.read_bytes()))
    os.replace(built, library)
    os.replace(digest, noted)
    return library


def _paths(root: Path, key: str) -> tuple[Path, Path]:
    return root / f"{key}.so", root / f"{key}.sha256"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
