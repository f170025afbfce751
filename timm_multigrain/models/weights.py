"""Files of weights: read without running any code in them, and told whose network they are of by names and shapes."""
import argparse
import json
import re
import zipfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

from timm_multigrain.files import file_sha256

from .checkpoint import model_state

__all__ = [
    'SHA256', 'UnreadableWeightsError', 'Weights', 'check_hash', 'check_numbers', 'read_file', 'reading_error',
    'recognize_model', 'refuse_program', 'telling_line', 'trunk_shapes']

SHA256 = 'weights_sha256'  # where config.json holds the hash of model.safetensors beside it

# the networks the original implementation can train, the frequent ones first
_CANDIDATES = (
    'multigrain_resnet50', 'multigrain_resnet18', 'multigrain_resnet34', 'multigrain_resnet101',
    'multigrain_resnet152', 'multigrain_senet154', 'multigrain_pnasnet5large', 'multigrain_nasnetamobile')


class UnreadableWeightsError(RuntimeError):
    """A file that is not a checkpoint, or no longer one."""


class Weights(NamedTuple):
    """Weights as they are handed to timm.

    Attributes:
        shown: Name in errors.
        path: File that they are read from, None for a dict.
        remedy: What to do if they cannot be read, as the end of a sentence.
        replaces: Whether timm is given the file in place of the source that the configuration names.
    """
    shown: str
    path: Path | None = None
    remedy: str = 'give another file'
    replaces: bool = False


def read_file(weights: Weights) -> Any:
    """What torch.save or safetensors wrote to a file: tensors, numbers, texts, and timm's arguments (a Namespace).

    Raises:
        FileNotFoundError: The file does not exist.
        UnreadableWeightsError: It is not a checkpoint, or a damaged one, or a program.
    """
    path = weights.path
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file
            return load_file(path)
        refuse_program(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            # mapped, so that the state of the optimizer is not read with the weights
            return torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:  # damaged files raise nearly anything
        raise reading_error(e, weights) from e


def refuse_program(path: Path) -> None:
    """Refuse a TorchScript archive, which is a program: some versions of torch.load run it.

    Raises:
        UnreadableWeightsError: It is one.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith('constants.pkl') or name.startswith('code/') or '/code/' in name for name in names):
        raise UnreadableWeightsError('it is a TorchScript program, which is never run')


def check_hash(folder: Path) -> None:
    """Whether the model.safetensors of a folder is the one that its config.json was written with, if that says so.

    Raises:
        UnreadableWeightsError: It is another one, or a damaged one.
    """
    try:
        expected = json.loads((folder / 'config.json').read_text(encoding='utf-8')).get(SHA256)
    except (OSError, ValueError, AttributeError):
        return  # timm says what is wrong with it
    if expected is not None and file_sha256(folder / 'model.safetensors') != expected:
        raise UnreadableWeightsError('it is not the file that config.json was saved with (its SHA-256 is another)')


def check_numbers(state: Any) -> None:
    """Whether a state dict is one: names, and plain tensors of real numbers.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(state, dict):
        raise ValueError(f'its state dict is of type {type(state).__name__}.')
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f'{name!r:.50} in its state dict is not the name of a weight.')
        if not isinstance(value, torch.Tensor):
            if not name.endswith('pool.p') or isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f'{name!r:.100} in its state dict is of type {type(value).__name__}, not a tensor.')
        elif value.is_complex() or value.is_quantized or value.layout != torch.strided:
            raise ValueError(f'{name!r:.100} in its state dict is a tensor of {value.dtype}, {value.layout}: plain '
                             'tensors of real numbers are needed.')


def reading_error(error: Exception, weights: Weights) -> Exception:
    """The error that says which file could not be read, why, and the way out."""
    path = weights.path
    if isinstance(error, FileNotFoundError) and path is not None and not path.exists():
        return FileNotFoundError(f'{weights.shown} does not exist: check the path of the weights.')
    return UnreadableWeightsError(
        f'{weights.shown} cannot be read as weights: {_cause(error, path)}; {weights.remedy}.')


def telling_line(error: BaseException) -> str:
    """The line of an error that says most: torch's have headings and advice around it."""
    unpickling = re.search(r'WeightsUnpickler error:\s*([^\n]+)', str(error))
    if unpickling:
        return unpickling[1].rstrip('.:; ')
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[1] if len(lines) > 1 and lines[0].startswith('Error(s) in loading') else lines[0]
    return line[:200].rstrip('.:; ')


def _cause(error: Exception, path: Path | None) -> str:
    if isinstance(error, UnreadableWeightsError):
        return str(error)
    if path is None or not path.exists():
        return telling_line(error)
    if path.is_dir():
        return 'it is a folder'
    try:
        with open(path, 'rb') as file:
            start = file.read(512)
    except OSError as e:
        return f'{e.strerror}'
    if not start:
        return 'the file is empty'
    if start.lstrip().startswith(b'<'):
        return 'it is a web page'
    if start[8:9] == b'{' and path.suffix != '.safetensors':
        return 'it may be safetensors, which are expected under a name that ends in .safetensors'
    code = re.search(r'GLOBAL ([\w.]+)', f'{error} {error.__cause__}')
    if code:
        return f'it asks to run Python code ({code[1]}), which is never done'
    return f'it is cut off, damaged or something else ({telling_line(error.__cause__ or error)})'


def recognize_model(state_dict: dict) -> str:
    """Name of the model whose trunk has exactly the weights of a checkpoint.

    Args:
        state_dict: The original's container or state dict, or a state dict of ours.

    Raises:
        ValueError: It is none of the networks that the original implementation can train.
    """
    found = trunk_shapes(model_state(state_dict))
    for name in _CANDIDATES:
        if _shapes_of(name) == found:
            return name
    if not found:
        raise ValueError(f'It is no checkpoint of the original implementation: it starts with {list(state_dict)[:3]}; '
                         'name the model that it is of.')
    raise ValueError(f'The trunk of the checkpoint ({len(found)} weights, {next(iter(found))!r} the first) is none '
                     f'of {", ".join(_CANDIDATES)}: name the model that it is of.')


def trunk_shapes(state: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a trunk's weights in a state dict of ours; counters, which old files lack, left out."""
    return {
        k: tuple(v.shape) for k, v in state.items() if k.startswith('trunk.') and not k.endswith('num_batches_tracked')}


@cache
def _shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device('meta'):  # shapes without memory or arithmetic
        return trunk_shapes(timm.create_model(name).state_dict())
