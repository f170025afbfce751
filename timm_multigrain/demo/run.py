"""The whole demo: pictures, two trainings, what the models find, a saved model and a page to look at."""
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from timm_multigrain.embed.embedder import embed_images, in_order
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.files import write_text
from timm_multigrain.images.copies import COPY_TRANSFORMS, make_copies
from timm_multigrain.images.sources import ImageSource
from timm_multigrain.measure.metrics import mean_average_precision
from timm_multigrain.models import MultiGrain
from timm_multigrain.models.save import save_pretrained
from timm_multigrain.report.report import Answer, Neighbor, Query, Table, write_report

from .pictures import make_collection
from .training import Pictures, TrainSettings, open_pictures, protocol_of, train_model

KINDS = ('original', *COPY_TRANSFORMS)
SHARES = (50, 10, 30, 70, 90)  # per cent: which queries are shown, in the order of their gain by the joint model
NEIGHBORS = 8  # as many as there are copies
INTRO = (
    'Two kinds of model, trained from scratch from the same seeds, on the same pictures and augmentations, in the same '
    'number of steps. One learns the classes only; the other, MultiGrain, also that augmented copies of a picture '
    'belong together. Each is asked for the class of held-out pictures, and for edited copies of them among all.')


class EditedCopies(ImageSource):
    """Pictures and their edited copies, in the order picture, kind."""

    def __init__(self, pictures: ImageSource):
        self.pictures = pictures
        self.names = [f'{name}, {kind}' for name in pictures.names for kind in KINDS]
        self._last = None, None  # number and picture: its copies follow each other

    def load(self, i: int, exif: bool = True) -> Image.Image:
        number, kind = divmod(i, len(KINDS))
        if self._last[0] != number:
            self._last = number, self.pictures.load(number, exif)
        picture = self._last[1]
        return make_copies(picture, [KINDS[kind]])[KINDS[kind]] if kind else picture


class Scores(NamedTuple):
    """Measurements of one model on held-out pictures.

    Attributes:
        top1: Per cent classified right.
        copy_ap: (pictures,) AP in per cent of finding all edited copies of a picture among all pictures and copies.
        copy_map_of: Its mean for each kind of copy alone.
        similarity: (pictures, pictures * kinds) cosine similarities, database in the order picture, kind.
        predictions: (pictures,) predicted classes.
    """
    top1: float
    copy_ap: np.ndarray
    copy_map_of: dict[str, float]
    similarity: torch.Tensor
    predictions: torch.Tensor


def measure(model: MultiGrain, pictures: ImageSource, protocol: Protocol, workers: int | None = None) -> Scores:
    """Top-1 of held-out pictures, and mAP of finding their edited copies among all of them."""
    found = in_order(list(embed_images(model, EditedCopies(pictures), protocol, logits=True, workers=workers)))
    vectors, predictions = found.vectors, found.logits[::len(KINDS)].argmax(1)
    similarity = vectors[::len(KINDS)] @ vectors.T
    top1 = (predictions == torch.tensor(pictures.labels)).double().mean().item()
    kinds = range(1, len(KINDS))
    of_kind = {KINDS[k]: copy_ap(similarity, [k]).mean() for k in kinds}
    return Scores(100 * top1, copy_ap(similarity, kinds), of_kind, similarity, predictions)


def copy_ap(similarity: torch.Tensor, wanted: Sequence[int]) -> np.ndarray:
    """AP in per cent of these kinds of copies, (pictures,); the query and its other copies are left out of its list.

    Args:
        similarity: (pictures, pictures * kinds), the database in the order of `EditedCopies`.
        wanted: Positions in `KINDS`.
    """
    others = np.setdiff1d(np.arange(len(KINDS)), list(wanted))
    base = np.arange(len(similarity))[:, None] * len(KINDS)
    return 100 * mean_average_precision(similarity, list(base + list(wanted)), list(base + others)).ap


def run_demo(
        output: str | os.PathLike,
        settings: TrainSettings,
        data_dir: str | os.PathLike | None = None,
        command: str = '',
) -> Table:
    """Train classification-only and joint models, compare them, save a joint one and write the page.

    Args:
        output: Folder for index.html, the model and results.json.
        settings: The joint models' trainings; the others differ in lambda = 1 only.
        data_dir: Image folder with train/ and val/; None draws a picture collection below ``output``.
    """
    import matplotlib  # noqa: F401 - say so now, not after minutes of training

    output = Path(output)
    pictures = open_pictures(make_collection(output / 'pictures') if data_dir is None else data_dir)
    lambdas = {'classification only': 1.0, 'joint (MultiGrain)': settings.classif_weight}
    found, scores, curves = {name: [] for name in lambdas}, {}, {}
    for seed in range(settings.seed, settings.seed + settings.seeds):
        for name, classif_weight in lambdas.items():
            run = dataclasses.replace(settings, classif_weight=classif_weight, seed=seed)
            model, history = train_model(f'{name}, seed {seed}', pictures, run)
            protocol = protocol_of(model, run)
            scores[name] = s = measure(model, pictures.val, protocol, run.workers)
            curves[name] = _curves(history, run.epochs)
            found[name].append({'seed': seed, 'top1': s.top1, 'copy_map': s.copy_ap.mean(), **s.copy_map_of})
    save_pretrained(model, output / 'model', pictures.class_names, {
        'input_size': (3, protocol.size, protocol.size), 'crop_pct': protocol.crop_pct,
        'interpolation': protocol.interpolation, 'mean': protocol.mean, 'std': protocol.std})
    write_text(output / 'results.json', json.dumps({
        'settings': dataclasses.asdict(settings), 'train_pictures': len(pictures.train),
        'val_pictures': len(pictures.val), 'scores': found}, indent=2))
    table = _table('Classes and copies of held-out pictures', {'top1': 'top-1 (%)', 'copy_map': 'copy mAP (%)'}, found)
    by_kind = _table('mAP (%) of each kind of copy alone', {kind: kind for kind in COPY_TRANSFORMS}, found)
    write_report(output / 'index.html', 'MultiGrain demo', INTRO, [table, by_kind], curves, _gallery(pictures, scores),
                 _notes(pictures, settings, output / 'model'), command, curves_x='epoch')
    return table


def _table(title: str, columns: dict[str, str], found: dict[str, list[dict[str, float]]]) -> Table:
    """Means over the seeds, with standard deviations where there are several."""
    def cell(values: list[float]) -> str:
        spread = f' ± {np.std(values, ddof=1):.1f}' if len(values) > 1 else ''
        return f'{np.mean(values):.1f}{spread}'

    rows = [[name, *(cell([run[column] for run in runs]) for column in columns)] for name, runs in found.items()]
    return Table(title, ['Model', *columns.values()], rows)


def _curves(history: dict[str, list[float]], epochs: int) -> dict[str, tuple[list[float], list[float]]]:
    """Means over quarter epochs, at their middle."""
    curves = {}
    for name in ('cross-entropy', 'train top-1', 'margin loss', 'beta'):
        if name in history:
            chunks = np.array_split(history[name], min(4 * epochs, len(history[name])))
            curves[name] = ([(i + 0.5) * epochs / len(chunks) for i in range(len(chunks))],
                            [chunk.mean() for chunk in chunks])
    return curves


def _gallery(pictures: Pictures, scores: dict[str, Scores]) -> Iterator[Query]:
    """The query of median gain, then others from little gain to much."""
    copies, classes = EditedCopies(pictures.val), [pictures.class_names[label] for label in pictures.val.labels]

    def neighbor(query: int, index: int, similarity: float) -> Neighbor:
        number, kind = divmod(index, len(KINDS))
        relation = 'copy' if number == query else 'class' if classes[number] == classes[query] else 'other'
        return Neighbor(copies.load(index), similarity, f'{classes[number]}, {KINDS[kind]}', relation)

    before, joint = (score.copy_ap for score in scores.values())
    order = np.argsort(joint - before, kind='stable')
    for share in SHARES:
        query, answers = int(order[share * len(order) // 100]), []
        for name, score in scores.items():
            similarity = score.similarity[query].clone()
            similarity[query * len(KINDS)] = -2.  # the query itself
            nearest = similarity.topk(min(NEIGHBORS, len(similarity) - 1)).indices.tolist()
            predicted = pictures.class_names[score.predictions[query]]
            answers.append(Answer(name, [neighbor(query, index, similarity[index].item()) for index in nearest],
                                  f'average precision {score.copy_ap[query]:.0f} %, predicted class: {predicted}'))
        yield Query(pictures.val.load(query), f'{classes[query]}, more gain than {share} % of the queries', answers)


def _notes(pictures: Pictures, settings: TrainSettings, model_dir: Path) -> list[str]:
    return [
        f'{len(pictures.train)} training and {len(pictures.val)} held-out pictures of {len(pictures.class_names)} '
        f'classes. {settings.model} at {settings.img_size} pixels, {settings.epochs} epochs, batches of '
        f'{settings.batch_size} with {settings.num_repeats} augmented copies of a picture in both trainings. Joint: '
        f'lambda {settings.classif_weight}, margin loss with {settings.sampling!r} negatives.',
        f'Mean ± standard deviation over {settings.seeds} seeds from {settings.seed} on; the rest is of the last one.',
        f'Copy mAP: every held-out picture is a query; its {len(COPY_TRANSFORMS)} edited copies are to be found among '
        'all held-out pictures and all their copies, itself left out. No example is chosen: the first is the median.',
        f"Load the joint model: import timm_multigrain; timm.create_model('local-dir:{model_dir}', pretrained=True)",
    ]
