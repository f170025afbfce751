"""The card of a published model: README.md with the Hub's metadata, figures, and a usage snippet that runs.

A card has blocks between HTML comments, which every publication writes anew. What stands outside of them belongs to
people and is kept, as are metadata that this module does not set and figures that it did not write.
"""
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from timm_multigrain.images.sources import printable

from .metrics import Metric

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelCardData

__all__ = ['CITATION', 'CardFacts', 'is_generated', 'load_card', 'make_card', 'usage_snippet']

CITATION = """@article{berman2019multigrain,
  title   = {MultiGrain: a unified image embedding for classes and instances},
  author  = {Berman, Maxim and J{\\'e}gou, Herv{\\'e} and Vedaldi, Andrea and Kokkinos, Iasonas and Douze, Matthijs},
  journal = {arXiv preprint arXiv:1902.05509},
  year    = {2019}
}"""
_INTRO = (
    '[MultiGrain](https://arxiv.org/abs/1902.05509): one image embedding for classes, instances and copies. The logits '
    'tell the class; the same embedding, L2-normalised, finds the object and its copies. It needs the Python package '
    '`timm_multigrain`, a plug-in for [timm](https://github.com/huggingface/pytorch-image-models).')
_MARK = 'timm_multigrain'
_TAGS = ('multigrain', 'timm', 'image-classification', 'image-feature-extraction', 'image-retrieval', 'copy-detection')
_HEADINGS = {'model': None, 'usage': 'Usage', 'results': 'Results', 'citation': 'Citation'}
_NAMED = 50  # classes that are listed
_MODES = {1: "'L'", 3: "'RGB'", 4: "'RGBA'"}


@dataclass(frozen=True)
class CardFacts:
    """What a card says that the model does not know.

    Attributes:
        repo_id: USER/NAME.
        license: The Hub's identifier of the license of the weights, such as cc-by-nc-4.0.
        license_name: Name of a license 'other'.
        license_link: Its address.
        metrics: Figures of these weights.
        description: What the weights are and where they come from.
        datasets: Identifiers of the data sets that they were trained on.
    """
    repo_id: str
    license: str
    license_name: str | None = None
    license_link: str | None = None
    metrics: Sequence[Metric] = ()
    description: str | None = None
    datasets: Sequence[str] = ()


def make_card(model: nn.Module, facts: CardFacts, base: 'ModelCard | None' = None) -> 'ModelCard':
    """The card of a model.

    Args:
        model: The MultiGrain.
        facts: What it does not say itself.
        base: An earlier card, whose text and metadata are kept where they were not generated. It is not changed.
    """
    from huggingface_hub import ModelCard, ModelCardData

    blocks = {
        'model': _model_block(model, facts), 'usage': f'```python\n{usage_snippet(model, facts.repo_id)}```',
        'results': _results_block(facts.metrics), 'citation': f'```bibtex\n{CITATION}\n```'}
    if base is None:
        data = ModelCardData()
        _set_metadata(data, model, facts)
        return ModelCard(f'---\n{data.to_yaml()}\n---\n\n# {facts.repo_id.split("/")[-1]}\n{_layout(blocks)}')
    card = ModelCard(str(base))
    card.text = _refresh(card.text, blocks)
    _set_metadata(card.data, model, facts)
    return card


def load_card(path: Path, shown: str) -> 'ModelCard':
    """An earlier card.

    Args:
        path: README.md.
        shown: What it is called in errors.

    Raises:
        ValueError: It is not text, or its metadata cannot be read.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        text = path.read_bytes().decode('utf-8-sig')
        if not text.lstrip().startswith('---'):  # a card without metadata would be warned about
            text = _newline(text).join(['---', 'license: null', '---', text])
        return ModelCard(text)
    except (ValueError, TypeError, YAMLError) as e:
        raise ValueError(f'{shown} cannot be read ({" ".join(str(e).split())}): mend its metadata first.') from e


def is_generated(card: 'ModelCard') -> bool:
    """Whether the card is one that this module wrote, perhaps edited since."""
    return f'<!-- {_MARK} begin ' in card.text


def usage_snippet(model: nn.Module, repo_id: str) -> str:
    """Python that loads the model from the Hub and uses it."""
    mode = _MODES.get(model.in_chans)
    picture = f'Image.new({mode}, (640, 480))  # your picture: Image.open(path).convert({mode})'
    prepare = 'batch = transform(picture)[None]'
    if mode is None:  # more channels than pictures have
        size = model.pretrained_cfg['input_size'][1:]
        picture = f'torch.rand({model.in_chans}, {size[0]}, {size[1]})  # your image, normalised'
        prepare = 'batch = picture[None]'
    lines = [
        'import timm_multigrain  # registers the model with timm',
        'import timm',
        'import torch',
        'from PIL import Image' if mode else None,
        '',
        f"model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()",
        'config = timm.data.resolve_model_data_config(model)' if mode else None,
        'transform = timm.data.create_transform(**config, is_training=False)' if mode else None,
        f'picture = {picture}',
        prepare,
        'with torch.inference_mode():',
        f'    logits = model(batch)            # (1, {model.num_classes})' if model.num_classes else None,
        f'    descriptor = model.embed(batch)  # (1, {model.embed_dim}), L2-normalised: compare by dot product',
    ]
    return '\n'.join(line for line in lines if line is not None) + '\n'


def _model_block(model: nn.Module, facts: CardFacts) -> str:
    cfg = model.pretrained_cfg
    license_ = facts.license_name or facts.license
    rows = {
        'trunk': f'`{model.trunk_name}` of timm',
        'classes': _classes(model),
        'embedding': f'{model.embed_dim} components',
        'pooling': _pooling(model),
        'whitening': f'to {model.embed_dim} components' if model.whitened else 'none',
        'parameters': f'{sum(p.numel() for p in model.parameters()):,}',
        'input': f'{" x ".join(map(str, cfg["input_size"]))}, mean {_round(cfg["mean"])}, std {_round(cfg["std"])}',
        'license of the weights': f'[{license_}]({facts.license_link})' if facts.license_link else license_,
    }
    table = '\n'.join(['| | |', '|---|---|', *(f'| {name} | {value} |' for name, value in rows.items())])
    return '\n\n'.join(filter(None, [_INTRO, facts.description, table]))


def _classes(model: nn.Module) -> str:
    if not model.num_classes:
        return 'none, the output is the embedding'
    names = model.pretrained_cfg.get('label_names') or ()
    if isinstance(names, dict) or not 0 < len(names) <= _NAMED:
        return f'{model.num_classes}'
    return f'{model.num_classes}: {_cell(", ".join(html.escape(printable(name), quote=False) for name in names))}'


def _pooling(model: nn.Module) -> str:
    p = model.gem_p
    if p is None:
        return model.global_pool or 'none'
    if isinstance(p, list):
        return f'GeM, one p a channel, {min(p):.3g} to {max(p):.3g}'
    return f'GeM, p = {p:.4g}'


def _results_block(metrics: Sequence[Metric]) -> str:
    if not metrics:
        return 'No figures were recorded for these weights.'
    columns = ('task', 'dataset', 'metric', 'value', 'size', 'p', 'protocol', 'whitening', 'source')
    rows = ['| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns)]
    for m in metrics:
        command = f'`{m.command}`' if m.command else ''
        source = f'[{m.source_name or "link"}]({m.source_url})' if m.source_url else command
        dataset = f'{m.dataset}, {m.split}' if m.split else m.dataset
        cells = (m.task, dataset, m.metric, m.value, m.size, m.p, m.protocol, m.whitening, source)
        rows.append('| ' + ' | '.join(_cell(cell) for cell in cells) + ' |')
    return '\n'.join(rows)


def _cell(value: object) -> str:
    return 'none' if value is None else ' '.join(str(value).replace('|', '\\|').split())


def _layout(blocks: dict[str, str]) -> str:
    hint = f'<!-- {_MARK}: publishing again replaces what stands between its begin and end; the rest is yours. -->'
    parts = [f'\n{hint}\n']
    for name, heading in _HEADINGS.items():
        parts.append((f'\n## {heading}\n' if heading else '') + f'\n{_block(name, blocks[name])}\n')
    return ''.join(parts)


def _block(name: str, text: str) -> str:
    return f'<!-- {_MARK} begin {name} -->\n{text}\n<!-- {_MARK} end {name} -->'


def _refresh(text: str, blocks: dict[str, str]) -> str:
    """An earlier text with its blocks replaced; all of them appended if it has none."""
    newline = _newline(text)
    found = False
    for name, content in blocks.items():
        pattern = rf'<!-- {_MARK} begin {name} -->.*?<!-- {_MARK} end {name} -->'
        block = _block(name, content).replace('\n', newline)
        text, count = re.subn(pattern, lambda match, block=block: block, text, count=1, flags=re.DOTALL)
        found = found or bool(count)
    return text if found else text.rstrip() + newline + _layout(blocks).replace('\n', newline)


def _set_metadata(data: 'ModelCardData', model: nn.Module, facts: CardFacts) -> None:
    changed = data.get('license') != facts.license
    data['license'] = facts.license
    for name in ('license_name', 'license_link'):
        value = getattr(facts, name)
        if value or changed:
            data[name] = value
    data['library_name'] = data.get('library_name') or 'timm'
    task = 'image-classification' if model.num_classes else 'image-feature-extraction'
    data['pipeline_tag'] = data.get('pipeline_tag') or task
    data['tags'] = list(dict.fromkeys([*_as_list(data.get('tags')), *_TAGS]))
    data['datasets'] = list(dict.fromkeys([*_as_list(data.get('datasets')), *facts.datasets])) or None
    theirs = [result for result in data.get('eval_results') or [] if Metric.from_eval_result(result) is None]
    results = theirs + [metric.to_eval_result() for metric in facts.metrics]
    data['eval_results'] = results or None
    data['model_name'] = (data.get('model_name') or facts.repo_id.split('/')[-1]) if results else None


def _newline(text: str) -> str:
    return '\r\n' if '\r\n' in text else '\n'


def _as_list(value: object) -> list:
    return [value] if isinstance(value, str) else list(value or [])


def _round(values: Sequence[float]) -> str:
    return f'({", ".join(f"{value:.4g}" for value in values)})'
