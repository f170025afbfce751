"""Copies found in a real collection, by edit: recall and precision of dedup, mAP of search.

    python benchmarks/dedup.py --data-dir DIR --model MODEL --work WORK [--images 300] [--results FILE]

DIR has the folders classes, photos and instances, which are indexed. 300 of the images in classes/val, photos and
instances are edited, every edit of every one is a file, and the files are indexed too. Then, for one edit after the
other, the copies made by it are put among the originals, and dedup is run with its defaults; at last with all of them
at once. A copy is found if it is in one group with its original. Precision is the share of the pairs of a copy and
another file in its group that are of one original. Search: each copy is a query, its original the one relevant image.
"""
import argparse
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from timm_multigrain.files import write_text
from timm_multigrain.images.sources import read_image
from timm_multigrain.index import Index
from timm_multigrain.index.dedup import EDITS, find_copies

FOLDERS = ('classes', 'photos', 'instances')


class Part:
    """Some rows of an index, as an index."""

    def __init__(self, index, rows):
        self.index, self.rows = index, np.asarray(rows)
        self.columns, self.vectors = index.columns[self.rows], np.asarray(index.vectors)[self.rows]
        self.protocol = index.protocol

    def __len__(self):
        return len(self.rows)

    def path_of(self, row):
        return self.index.path_of(int(self.rows[row]))

    def records(self, row):
        return self.index.records(int(self.rows[row]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--model', required=True)
    parser.add_argument('--work', type=Path, required=True)
    parser.add_argument('--images', type=int, default=300)
    parser.add_argument('--results', type=Path)
    args = parser.parse_args()
    folders = [args.data_dir / name for name in FOLDERS]
    start = time.monotonic()
    base = Index.build(folders, args.work / 'originals', args.model)
    print(f'{len(base):,} images indexed in {time.monotonic() - start:.0f} s')
    chosen = choose(base, args.data_dir, args.images)
    make_copies(base, chosen, args.work / 'copies')
    if not (args.work / 'with-copies').exists():  # the originals need not be embedded again
        shutil.copytree(args.work / 'originals', args.work / 'with-copies')
    index = Index.build([*folders, args.work / 'copies'], args.work / 'with-copies', args.model)
    results = measure(index, base, args.work / 'copies')
    show(results)
    if args.results:
        write_text(args.results, json.dumps(results, indent=1))


def choose(base, data_dir, number):
    """Rows of the images to edit."""
    allowed = [str((data_dir / name).resolve()) for name in ('classes/val', 'photos', 'instances')]
    rows = [row for row in range(len(base)) if base.path_of(row).startswith(tuple(f'{name}/' for name in allowed))]
    rows = sorted(rows, key=base.path_of)
    return np.random.default_rng(0).permutation(rows)[:number]


def make_copies(base, chosen, folder):
    """FOLDER/<number of the edit>/<SHA-256 of the original>.png; lossless, so that the edit is all there is."""
    for number, edit in enumerate(EDITS.values()):
        for row in chosen:
            record = base.records(int(row))
            path = folder / f'{number:02}' / f'{record.sha256}.png'
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                edit(read_image(record.path)).save(path)


def measure(index, base, folder):
    names = list(EDITS)
    prefix = f'{folder.resolve()}/'
    paths = [index.path_of(row) for row in range(len(index))]
    edit_of = np.array([int(path[len(prefix):].split('/')[0]) if path.startswith(prefix) else -1 for path in paths])
    results = {}
    for number, name in [*enumerate(names), (None, 'all at once')]:
        members = np.flatnonzero((edit_of == -1) | ((edit_of >= 0) if number is None else (edit_of == number)))
        start = time.monotonic()
        copies = find_copies(Part(index, members))
        seconds = time.monotonic() - start
        queries = members[edit_of[members] >= 0]
        results[name] = {
            'copies': len(queries), **judge(copies, prefix), 'seconds': seconds,
            'thresholds': asdict(copies.thresholds), 'map': search_map(index, base, queries)}
        print(name, {key: value for key, value in results[name].items() if key != 'thresholds'}, flush=True)
    return results


def judge(copies, prefix):
    """Counts of copies, of those found, of right and wrong pairs with a copy, and of the groups without one."""
    found = right = wrong = others = 0
    for group in copies.groups:
        files = [file.record for file in group.files]
        origins = [Path(file.path).stem if file.path.startswith(prefix) else file.sha256 for file in files]
        is_copy = [file.path.startswith(prefix) for file in files]
        others += not any(is_copy)
        for i, origin in enumerate(origins):
            if is_copy[i]:
                same = [other == origin for j, other in enumerate(origins) if j != i]
                right, wrong = right + sum(same), wrong + len(same) - sum(same)
                found += any(other == origin and not is_copy[j] for j, other in enumerate(origins))
    return {'found': found, 'right': right, 'wrong': wrong, 'groups_of_originals': others}


def search_map(index, base, queries):
    """Mean of one over the rank of the original; identical files share a rank."""
    hashes = [row.tobytes() for row in base.columns['sha256']]
    rows_of = {}
    for row, digest in enumerate(hashes):
        rows_of.setdefault(digest, row)
    vectors, database = np.asarray(index.vectors)[queries], np.asarray(base.vectors)
    total = 0.
    for query, vector in zip(queries, vectors, strict=True):
        scores = database @ vector
        own = rows_of[bytes.fromhex(Path(index.path_of(int(query))).stem)]
        total += 1 / (1 + int((scores > scores[own]).sum()))
    return total / len(queries)


def show(results):
    print('\n| edit | recall % | precision % | search mAP % | threshold |')
    print('|---|---|---|---|---|')
    for name, r in results.items():
        pairs = r['right'] + r['wrong']
        precision = f'{100 * r["right"] / pairs:.1f}' if pairs else '–'
        recall = 100 * r['found'] / r['copies']
        print(f'| {name} | {recall:.1f} | {precision} | {100 * r["map"]:.1f} | {r["thresholds"]["certain"]:.3f} |')


if __name__ == '__main__':
    main()
