"""Reading of checkpoint files: local ones, addresses, and those of the release by name."""

from __future__ import annotations

import http.client
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from mmengine.dist import barrier, get_rank
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from .model_zoo import RELEASE, SCHEME, find_released


def read_checkpoint(checkpoint: str, map_location: Optional[str] = 'cpu') -> Any:
    """Content of a checkpoint, by weights-only loading.

    Args:
        checkpoint: a path; an http(s) address, which is downloaded once, to torch's cache; ``overlock_mm://NAME``, a file
            of the release; or what else mmengine reads.
        map_location: as in :func:`torch.load`.

    Raises:
        pickle.UnpicklingError: it holds something other than tensors, numbers and the like.
        OSError: there is no such file, it is incomplete, or it cannot be downloaded; the message says what to do.
        ValueError: the release has no such file.
    """
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
    if not isinstance(state_dict, Mapping) or not all(isinstance(value, Tensor) for value in state_dict.values()):
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
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f'{file.name}.{os.getpid()}.part')
            try:
                torch.hub.download_url_to_file(url, str(part))
                if _is_incomplete(part):
                    raise OSError(f'it ended after {part.stat().st_size} bytes, before the end of the file')
                part.replace(file)
            except (OSError, http.client.HTTPException) as error:
                raise OSError(f'{file.name} could not be downloaded ({error}); {by_hand}') from error
            finally:
                part.unlink(missing_ok=True)
        barrier()
    return file


def _load(file: Path, map_location: Optional[str], remedy: str) -> Any:
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:
        # torch has many words for it; the file itself says whether it is whole.
        if isinstance(error, EOFError) or _is_incomplete(file):
            raise OSError(f'{file} is incomplete ({file.stat().st_size} bytes): {remedy}') from error
        raise


def _is_incomplete(file: Path) -> bool:
    """Whether it begins as torch's zip files do and lacks their end, or is empty."""
    with file.open('rb') as opened:
        start = opened.read(2)
    return not start or (start == b'PK' and not zipfile.is_zipfile(file))
