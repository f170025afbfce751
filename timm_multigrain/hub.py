"""Models on disk in the layout of the Hugging Face Hub: config.json and model.safetensors, as timm reads them."""
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn as nn
from timm.models import save_for_hf

from .files import fsync

__all__ = ['save_pretrained']


def save_pretrained(
        model: nn.Module,
        directory: str | os.PathLike,
        label_names: Sequence[str] | None = None,
        data_config: dict | None = None,
) -> Path:
    """Save a model so that ``timm.create_model('local-dir:<directory>', pretrained=True)`` gives it back.

    The folder appears whole or not at all, and is loaded back and compared with the model before this returns.

    Args:
        model: A MultiGrain made by ``timm.create_model``, in any mode; it is not changed.
        directory: Folder to write; an earlier one is replaced.
        label_names: Names of the classes, in the order of the classifier's rows.
        data_config: Preprocessing the weights were trained for (input_size, crop_pct, mean, std, interpolation).

    Returns:
        The folder.

    Raises:
        ValueError: The number of label names is not that of the classes.
        FileExistsError: The path is a file, or a folder that holds other things than a saved model.
        RuntimeError: What was written does not load back to the same outputs.
    """
    directory = Path(directory)
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f'{len(label_names)} label names for {model.num_classes} classes: give one name a class.')
    if directory.exists() and not (directory.is_dir() and _holds_model_or_nothing(directory)):
        raise FileExistsError(f'{directory} exists and is not a saved model: name another folder.')
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f'.{directory.name}.', dir=directory.parent))
    try:
        config = {'label_names': list(label_names)} if label_names is not None else None
        save_for_hf(model, str(unfinished), model_config=config, safe_serialization=True, data_config=data_config)
        _check_saved(model, unfinished)
        for path in [*unfinished.iterdir(), unfinished]:
            fsync(path)
        os.chmod(unfinished, 0o755)
        if directory.exists():
            shutil.rmtree(directory)
        os.rename(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def _holds_model_or_nothing(directory: Path) -> bool:
    return {path.name for path in directory.iterdir()} <= {'config.json', 'model.safetensors'}


@torch.no_grad()
def _check_saved(model: nn.Module, directory: Path) -> None:
    loaded = timm.create_model(f'local-dir:{directory}', pretrained=True).eval()
    parameter = next(model.parameters())
    x = torch.linspace(-2, 2, 3 * 64 * 64).reshape(1, 3, 64, 64)[:, :1].expand(1, loaded.in_chans, 64, 64)
    size = loaded.pretrained_cfg['input_size'][1:] if loaded.pretrained_cfg.get('fixed_input_size') else None
    x = nn.functional.interpolate(x, size=size, mode='bilinear') if size else x
    training = model.training
    expected = model.eval()(x.to(parameter))
    model.train(training)
    if not torch.equal(loaded.to(parameter)(x.to(parameter)), expected):
        raise RuntimeError(f'The model saved to {directory} does not give the same outputs when it is loaded back.')
