"""The index folder that a build writes to: opened with its model checked, or made with what describes the model."""
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from timm_multigrain.version import __version__

from .errors import OtherModel
from .manifest import MANIFEST
from .model import SAVED, check_same_model, describe_model, open_described, options_of
from .store import CONFIG, DATA_FILES, Store, StoreWriter

__all__ = ['OpenedIndex', 'check_place', 'open_or_create']


@dataclass
class OpenedIndex:
    """An index to write to, its model where that was opened already, and its protocol."""
    store: Store
    model: torch.nn.Module | None
    protocol: Any

    def get_model(self) -> torch.nn.Module:
        """Opened when there is something to embed, which often there is not."""
        if self.model is None:
            self.model = open_described(self.store.config['model'], self.store.folder)
        return self.model


def check_place(out: Path) -> None:
    """Whether an index can be there: it is one, what a killed process left of a new one, an empty folder or nothing.

    Raises:
        FileExistsError: It is something else.
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise FileExistsError(f'{out} is a file: name a folder for the index.')
    if not (out / MANIFEST).exists():
        own = {'lock', CONFIG, SAVED, *(f'{name}.1.bin' for name in DATA_FILES)}
        other = sorted(path.name for path in out.iterdir() if path.name not in own and not path.name.startswith('.'))
        other += [path.name for path in out.iterdir() if path.is_symlink()]  # somebody else's: nothing is written there
        if other:
            raise FileExistsError(f'{out} holds other things ({other[0]!r}): name a new folder for the index.')


def open_or_create(out: Path, model, protocol, model_options, half: bool) -> OpenedIndex:
    """The index in a folder, or a new one without images; arguments as of `build_index`. The lock must be held."""
    from .queries import protocol_from_json

    if not (out / MANIFEST).exists():
        if model is None:
            raise ValueError(f'{out} is a new index: name the model that it is to be made with.')
        return _create(out, model, protocol, model_options, half)
    if model is None and model_options:
        raise ValueError(f'{", ".join(model_options)} without a model: name the model, or leave it to the index.')
    store = Store(out)
    described = store.config['model']
    if model is not None:
        shown = model if isinstance(model, str) else 'This model'
        if isinstance(model, str):
            from timm_multigrain.models.open import open_model
            model = open_model(model, **{**options_of(described), **(model_options or {})})
        check_same_model(described, model, out, shown)
    own = protocol_from_json(store.config['protocol'])
    if callable(protocol):
        model = open_described(described, out) if model is None else model
        protocol = protocol(model)
    if protocol is not None and protocol != own:
        raise OtherModel(f'{out} was built with {own}, not {protocol}: leave those options out, or make another index.')
    return OpenedIndex(store, model, own)


def _create(out: Path, model, protocol, model_options, half: bool) -> OpenedIndex:
    import timm

    from timm_multigrain.embed.protocol import Protocol
    from timm_multigrain.models.open import open_model
    from timm_multigrain.models.save import save_pretrained

    source = None
    if isinstance(model, str):
        source = os.path.abspath(model) if os.path.exists(model) else None
        model = open_model(model, **(model_options or {}))
    if source is None:  # also of a name: an index is searched without asking the network for what it says
        save_pretrained(model, out / SAVED)
    protocol = Protocol.for_model(model) if protocol is None else protocol(model) if callable(protocol) else protocol
    StoreWriter.create(out, {
        'model': describe_model(model, source, model_options),
        'protocol': protocol.to_dict(), 'dim': model.embed_dim, 'dtype': 'float16' if half else 'float32',
        'versions': {'timm_multigrain': __version__, 'timm': timm.__version__, 'torch': torch.__version__,
                     'python': sys.version.split()[0]}})
    return OpenedIndex(Store(out), model, protocol)
