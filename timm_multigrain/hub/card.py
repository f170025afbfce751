"""The card of a published model: README.md with the Hub's metadata, figures, and a usage snippet that runs.

A card has blocks between HTML comments, which every publication writes anew. What stands outside of them belongs to
people and is kept, as are metadata that this module does not set and figures that it did not write.
"""
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from timm_multigrain.files import check_json, printable
from timm_multigrain.measure.results import Metric

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CITATION = """@article{berman2019multigrain,
  title   = {MultiGrain: a unified image embedding for classes and instances},
  author  = {Berman, Maxim and J{\\'e}gou, Herv{\\'e} and Vedaldi, Andrea and Kokkinos, Iasonas and Douze, Matthijs},
  journal = {arXiv preprint arXiv:1902.05509},
  year    = {2019}
}"""
_INTRO = (
    '[MultiGrain](https://arxiv.org/abs/1902.05509): one image embedding for classes, instances and copies. The logits '
    'predict the class; the same embedding, L2-normalised, finds the object and its copies. It needs the Python '
    'package `timm_multigrain`, a plug-in for [timm](https://github.com/huggingface/pytorch-image-models).')
_MARK = 'timm_multigrain'
_TAGS = ('multigrain', 'timm', 'image-classification', 'image-feature-extraction', 'image-retrieval', 'copy-detection')
_HINT = f'<!-- {_MARK}: publishing again replaces what stands between its begin and end; the rest is yours. -->'
_NAMED = 50  # classes that are listed
_TEXTS = (str, [str], None)
_FORM = {'license': (str, None), 'license_name': (str, None), 'license_link': (str, None), 'library_name': (str, None),
         'pipeline_tag': (str, None), 'model_name': (str, None), 'tags': _TEXTS, 'datasets': _TEXTS}
_COLUMNS = ('task', 'dataset', 'metric', 'value', 'size', 'p', 'protocol', 'whitening', 'source')


def make_card(
        model: nn.Module,
        repo_id: str,
        license: str,
        license_name: str | None = None,
        license_link: str | None = None,
        metrics: Sequence[Metric] = (),
        description: str | None = None,
        datasets: Sequence[str] = (),
        base: 'ModelCard | None' = None,
) -> 'ModelCard':
    """The card of a MultiGrain; arguments as of `publish`.

    ``base`` is an earlier card, whose text and metadata are kept where they were not generated. It is not changed.
    """
    from huggingface_hub import ModelCard

    name = repo_id.split('/')[-1]
    shown = f'[{license_name or license}]({license_link})' if license_link else license_name or license
    blocks = {
        'model': '\n\n'.join(filter(None, [_INTRO, description, _facts(model, shown)])),
        'usage': f'```python\n{usage_snippet(model, repo_id)}```',
        'results': _results(metrics), 'citation': f'```bibtex\n{CITATION}\n```'}
    card = ModelCard(f'---\nlicense: null\n---\n\n# {name}\n' if base is None else str(base))
    card.text = _refresh(card.text, blocks)
    data = card.data
    same = data.get('license') == license
    data['license'] = license
    data['license_name'] = license_name or (data.get('license_name') if same else None)
    data['license_link'] = license_link or (data.get('license_link') if same else None)
    data['library_name'] = data.get('library_name') or 'timm'
    task = 'image-classification' if model.num_classes else 'image-feature-extraction'
    data['pipeline_tag'] = data.get('pipeline_tag') or task
    data['tags'] = _united(data.get('tags'), _TAGS)
    data['datasets'] = _united(data.get('datasets'), datasets) or None
    theirs = [result for result in data.get('eval_results') or [] if Metric.from_eval_result(result) is None]
    data['eval_results'] = theirs + [metric.to_eval_result() for metric in metrics] or None
    data['model_name'] = (data.get('model_name') or name) if data['eval_results'] else None
    return card


def load_card(path: Path, shown: str) -> 'ModelCard':
    """An earlier card; a ValueError says, of the file by its shown name, that its metadata cannot be read."""
    from huggingface_hub import ModelCard

    try:
        text = path.read_bytes().decode('utf-8-sig')
        if not text.lstrip().startswith('---'):  # a card without metadata would be warned about
            text = f'---\nlicense: null\n---\n{text}'
        card = ModelCard(text)
        check_json({name: card.data.get(name) for name in _FORM}, _FORM, 'its metadata')
        str(card)  # figures that cannot be grouped
        return card
    except Exception as e:  # whatever the Hub's reader runs into
        raise ValueError(f'{shown} cannot be read ({" ".join(str(e).split())[:300]}): mend its metadata first.') from e


def is_generated(card: 'ModelCard') -> bool:
    """Whether the card is one that this module wrote, perhaps edited since."""
    return f'<!-- {_MARK} begin ' in card.text


def own_figures(card: 'ModelCard | None') -> list[Metric]:
    """The figures in a card that `make_card` wrote."""
    results = card.data.get('eval_results') or [] if card is not None else []
    return [metric for metric in map(Metric.from_eval_result, results) if metric is not None]


def usage_snippet(model: nn.Module, repo_id: str) -> str:
    """Python that loads the model from the Hub and uses it."""
    lines = ['import timm_multigrain  # registers the model with timm', 'import timm', 'import torch']
    create = f"model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()"
    if model.in_chans == 3:
        lines += [
            'from PIL import Image', '', create,
            'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)',
            "picture = Image.new('RGB', (640, 480))  # your picture: Image.open(path).convert('RGB')",
            'batch = transform(picture)[None]']
    else:
        size = ', '.join(map(str, model.pretrained_cfg['input_size'][1:]))
        lines += ['', create, f'batch = torch.rand(1, {model.in_chans}, {size})  # your images, normalised']
    lines.append('with torch.inference_mode():')
    if model.num_classes:
        lines.append(f'    logits = model(batch)            # (1, {model.num_classes})')
    lines.append(f'    descriptor = model.embed(batch)  # (1, {model.embed_dim}), L2-normalised: compare by a product')
    return '\n'.join(lines) + '\n'


def _facts(model: nn.Module, license_: str) -> str:
    """Table of what the model is."""
    cfg = model.pretrained_cfg
    classes = str(model.num_classes or 'none, the output is the embedding')
    names = cfg.get('label_names') or ()
    if not isinstance(names, dict) and 0 < len(names) <= _NAMED:
        classes += ': ' + ', '.join(html.escape(printable(name), quote=False) for name in names)
    p = model.gem_p
    pooling = (model.global_pool or 'none' if p is None else f'GeM, p = {p:.4g}' if not isinstance(p, list) else
               f'GeM, one p per channel, {min(p):.3g} to {max(p):.3g}')
    if model.global_pool == 'trunk':
        own = model._model_args.get('trunk_pool')
        pooling = "the trunk's own" + (f', {own}' if own else '')
    mean, std = ('(' + ', '.join(f'{value:.4g}' for value in cfg[key]) + ')' for key in ('mean', 'std'))
    return _table(('', ''), [
        ('trunk', f'`{model.trunk_name}` of timm'),
        ('classes', classes),
        ('embedding', f'{model.embed_dim} components'),
        ('pooling', pooling),
        ('whitening', f'to {model.embed_dim} components' if model.whitened else 'none'),
        ('parameters', f'{sum(p.numel() for p in model.parameters()):,}'),
        ('input', f'{" x ".join(map(str, cfg["input_size"]))}, mean {mean}, std {std}'),
        ('license of the weights', license_),
    ])


def _results(metrics: Sequence[Metric]) -> str:
    if not metrics:
        return 'No figures were recorded for these weights.'
    rows = []
    for m in metrics:
        command = f'`{m.command}`' if m.command else ''
        source = f'[{m.source_name or "link"}]({m.source_url})' if m.source_url else command
        dataset = f'{m.dataset}, {m.split}' if m.split else m.dataset
        rows.append((m.task, dataset, m.metric, m.value, m.size, m.p, m.protocol, m.whitening, source))
    return _table(_COLUMNS, rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def shown(cell: object) -> str:
        text = 'none' if cell is None else ' '.join(str(cell).split())
        return text.replace('|', '\\|').replace('<', '&lt;')

    cells = [[shown(cell) for cell in row] for row in rows]
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [columns, ['---'] * len(columns), *cells])


def _refresh(text: str, blocks: dict[str, str]) -> str:
    """A text with its blocks replaced; all of them appended if it has none."""
    found, appended = False, f'\n{_HINT}\n'
    for name, content in blocks.items():
        begin, end = f'<!-- {_MARK} begin {name} -->', f'<!-- {_MARK} end {name} -->'
        block = f'{begin}\n{content}\n{end}'
        appended += ('' if name == 'model' else f'\n## {name.capitalize()}\n') + f'\n{block}\n'
        text, count = re.subn(
            f'{begin}.*?{end}', lambda match, block=block: block, text, count=1, flags=re.DOTALL)
        found = found or bool(count)
    return text if found else f'{text.rstrip()}\n{appended}'


def _united(given: str | Sequence[str] | None, more: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*([given] if isinstance(given, str) else given or []), *more]))
