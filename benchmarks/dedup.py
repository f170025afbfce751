"""Copies found in a real collection, by edit: recall and precision of dedup and of perceptual hashes, mAP of search.

    python benchmarks/dedup.py --data-dir DIR --model MODEL --work WORK [--images 300] [--results FILE]

DIR has the folders photos and instances, which are indexed. Some of the images are edited, every edit of every one is a
file, and the files are indexed too. Then, for one edit after the other, the copies made by it are put among the
originals, and dedup is run with its defaults; at last with all of them at once. A copy is found if it is in one group
with its original. Precision is the share of the pairs of a copy and another file in its group that are of one original.
Search: each copy is a query, its original the one relevant image. PDQ (pip install pdqhash), and PHash and DHash of
imagededup, compare each copy with each original, at the distance that their authors advise.
"""
import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from timm_multigrain.files import write_text
from timm_multigrain.images.copies import EDITS
from timm_multigrain.images.pixels import read_image
from timm_multigrain.index import Index
from timm_multigrain.index.dedup import FALSE_POSITIVES, CopySearch
from timm_multigrain.index.pairs import find_thresholds, star_groups

FOLDERS = ('photos', 'instances')
DISTANCES = {'PDQ': 31, 'PHash': 10, 'DHash': 10}  # of 256, 64 and 64 bits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', type=Path, required=True)
    parser.add_argument('--model', required=True)
    parser.add_argument('--work', type=Path, required=True)
    parser.add_argument('--images', type=int, default=300)
    parser.add_argument('--results', type=Path)
    args = parser.parse_args()
    folders = [args.data_dir / name for name in FOLDERS]
    base = Index.build(folders, args.work / 'originals', args.model)
    chosen = np.random.default_rng(0).permutation(sorted(range(len(base)), key=base.path_of))[:args.images]
    make_copies(base, chosen, args.work / 'copies')
    if not (args.work / 'with-copies').exists():  # the originals need not be embedded again
        shutil.copytree(args.work / 'originals', args.work / 'with-copies')
    index = Index.build([*folders, args.work / 'copies'], args.work / 'with-copies', args.model)
    results = measure(index, base, args.work / 'copies')
    show(results)
    if args.results:
        write_text(args.results, json.dumps(results, indent=1))


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
    names, prefix = list(EDITS), f'{folder.resolve()}/'
    paths = [index.path_of(row) for row in range(len(index))]
    edit_of = np.array([int(path[len(prefix):].split('/')[0]) if path.startswith(prefix) else -1 for path in paths])
    hashes = [Path(path).stem if edit_of[row] >= 0 else index.records(row).sha256 for row, path in enumerate(paths)]
    origin = np.unique(hashes, return_inverse=True)[1]
    bits, results = hash_all(paths), {}
    search = CopySearch(index, None, FALSE_POSITIVES, look=True, progress=True)  # looks at two pictures once only
    once = search.rows
    for number, name in [*enumerate(names), (None, 'all at once')]:
        copies = np.flatnonzero(edit_of >= 0 if number is None else edit_of == number)
        search.rows = np.intersect1d(once, np.union1d(np.flatnonzero(edit_of == -1), copies))
        search.thresholds = find_thresholds(search.vectors, search.rows, FALSE_POSITIVES)
        pairs = search.pairs()
        groups = [search.group(rows) for rows in star_groups(pairs, np.arange(len(index)))]
        origin_of = dict(zip(paths, origin.tolist(), strict=True))
        results[name] = {'copies': len(copies), 'dedup': judge(groups, origin_of, prefix),
                         'map': search_map(index, base, copies)}
        originals = np.intersect1d(once, np.flatnonzero(edit_of == -1))
        for kind, distance in DISTANCES.items():
            near = (bits[kind][copies, None] != bits[kind][None, originals]).sum(2) <= distance
            right = near & (origin[copies, None] == origin[None, originals])
            results[name][kind] = {'found': int(right.any(1).sum()), 'right': int(right.sum()),
                                   'wrong': int((near & ~right).sum())}
        print(name, results[name], flush=True)
    return results


def hash_all(paths):
    """Bits (N, 256 or 64) of each picture."""
    import pdqhash
    from imagededup.methods import DHash, PHash
    others = {'PHash': PHash(verbose=False), 'DHash': DHash(verbose=False)}
    bits = {kind: [] for kind in DISTANCES}
    for path in paths:
        pixels = np.asarray(read_image(path))
        bits['PDQ'].append(pdqhash.compute(pixels)[0].astype(bool))
        for kind, method in others.items():
            bits[kind].append([bit == '1' for bit in f'{int(method.encode_image(image_array=pixels), 16):064b}'])
    return {kind: np.array(values, dtype=bool) for kind, values in bits.items()}


def judge(groups, origin_of, prefix):
    """Counts of copies found, and found for certain, and of right and wrong pairs with a copy."""
    found = certain = right = wrong = others = 0
    for group in groups:
        files = [(origin_of[file.record.path], file.record.path.startswith(prefix), file) for file in group.files]
        others += not any(is_copy for _, is_copy, _ in files)
        for origin, is_copy, file in files:
            if is_copy:
                same = [other == origin for other, _, it in files if it is not file]
                right, wrong = right + sum(same), wrong + len(same) - sum(same)
                beside = [it for other, is_copy, it in files if other == origin and not is_copy]
                found += bool(beside)
                kept = group.files[0]
                certain += any(it.certain for it in beside) if file is kept else file.certain and kept in beside
    return {'found': found, 'certain': certain, 'right': right, 'wrong': wrong, 'groups_of_originals': others}


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
    print('\n| edit | dedup | certain | ' + ' | '.join(DISTANCES) + ' | search mAP % |\n|---|---|---|---|---|---|---|')
    for name, r in results.items():
        cells = []
        for kind in ('dedup', *DISTANCES):
            pairs = r[kind]['right'] + r[kind]['wrong']
            precision = f'{100 * r[kind]["right"] / pairs:.1f}' if pairs else '–'
            cells.append(f'{100 * r[kind]["found"] / r["copies"]:.1f} ({precision})')
        cells.insert(1, f'{100 * r["dedup"]["certain"] / r["copies"]:.1f}')
        print(f'| {name} | ' + ' | '.join(cells) + f' | {100 * r["map"]:.1f} |')


if __name__ == '__main__':
    main()
