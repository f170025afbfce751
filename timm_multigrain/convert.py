"""A checkpoint of the original implementation as a timm folder: config.json and model.safetensors."""
import dataclasses
import difflib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg

from timm_multigrain.hub import save_pretrained
from timm_multigrain.hub.verify import file_sha256
from timm_multigrain.models.checkpoint import model_state
from timm_multigrain.models.pretrained import use_cached
from timm_multigrain.models.reading import Weights, read_checkpoint
from timm_multigrain.models.recognize import recognize_model

from .download import download

__all__ = ['Conversion', 'convert_checkpoint']

# what a configuration says of the published weights, and not of weights that someone trained with the same program
_OF_THE_WEIGHTS = ('url', 'tag', 'license', 'description', 'notes', 'origin_url', 'test_input_size')


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        model_name: Registered name of the model.
        directory: The folder that was written.
        num_tensors: Tensors in it.
        num_parameters: Numbers in those of them that are trained.
        config_sha256: SHA-256 of config.json, in hexadecimal digits.
        weights_sha256: SHA-256 of model.safetensors.
    """
    model_name: str
    directory: Path
    num_tensors: int
    num_parameters: int
    config_sha256: str
    weights_sha256: str

    def __str__(self) -> str:
        return '\n'.join((
            f'{self.model_name} in {self.directory}: {self.num_tensors} tensors, {self.num_parameters:,} parameters',
            f'sha256 {self.config_sha256}  config.json',
            f'sha256 {self.weights_sha256}  model.safetensors',
            f"timm.create_model('local-dir:{self.directory}', pretrained=True) gives the same outputs.",
        ))


def convert_checkpoint(
        source: str | os.PathLike,
        out_dir: str | os.PathLike,
        model_name: str | None = None,
) -> Conversion:
    """Convert a checkpoint of the original implementation to a folder that timm loads.

    What is known of the authors' published files (license, description, origin, preprocessing) goes into config.json;
    they are recognized by tag, address or file name. The license of other weights is their owner's to say.

    Args:
        source: File, http(s) address, or a registered tag such as 'multigrain_resnet50.fb_p3_l05_in1k'.
        out_dir: Folder to write; an earlier one is replaced, its README.md kept.
        model_name: Model that the weights are of, a `multigrain_*` name. None: told by their names and shapes.

    Raises:
        FileNotFoundError: There is no such file, on the disk or on the server.
        FileExistsError: ``out_dir`` holds other things than a saved model.
        ValueError: The weights are of an unknown network or not of that model, or not finite; unknown model name.
        OSError: The folder cannot be written.
        RuntimeError: The file cannot be downloaded or read, or does not load back to the same outputs.
    """
    if model_name is not None:
        _check_model_name(model_name)
    source, out_dir = f'{source}', Path(out_dir)
    tag = None if Path(source).is_file() else _tag_of(source)
    if tag is not None:
        url = get_pretrained_cfg(tag).url
        return use_cached(url, lambda path: _convert_file(path, source, out_dir, model_name, tag))
    with _local_file(source) as path:
        return _convert_file(path, source, out_dir, model_name, _tag_of_file(path.name))


def _official() -> dict[str, str]:
    """Tag -> address of the published weights."""
    urls = {name: get_pretrained_cfg(name).url for name in timm.list_models('multigrain*', pretrained=True)}
    return {name: url for name, url in urls.items() if url}


def _tag_of(source: str) -> str | None:
    """The tag that a source names: by itself, as a model's default one, or by the address of its weights."""
    cfg = get_pretrained_cfg(source) if source.startswith('multigrain') and timm.is_model(source) else None
    name = f'{source}.{cfg.tag}' if cfg is not None and '.' not in source else source
    return next((tag for tag, url in _official().items() if name in (tag, url)), None)


def _tag_of_file(name: str) -> str | None:
    return next((tag for tag, url in _official().items() if Path(urlparse(url).path).name == name), None)


@contextmanager
def _local_file(source: str) -> Iterator[Path]:
    if not source.startswith(('http://', 'https://')):
        if not Path(source).is_file():
            raise FileNotFoundError(
                f'{source} is neither a file, nor an http(s) address, nor one of the tags '
                f'{", ".join(_official())}.')
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix='multigrain-') as folder:
        yield download(source, Path(folder) / (Path(urlparse(source).path).name or 'weights.pth'))


def _convert_file(path: Path, shown: str, out_dir: Path, model_name: str | None, tag: str | None) -> Conversion:
    state_dict = read_checkpoint(Weights(shown, path, 'download or copy it again'))
    try:
        name = model_name or recognize_model(state_dict)
        num_classes = _num_classes(model_state(state_dict))
    except ValueError as e:
        raise ValueError(f'{shown}: {e}') from e
    try:
        model = timm.create_model(
            name, pretrained=True, pretrained_cfg=_configuration(name, tag),
            pretrained_cfg_overlay=dict(file=str(path), source=None, num_classes=num_classes))
    except ValueError as e:  # it names the file, which may be a temporary one
        raise ValueError(str(e).replace(str(path), shown)) from e
    save_pretrained(model, out_dir)
    return Conversion(
        name, out_dir, len(model.state_dict()), sum(p.numel() for p in model.parameters()),
        file_sha256(out_dir / 'config.json'), file_sha256(out_dir / 'model.safetensors'))


def _num_classes(state: dict[str, torch.Tensor]) -> int:
    weight = state.get('head.fc.weight')
    return 0 if weight is None else len(weight)


def _configuration(name: str, tag: str | None) -> PretrainedCfg:
    """timm's configuration of a model: of the published weights, or of others of the same kind."""
    if tag is not None and tag.split('.')[0] == name:
        return get_pretrained_cfg(tag)
    return dataclasses.replace(get_pretrained_cfg(name), **dict.fromkeys(_OF_THE_WEIGHTS))


def _check_model_name(name: str) -> None:
    known = timm.list_models('multigrain_*')
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2) or known
        raise ValueError(f'there is no MultiGrain model {name!r}: did you mean {" or ".join(near)}?')
