"""What a model was fitted for: the settings that its whitening and its p belong to, kept in its own configuration.

They stand in the notes of timm's pretrained_cfg, one JSON object a note, so that they stay with the model through
saving, loading and publishing.
"""
import json
import math
from collections.abc import Iterable
from typing import Any

import torch

from timm_multigrain.files import check_json, parse_json

__all__ = ['fitted', 'json_p', 'note_fitted', 'whitened_for', 'with_note']

KINDS = ('whitening', 'p')
_FORM = {'p': (float, str, [float], None), 'protocol': {'size': int, 'kind': str}}


def with_note(notes: Iterable[str] | None, kind: str, settings: dict[str, Any]) -> list[str]:
    """The notes with one of this kind that replaces an earlier one."""
    return [*_others(notes, kind), f'{kind}: {json.dumps(settings)}']


def note_fitted(model: torch.nn.Module, kind: str, settings: dict[str, Any]) -> None:
    """Keep in the model what a fit of this kind belongs to.

    Args:
        model: Model; its pretrained_cfg is replaced.
        kind: 'whitening' or 'p'.
        settings: What JSON can hold.
    """
    notes = with_note(model.pretrained_cfg.get('notes'), kind, settings)
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, 'notes': notes}


def fitted(model: torch.nn.Module, kind: str) -> dict[str, Any] | None:
    """The settings that `note_fitted` kept, None if there are none."""
    notes = (getattr(model, 'pretrained_cfg', None) or {}).get('notes')
    for note in notes if isinstance(notes, (list, tuple)) else ():
        if isinstance(note, str) and note.startswith(f'{kind}: {{'):
            try:
                settings = parse_json(note.partition(': ')[2])
                check_json(settings, {name: form for name, form in _FORM.items() if name in settings}, kind)
                return settings
            except ValueError:
                return None
    return None


def whitened_for(model: torch.nn.Module) -> dict[str, Any]:
    """Size and kind of the protocol that the model's whitening was fitted for, as arguments of a Protocol."""
    settings = fitted(model, 'whitening') if getattr(model, 'whitened', False) else None
    protocol = (settings or {}).get('protocol')
    return {name: protocol[name] for name in ('size', 'kind') if name in protocol} if isinstance(protocol, dict) else {}


def json_p(p: float | list[float] | None) -> float | str | list[float] | None:
    """An exponent as strict JSON can hold it."""
    if isinstance(p, list):
        return [json_p(value) for value in p]
    return 'inf' if p == math.inf else p


def _others(notes: Iterable[str] | None, kind: str) -> list[str]:
    notes = [notes] if isinstance(notes, str) else notes or ()
    return [note for note in notes if not str(note).startswith(f'{kind}: {{')]
