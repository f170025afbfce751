"""A checkpoint as a timm folder: config.json and model.safetensors."""
import os
from dataclasses import dataclass
from pathlib import Path

from timm_multigrain.files import file_sha256
from timm_multigrain.models.open import open_model

from . import save_pretrained

__all__ = ['Conversion', 'convert_checkpoint']


@dataclass(frozen=True)
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
    """Convert a checkpoint to a folder that timm loads.

    What is known of the authors' published files (license, description, origin, preprocessing) goes into config.json;
    they are recognized by tag, address or file name. The license of other weights is their owner's to say.

    Args:
        source: File or http(s) address of a checkpoint of the original implementation, of train.py or of bare weights,
            or a registered tag such as 'multigrain_resnet50.fb_p3_l05_in1k', see `open_model`.
        out_dir: Folder to write; an earlier one is replaced, its README.md kept.
        model_name: Model that the weights are of. None: told by what the file says, or by their names and shapes.

    Raises:
        FileNotFoundError: The file is not found, on the disk or on the server.
        FileExistsError: ``out_dir`` holds other things than a saved model.
        ValueError: The weights are of an unknown network or not of that model, or not finite; unknown model name.
        OSError: The folder cannot be written.
        RuntimeError: The file cannot be downloaded or read, or does not load back to the same outputs.
    """
    model, out_dir = open_model(source, architecture=model_name), Path(out_dir)
    save_pretrained(model, out_dir)
    return Conversion(
        model.pretrained_cfg['architecture'], out_dir, len(model.state_dict()),
        sum(p.numel() for p in model.parameters()), file_sha256(out_dir / 'config.json'),
        file_sha256(out_dir / 'model.safetensors'))
