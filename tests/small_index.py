"""An index written without a model, for tests of what is done with one."""
import hashlib
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from timm_multigrain.index.records import RECORD
from timm_multigrain.index.store import Store, Writer

CLASSES = ['boat', 'car', 'tree']


def unit_vectors(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    """Random unit rows, (count, dim) float32."""
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_index(folder, vectors: np.ndarray, paths=None, classes=None, root='/pictures', dtype='float32') -> Path:
    """Make an index of these descriptors.

    Args:
        folder: Where to.
        vectors: (N, D).
        paths: Paths below root; numbered ones by default.
        classes: Number of each image's most probable class, of `CLASSES`.
        root: The folder they are said to be in.
        dtype: Of the descriptors.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = {
        'name': 'multigrain', 'trunk': 'test_resnet', 'source': None, 'options': {}, 'weights_sha256': '0' * 64,
        'pool': 'gem', 'p': [3.0], 'whitening': None, 'dim': vectors.shape[1], 'num_classes': len(CLASSES),
        'label_names': CLASSES, 'license': None}
    config = {'model': model, 'protocol': {'size': 64}, 'dtype': dtype, 'versions': {}}
    Writer.create(folder, config)
    with writer_of(folder) as writer:
        writer.add_root(os.fsencode(root))
        add_images(writer, vectors, paths, classes)
    return folder


def record(**fields) -> np.ndarray:
    """A row of `RECORD`; fields that are not given are 0."""
    row = np.zeros((), dtype=RECORD)
    for name, value in fields.items():
        row[name] = value
    return row


@contextmanager
def writer_of(folder):
    """A writer without the lock."""
    writer = Writer(Store(folder))
    try:
        yield writer
    finally:
        writer.close()


def add_images(writer: Writer, vectors: np.ndarray, paths=None, classes=None) -> None:
    """Append to an index and commit."""
    count = len(vectors)
    paths = [f'{i}.jpg' for i in range(count)] if paths is None else paths
    classes = [i % len(CLASSES) for i in range(count)] if classes is None else classes
    rows = np.array([record(
        width=640, height=480, bytes=1000 + i, mtime_ns=i, sha256=list(hashlib.sha256(str(i).encode()).digest()),
        classes=[classes[i], -1, -1, -1, -1], probabilities=[0.75, 0, 0, 0, 0]) for i in range(count)], dtype=RECORD)
    writer.add([os.fsencode(path) for path in paths], rows, vectors)
    writer.commit()


def write_files(index) -> None:
    """Files of the sizes and times that such an index says its pictures have; their content is nothing."""
    for i in range(len(index)):
        record = index.records(i)
        os.makedirs(os.path.dirname(record.path), exist_ok=True)
        with open(record.path, 'wb') as file:
            file.truncate(record.bytes)
        os.utime(record.path, ns=(record.mtime_ns, record.mtime_ns))


@contextmanager
def forked(function, *args):
    """A process that runs a function, quicker than a new one; the other end of the pipe it is given, and its number."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            function(write, *args)
        finally:
            os._exit(0)
    os.close(write)
    with open(read, 'rb', buffering=0) as pipe:
        try:
            yield pipe, child
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
