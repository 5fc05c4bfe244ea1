"""Reading of checkpoint files: local ones, addresses, and those of the release by name."""

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


def read_checkpoint(checkpoint: Union[str, os.PathLike], map_location: Optional[str] = 'cpu') -> Any:
    """Content of a checkpoint, by weights-only loading.

    Args:
        checkpoint: a path; an http(s) address, which is downloaded once, to torch's cache; ``overlock_mm://NAME``, a file
            of the release; or what else mmengine reads.
        map_location: as in :func:`torch.load`.

    Raises:
        TypeError: ``checkpoint`` is neither.
        pickle.UnpicklingError: it holds something other than tensors, numbers and the like.
        OSError: there is no such file, it is damaged, or it cannot be downloaded; the message says what to do.
        ValueError: the release has no such file.
    """
    if not isinstance(checkpoint, (str, os.PathLike)) or not os.fspath(checkpoint):
        raise TypeError(f'checkpoint must be a path or an address, got {checkpoint!r}')
    checkpoint = os.fspath(checkpoint)
    if checkpoint.startswith(SCHEME):
        checkpoint = find_released(checkpoint).url
    if checkpoint.startswith(('http://', 'https://')):
        return _load(_download(checkpoint), map_location, f'delete it, and download {checkpoint} again')
    if Path(checkpoint).is_file():
        return _load(Path(checkpoint), map_location, 'get it again')
    # Other backends of mmengine's, or its error for a file that is not there.
    return CheckpointLoader.load_checkpoint(checkpoint, map_location=map_location, logger='current')


def released_state_dict(content: Any, checkpoint: str) -> OrderedDict[str, Tensor]:
    """The weights in the content of a checkpoint: flat, or under ``state_dict`` or ``model``.

    Raises:
        ValueError: there are none.
    """
    state_dict = content
    for key in ('state_dict', 'model'):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            state_dict = content[key]
            break
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state_dict.items()
    ):
        found = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f'{checkpoint} holds no weights, neither flat nor under state_dict or model; got {found}')
    # DistributedDataParallel puts "module." before every name.
    return OrderedDict((re.sub(r'^module\.', '', name), value) for name, value in state_dict.items())


def load_from_release(filename: str, map_location: Optional[str] = None) -> dict[str, Any]:
    """What mmengine's ``load_checkpoint`` calls for a file of the release: the weights, and the meta data if it has any.

    (mmengine logs the name of this function, less its first ten letters, as the name of the backend.)
    """
    released = find_released(filename)
    content = read_checkpoint(released.url, map_location)
    meta = content.get('meta', {}) if isinstance(content, Mapping) else {}
    return dict(state_dict=released_state_dict(content, filename), meta=meta)


def register_scheme() -> None:
    """Let all of OpenMMLab load files of the release, by ``overlock_mm://NAME`` or by their addresses."""
    CheckpointLoader.register_scheme((SCHEME, RELEASE), load_from_release, force=True)


def _download(url: str) -> Path:
    """The file of an address in torch's cache; downloaded by the first process if it is not there, and only if complete."""
    file = Path(torch.hub.get_dir()) / 'checkpoints' / url.rsplit('/', 1)[-1]
    by_hand = f'download {url} by other means and put it into {file.parent}, or give its path as the checkpoint'
    for is_my_turn in (get_rank() == 0, get_rank() != 0):
        if is_my_turn and not file.is_file():
            part = file.with_name(f'{file.name}.{os.getpid()}.part')
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(part))
                if _is_damaged(part):
                    raise OSError(f'what came is no checkpoint, or not the whole of it: {_look_of(part)}')
                part.replace(file)
            except (OSError, http.client.HTTPException) as error:
                raise OSError(f'{file.name} could not be downloaded ({error}); {by_hand}') from error
            finally:
                with contextlib.suppress(OSError):
                    part.unlink()
        barrier()
    return file


def _load(file: Path, map_location: Optional[str], remedy: str) -> Any:
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:
        # torch has many words for a damaged file; the file itself says more. What it lacks in the old format, without a
        # directory at its end, shows while it is read.
        ended = isinstance(error, (EOFError, IndexError, KeyError)) or 'EOF' in str(error)
        if _is_damaged(file, thoroughly=True) or (ended and not zipfile.is_zipfile(file)):
            raise OSError(f'{file} is damaged, or no checkpoint ({_look_of(file)}): {remedy}') from error
        raise


def _is_damaged(file: Path, thoroughly: bool = False) -> bool:
    """Whether a file is neither a whole zip file, as torch writes checkpoints, nor begins as its old format does."""
    if not zipfile.is_zipfile(file):
        return _start_of(file)[:1] != b'\x80'  # of a pickle
    if not thoroughly:
        return False
    with zipfile.ZipFile(file) as archive:
        return archive.testzip() is not None


def _start_of(file: Path) -> bytes:
    with file.open('rb') as opened:
        return opened.read(20)


def _look_of(file: Path) -> str:
    return f'{file.stat().st_size} bytes, that begin with {_start_of(file)!r}'
