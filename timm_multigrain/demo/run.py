"""The whole demo: pictures, two trainings, measurements, a saved model and a page to look at."""
import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from PIL import Image

from timm_multigrain.files import write_text
from timm_multigrain.hub import save_pretrained
from timm_multigrain.images.copies import COPY_TRANSFORMS, make_copies
from timm_multigrain.images.sources import read_image
from timm_multigrain.report.report import Answer, Neighbor, Query, Table, write_report

from .collection import make_collection
from .evaluation import CopySet, DemoScores, evaluate, make_copy_set
from .folder import PictureFolder, open_folder
from .training import TrainedModel, TrainSettings, train_model

__all__ = ['DemoResult', 'run_demo']

_KINDS = ('original', *COPY_TRANSFORMS)
_QUERIES = 6
_NEIGHBORS = 8  # as many as there are copies
_INTRO = (
    'Two models of the same kind, trained from scratch from the same seed, on the same pictures and augmentations, for '
    'the same number of steps. One learns the classes only; the other, MultiGrain, also that augmented copies of '
    'a picture belong together. Each is asked for the class of held-out pictures, and to find edited copies of a '
    'held-out picture among all held-out pictures and their copies.')


@dataclass(frozen=True)
class DemoResult:
    """What the demo found and wrote.

    Attributes:
        scores: Model name to its measurements.
        table: The same as a table.
        page: The HTML page.
        model_dir: The joint model, a timm folder.
    """
    scores: dict[str, DemoScores]
    table: Table
    page: Path
    model_dir: Path

    def __str__(self) -> str:
        return str(self.table)


def run_demo(
        output: str | os.PathLike,
        settings: TrainSettings,
        data_dir: str | os.PathLike | None = None,
        command: str = '',
) -> DemoResult:
    """Train classification-only and joint models, compare them, save the joint one and write the page.

    Args:
        output: Folder for the page, the model and results.json.
        settings: The joint model's training; the other one differs in lambda = 1 only.
        data_dir: Image folder with train/ and val/; None draws a picture collection below ``output``.
        command: Shown on the page.

    Raises:
        ValueError, FileNotFoundError: The folder cannot be trained on, or the settings are impossible.
        ImportError: matplotlib is missing.
    """
    import matplotlib  # noqa: F401 - say so now, not after minutes of training

    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    folder = open_folder(make_collection(output / 'pictures') if data_dir is None else data_dir)
    copies = make_copy_set(folder, settings.img_size)
    runs = {
        'classification only': dataclasses.replace(settings, classif_weight=1.0),
        'joint (MultiGrain)': settings,
    }
    models = [train_model(name, folder, run) for name, run in runs.items()]
    scores = {trained.name: evaluate(trained.model, copies) for trained in models}
    model_dir = _save(models[-1], folder, copies, output / 'model')
    table = _score_table(scores)
    _write_json(output / 'results.json', folder, settings, scores)
    page = write_report(
        output / 'index.html', 'MultiGrain demo', _INTRO, [table, _copy_table(scores)],
        curves={trained.name: _curves(trained, settings.epochs) for trained in models},
        curves_x='epoch', gallery=_gallery(folder, copies, scores), notes=_notes(folder, settings, model_dir),
        command=command)
    return DemoResult(scores, table, page, model_dir)


def _save(trained: TrainedModel, folder: PictureFolder, copies: CopySet, path: Path) -> Path:
    """Save the model, and see that what timm loads back measures the same."""
    size = tuple(copies.images.shape[-3:])
    model = trained.model.to(memory_format=torch.contiguous_format)
    save_pretrained(
        model, path, label_names=folder.class_names, data_config={'input_size': size, 'crop_pct': 224 / 256})
    loaded = timm.create_model(f'local-dir:{path}', pretrained=True).eval()
    x = copies.images[:8, 0].float() / 255
    with torch.inference_mode():
        if not torch.equal(loaded.embed(x), model.embed(x)):
            raise RuntimeError(f'The model loaded back from {path} does not give the same embeddings.')
    return path


def _score_table(scores: dict[str, DemoScores]) -> Table:
    headers = ['Model', 'top-1 (%)', 'copy mAP (%)']
    rows = [[name, s.top1, s.copy_map] for name, s in scores.items()]
    return Table(headers, rows, best=dict.fromkeys(headers[1:], 'max'), title='Classes and copies of held-out pictures')


def _copy_table(scores: dict[str, DemoScores]) -> Table:
    headers = ['Model', *COPY_TRANSFORMS]
    rows = [[name, *(s.copy_map_of[kind] for kind in COPY_TRANSFORMS)] for name, s in scores.items()]
    return Table(headers, rows, best=dict.fromkeys(headers[1:], 'max'), title='mAP (%) of each kind of copy alone')


def _curves(trained: TrainedModel, epochs: int) -> dict[str, tuple[list[float], list[float]]]:
    """Means over quarter epochs, at their middle."""
    curves = {}
    for name in ('cross-entropy', 'train top-1', 'margin loss', 'beta'):
        if name not in trained.history:
            continue
        values = trained.history[name]
        chunks = torch.tensor(values).chunk(4 * epochs)
        step = len(values) / epochs / len(chunks[0])
        curves[name] = ([(i + 0.5) / step for i in range(len(chunks))], [chunk.mean().item() for chunk in chunks])
    return curves


def _gallery(folder: PictureFolder, copies: CopySet, scores: dict[str, DemoScores]):
    """The same evenly spaced queries for each model: not chosen for their results."""
    spacing = max(1, len(folder.val) // _QUERIES)
    for query in range(spacing // 2, len(folder.val), spacing)[:_QUERIES]:
        picture = _picture(folder, query, 'original')
        caption = folder.class_names[copies.labels[query]]
        answers = []
        for name, score in scores.items():
            similarity = score.similarity[query].clone()
            similarity[query * len(_KINDS)] = -2.  # the query itself
            found = [
                _neighbor(folder, copies, query, index, similarity[index].item(), score)
                for index in similarity.topk(min(_NEIGHBORS, len(similarity) - 1)).indices.tolist()
            ]
            predicted = folder.class_names[score.predictions[query * len(_KINDS)]]
            answers.append(Answer(name, found, f'predicted class: {predicted}'))
        yield Query(picture, caption, answers)


def _neighbor(folder, copies: CopySet, query: int, index: int, similarity: float, score: DemoScores) -> Neighbor:
    number, kind = index // len(_KINDS), _KINDS[index % len(_KINDS)]
    relation = 'other'
    if number == query:
        relation = 'copy'
    elif copies.labels[number] == copies.labels[query]:
        relation = 'class'
    caption = f'{folder.class_names[copies.labels[number]]}, {kind}'
    return Neighbor(_picture(folder, number, kind), similarity, caption, relation)


def _picture(folder: PictureFolder, number: int, kind: str) -> Image.Image:
    image = read_image(folder.path(number))
    return image if kind == 'original' else make_copies(image, [kind])[kind]


def _notes(folder: PictureFolder, settings: TrainSettings, model_dir: Path) -> list[str]:
    return [
        f'{len(folder.train)} training and {len(folder.val)} held-out pictures of {len(folder.class_names)} classes.',
        f'{settings.model} at {settings.img_size} pixels, {settings.epochs} epochs, batches of {settings.batch_size} '
        f'({settings.num_repeats} augmented copies a picture in both trainings), seed {settings.seed}. Joint: lambda '
        f'{settings.classif_weight}, margin loss with {settings.sampling!r} negatives.',
        'Copy mAP: every held-out picture is a query; its 8 edited copies are to be found among all held-out pictures '
        'and all their copies, the query itself left out.',
        f"Load the joint model: import timm_multigrain; timm.create_model('local-dir:{model_dir}', pretrained=True)",
    ]


def _write_json(path: Path, folder: PictureFolder, settings: TrainSettings, scores: dict[str, DemoScores]) -> None:
    content = {
        'settings': dataclasses.asdict(settings),
        'train_pictures': len(folder.train),
        'val_pictures': len(folder.val),
        'scores': {
            name: {'top1': s.top1, 'copy_map': s.copy_map, 'copy_map_of': s.copy_map_of} for name, s in scores.items()},
    }
    write_text(path, json.dumps(content, indent=2))
