"""Weights read from a file, without running any code in it; why a file cannot be read, in one sentence."""
import re
from pathlib import Path
from typing import NamedTuple

from timm.models import load_state_dict

__all__ = ['UnreadableWeightsError', 'Weights', 'read_checkpoint', 'reading_error', 'telling_line']


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


def read_checkpoint(weights: Weights) -> dict:
    """The state dict in a file, or the container that holds it, read by timm.

    Raises:
        FileNotFoundError: There is no such file.
        UnreadableWeightsError: It is no checkpoint, or a damaged one.
    """
    try:
        return load_state_dict(str(weights.path))
    except Exception as e:  # damaged pickles raise nearly anything
        raise reading_error(e, weights) from e


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
