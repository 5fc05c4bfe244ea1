"""Reading checkpoint files: local paths, addresses, and released files by name."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union

import torch
from mmengine.dist import barrier, get_rank
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from .release import RELEASE, SCHEME, find_released


def check_checkpoint_name(checkpoint: Union[str, os.PathLike]) -> str:
    """Return a path, an address or ``overlock_mm://NAME`` as a str.

    Raises:
        TypeError: ``checkpoint`` is neither a str nor a path, or is empty.
    """
    if not isinstance(checkpoint, (str, os.PathLike)) or not os.fspath(checkpoint):
        raise TypeError(f'checkpoint must be a path, an address or {SCHEME}NAME, got {checkpoint!r}')
    return os.fspath(checkpoint)


def read_checkpoint(checkpoint: Union[str, os.PathLike], map_location: Optional[str] = 'cpu') -> Any:
    """Read a checkpoint with torch's weights-only loading.

    Args:
        checkpoint: a path, an http(s) address, ``overlock_mm://NAME``, or anything else that mmengine can read. A file from
            an address is downloaded to torch's cache once.
        map_location: as in :func:`torch.load`.

    Raises:
        TypeError: ``checkpoint`` is neither a str nor a path.
        pickle.UnpicklingError: the file holds other objects than tensors, numbers and plain containers.
        OSError: the file is missing or damaged, or the download failed. The message says what to do.
        ValueError: the release has no file of this name.
    """
    checkpoint = check_checkpoint_name(checkpoint)
    if checkpoint.startswith(SCHEME):
        checkpoint = find_released(checkpoint).url
    if checkpoint.startswith(('http://', 'https://')):
        return _load(_download(checkpoint), map_location, f'delete it, and download {checkpoint} again')
    if Path(checkpoint).is_file():
        return _load(Path(checkpoint), map_location, 'replace it with a complete copy')
    # mmengine's other backends. For a missing file it raises FileNotFoundError.
    return CheckpointLoader.load_checkpoint(checkpoint, map_location=map_location, logger='current')


def released_state_dict(content: Any, checkpoint: str) -> OrderedDict[str, Tensor]:
    """Return the weights of a checkpoint's content: flat, or under ``state_dict`` or ``model``.

    Args:
        content: as :func:`read_checkpoint` returns it.
        checkpoint: name of the file, for the error message.

    Raises:
        ValueError: the content has no weights.
    """
    candidates = [content.get(key) for key in ('state_dict', 'model')] if isinstance(content, Mapping) else []
    state_dict = next((candidate for candidate in candidates if isinstance(candidate, Mapping)), content)
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state_dict.items()
    ):
        found = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f'{checkpoint} has no weights, neither flat nor under state_dict or model; got {found}')
    # DistributedDataParallel puts "module." before every name.
    return OrderedDict((re.sub(r'^module\.', '', name), value) for name, value in state_dict.items())


def load_from_release(filename: str, map_location: Optional[str] = None) -> dict[str, Any]:
    """Read a released file for mmengine's ``load_checkpoint``: its weights, and its metadata if it has any.

    mmengine drops the first ten letters of this function's name and logs the rest as the name of the backend.
    """
    released = find_released(filename)
    content = read_checkpoint(released.url, map_location)
    meta = content.get('meta', {}) if isinstance(content, Mapping) else {}
    return dict(state_dict=released_state_dict(content, filename), meta=meta)


def register_scheme() -> None:
    """Let every OpenMMLab loader read released files, by ``overlock_mm://NAME`` or by their addresses."""
    CheckpointLoader.register_scheme((SCHEME, RELEASE), load_from_release, force=True)


def _download(url: str) -> Path:
    """Return the file of an address in torch's cache. A missing file is downloaded; an incomplete download is removed."""
    file = Path(torch.hub.get_dir()) / 'checkpoints' / url.rsplit('/', 1)[-1]
    by_hand = f'download {url} by other means and put it into {file.parent}, or give its path as the checkpoint'
    # Rank 0 downloads first. Other ranks find its file, unless they run on a machine with another cache.
    for is_my_turn in (get_rank() == 0, get_rank() != 0):
        if is_my_turn and not file.is_file():
            part = file.with_name(f'{file.name}.{os.getpid()}.part')
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(part))
                if _is_damaged(part):
                    raise OSError(f'the download is incomplete or not a checkpoint: {_describe(part)}')
                part.replace(file)
            except (OSError, http.client.HTTPException) as error:
                raise OSError(f'{file.name} could not be downloaded ({error}); {by_hand}') from error
            finally:
                with contextlib.suppress(OSError):
                    part.unlink()
        barrier()
    return file


def _load(file: Path, map_location: Optional[str], advice: str) -> Any:
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:
        # torch raises many kinds of errors for a damaged file, so the file itself is checked. A truncated file in the old
        # format has no directory that could be checked, but reading it hits the end.
        hit_end = isinstance(error, (EOFError, IndexError, KeyError)) or 'EOF' in str(error)
        if _is_damaged(file, check_contents=True) or (hit_end and not zipfile.is_zipfile(file)):
            raise OSError(f'{file} is damaged or not a checkpoint ({_describe(file)}): {advice}') from error
        raise


def _is_damaged(file: Path, check_contents: bool = False) -> bool:
    """Whether a file is neither a complete zip file (torch's format) nor starts like a pickle (torch's old format)."""
    if not zipfile.is_zipfile(file):
        return _first_bytes(file)[:1] != b'\x80'
    if not check_contents:
        return False
    with zipfile.ZipFile(file) as archive:
        return archive.testzip() is not None


def _first_bytes(file: Path) -> bytes:
    with file.open('rb') as opened:
        return opened.read(20)


def _describe(file: Path) -> str:
    return f'{file.stat().st_size} bytes, starting with {_first_bytes(file)!r}'
