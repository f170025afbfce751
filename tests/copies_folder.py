"""A folder of pictures with copies among them, indexed with a tiny model."""
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from timm_multigrain.demo.pictures import CLASSES, draw_picture
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.index import Index

from .tiny import tiny_model


def make_pictures(folder: Path, count: int = 18) -> Path:
    """PNG drawings 0.png, 1.png, ...; of 0 an identical file, of 1 a small JPEG, of 2 a mirror image."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = list(CLASSES)
    for i in range(count):
        draw_picture(names[i % len(names)], 96, rng).save(folder / f'{i}.png')
    shutil.copyfile(folder / '0.png', folder / 'a longer name.png')
    Image.open(folder / '1.png').resize((80, 80), Image.LANCZOS).save(folder / 'small.jpg', quality=95)
    Image.open(folder / '2.png').transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / 'mirror.png')
    return folder


def make_index(folder: Path, out: Path, **options) -> Index:
    """Index of a folder, with a tiny model of three named classes."""
    model = tiny_model()
    model.pretrained_cfg['label_names'] = ['boat', 'car', '<b>tree</b>']
    return Index.build([folder], out, model, Protocol(64), workers=0, progress=False, **options)
