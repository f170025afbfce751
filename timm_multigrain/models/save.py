"""Models on disk in the layout of the Hugging Face Hub: config.json and model.safetensors, as timm reads them.

config.json also holds the SHA-256 of model.safetensors, to check later that the two belong together.
"""
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError
from timm.models import save_for_hf

from timm_multigrain.files import check_json, file_sha256, fsync, parse_json, write_text

from .weights import CONFIG, SHA256, WEIGHTS

CARD = 'README.md'


def save_pretrained(
        model: nn.Module,
        directory: str | os.PathLike,
        label_names: Sequence[str] | None = None,
        data_config: dict | None = None,
) -> Path:
    """Save a model so that ``timm.create_model('local-dir:<directory>', pretrained=True)`` gives it back.

    What was written is loaded back and compared before it takes its place. A new folder appears whole or not at all; of
    an earlier model the two files are replaced, and its README.md stays.

    Args:
        model: A MultiGrain, in any mode; it is not changed.
        directory: Folder to write.
        label_names: Names of the classes, in the order of the classifier's rows. None: those that the model has.
        data_config: Preprocessing the weights were trained for (input_size, crop_pct, mean, std, interpolation).

    Raises:
        ValueError: The number of label names is not that of the classes, or the weights hold NaN.
        FileExistsError: The path is a file, or a folder that holds other things than a saved model.
        OSError: The folder cannot be written.
        RuntimeError: What was written does not load back to the same outputs, or another process saves there.
    """
    directory = Path(directory)
    with model_folder(directory) as unfinished:
        write_model(model, unfinished, label_names, data_config, shown=directory)
    return directory


def check_model_folder(directory: str | os.PathLike) -> None:
    """Whether a model can take this place, to be known before a long run; FileExistsError if other things are there."""
    path = Path(directory)
    if path.exists() and not (path.is_dir() and {p.name for p in path.iterdir()} <= {CONFIG, WEIGHTS, CARD}):
        raise FileExistsError(f'{directory} exists and is not a saved model: name another folder.')


@contextmanager
def model_folder(directory: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside ``directory`` whose files go there once the block has ended without an error.

    A new directory is the temporary one renamed. In an existing one the files are replaced one by one, config.json
    first: whoever comes in between finds that its hash is not that of the weights. What a killed run has left in the
    temporary folder is overwritten by the next; errors as of `save_pretrained`.
    """
    directory = Path(directory)
    check_model_folder(directory)
    work = directory.with_name(f'.{directory.name}.unfinished')
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # free again when its process ends
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f'another process saves to {directory}: wait for it, or name another folder.') from None
        try:
            _remove_files(work)
            check_model_folder(work)
            yield work
            for path in [*work.iterdir(), work]:
                fsync(path)
            if not directory.exists():
                work.rename(directory)
            for path in sorted(work.iterdir() if work.exists() else (), key=lambda path: path.name != CONFIG):
                os.replace(path, directory / path.name)
        finally:
            if work.exists():
                _remove_files(work)
                with suppress(OSError):  # other things are in it
                    work.rmdir()
    finally:
        os.close(lock)


def _remove_files(folder: Path) -> None:
    """Of a model, whole or half written."""
    for path in folder.iterdir():
        if path.name.lstrip('.').startswith((CONFIG, WEIGHTS, CARD)):
            path.unlink()


def write_model(
        model: nn.Module,
        directory: Path,
        label_names: Sequence[str] | None = None,
        data_config: dict | None = None,
        pretrained_cfg: dict | None = None,
        shown: str | os.PathLike | None = None,
) -> nn.Module:
    """Write a model's two files to an existing folder; the model as it was loaded back and compared, in eval mode.

    Arguments and errors as of `save_pretrained`; ``pretrained_cfg`` sets fields of timm's configuration, such as
    license, and ``shown`` is the name of the folder in errors.
    """
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f'{len(label_names)} label names for {model.num_classes} classes: give one name per class.')
    broken = next((k for k, v in model.state_dict().items() if v.is_floating_point() and v.isnan().any()), None)
    if broken is not None:
        raise ValueError(f'{broken} of the model holds NaN: take a checkpoint of before the training diverged.')
    config = {'pretrained_cfg': dict(pretrained_cfg or {})}
    if label_names is not None:
        config['label_names'] = list(label_names)
    described, weights = directory / CONFIG, directory / WEIGHTS
    try:
        save_for_hf(model, str(directory), model_config=config, safe_serialization=True, data_config=data_config)
        weights.chmod(described.stat().st_mode)  # safetensors writes files that nobody else can read
        config = json.loads(described.read_text(encoding='utf-8'))
        write_text(described, json.dumps({**config, SHA256: file_sha256(weights)}, indent=2))
    except (OSError, SafetensorError) as e:
        raise OSError(f'{WEIGHTS} could not be written to {shown or directory}: {e}; free space there, or name another '
                      'folder.') from e
    return _load_back(model, directory, shown or directory)


@torch.no_grad()
def _load_back(model: nn.Module, directory: Path, shown: str | os.PathLike) -> nn.Module:
    loaded = timm.create_model(f'local-dir:{directory}', pretrained=True).eval()
    size = loaded.input_sizes.size
    x = torch.linspace(-2, 2, loaded.in_chans * size[0] * size[1]).view(1, loaded.in_chans, *size)
    x = x.to(next(model.parameters()))
    training = model.training
    try:
        expected = model.eval()(x)
    finally:
        model.train(training)
    if not torch.equal(loaded.to(x)(x), expected):
        raise RuntimeError(f'The model saved to {shown} does not give the same outputs when it is loaded back.')
    return loaded


# --- what a model was fitted for: in the notes of timm's pretrained_cfg, one JSON object per note, so that the settings
# stay with the model through saving, loading and publishing

_SETTINGS = {'p': (float, str, [float], None), 'protocol': {'size': int, 'kind': str}}


def note_fitted(model: torch.nn.Module, kind: str, settings: dict[str, Any]) -> None:
    """Keep in the model what a fit ('whitening' or 'p') belongs to, in place of an earlier one of its kind."""
    notes = [note for note in _notes(model) if not note.startswith(f'{kind}: {{')]
    notes.append(f'{kind}: {json.dumps(settings)}')
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, 'notes': notes}


def fitted(model: torch.nn.Module, kind: str) -> dict[str, Any] | None:
    """The settings that `note_fitted` kept, or None."""
    note = next((note for note in _notes(model) if note.startswith(f'{kind}: {{')), None)
    try:
        settings = parse_json(note.partition(': ')[2]) if note else None
        check_json(settings, {name: form for name, form in _SETTINGS.items() if name in (settings or ())}, kind)
        return settings
    except ValueError:
        return None


def whitened_for(model: torch.nn.Module) -> dict[str, Any]:
    """Size and kind of the protocol that the model's whitening was fitted for, as arguments of a Protocol."""
    settings = fitted(model, 'whitening') if getattr(model, 'whitened', False) else None
    protocol = (settings or {}).get('protocol', {})
    return {name: protocol[name] for name in ('size', 'kind') if name in protocol}


def _notes(model: torch.nn.Module) -> list[str]:
    notes = (getattr(model, 'pretrained_cfg', None) or {}).get('notes') or ()
    return [str(note) for note in ([notes] if isinstance(notes, str) else notes)]
