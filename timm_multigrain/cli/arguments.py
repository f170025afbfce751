"""Arguments that commands share: which model, which protocol, on which device, and others of one name and meaning."""
import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

MODEL = 'folder, checkpoint of train.py, multigrain_NAME[.TAG], hf-hub:USER/NAME, or any timm model'
_SHARED = {
    '--no-pretrained': dict(action='store_true', help='random weights'),
    '--no-ema': dict(action='store_true', help="a checkpoint's plain weights, not the averaged ones"),
    '--strict': dict(action='store_true', help='stop at an image that cannot be read instead of leaving it out'),
    '--class-map': dict(metavar='FILE', help='text file: the folder of each class of the model, one per line'),
    '--work-dir': dict(metavar='DIR', help='folder that keeps the embeddings, for a run that is killed to go on'),
    '--output': dict(required=True, metavar='DIR', help='folder to write; an earlier model there is replaced'),
    'images': dict(metavar='IMAGES', help='folder, list file, or data set of timm'),
    'index': dict(metavar='INDEX', help='index folder'),
}


def add(parser: argparse.ArgumentParser, *names: str) -> None:
    """Arguments that mean the same in several commands."""
    for name in names:
        parser.add_argument(*['-o'] * (name == '--output'), name, **_SHARED[name])


def add_model(parser: argparse.ArgumentParser, positional: bool = True) -> None:
    """MODEL, --pool, --p, --no-pretrained, --no-ema."""
    if positional:
        parser.add_argument('model', metavar='MODEL', help=MODEL)
    group = parser.add_argument_group('model')
    group.add_argument('--pool', metavar='NAME', help='pooling: gem, mac, spoc, rmac, crow, avg, cls, cls+gem, map, '
                                                      "trunk (default: the model's)")
    group.add_argument('--p', type=float, metavar='P', help="exponent of GeM (default: the model's)")
    add(group, '--no-pretrained', '--no-ema')


def add_refinements(add: Callable) -> None:
    """--qe, --dba, --rerank and --local, by `add` of a parser or of a group."""
    add('--qe', nargs=2, metavar=('K', 'ALPHA'), help='expand each query by its K nearest images')
    add('--dba', nargs=2, metavar=('K', 'ALPHA'), help='augment each image that is searched by its K nearest ones')
    add('--rerank', nargs='?', const='auto', type=_neighbours, metavar='K',
        help='let the nearest 400 images refine each other and the query, by K neighbours each; without K by 3, and '
             'only where they are not a matter of chance; what was chosen is printed')
    add('--local', nargs='?', const=100, type=int, metavar='N',
        help='compare the nearest N images (%(const)s) with the query by their details, which only an index made with '
             '--local keeps, and put those that agree first; takes OpenCV')


def refinements_of(args: argparse.Namespace) -> dict:
    """Keyword arguments of `evaluate` and `search_images`."""
    return {'qe': _with_alpha('qe', args.qe), 'dba': _with_alpha('dba', args.dba), 'rerank': args.rerank,
            'local': args.local}


def _with_alpha(name: str, given: list[str] | None) -> tuple[int, float] | None:
    try:
        return given and (int(given[0]), float(given[1]))
    except ValueError:
        raise ValueError(f'--{name} {" ".join(given)}: give a number of images and alpha, such as 10 3.') from None


def _neighbours(text: str) -> int | str:
    if text != 'auto' and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f'{text!r} is not a number of neighbours: give 1 or more, or nothing')
    return text if text == 'auto' else int(text)


def output_file(text: str) -> str:
    """Type of an argument that names a file to write, so that it is refused before the work and not after it."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f'{text!r} is a folder: name a file')
    folder = next(folder for folder in Path(text).absolute().parents if folder.exists())
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f'{str(folder)!r} is a file: name a folder before {Path(text).name!r}')
    if text != '-' and not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f'{str(folder)!r} cannot be written to')
    return text


def open_model(args: argparse.Namespace):
    """The model that the arguments name, see `timm_multigrain.open_model`."""
    from timm_multigrain.models.open import open_model

    return open_model(args.model, pool=args.pool, p=args.p, pretrained=not args.no_pretrained, ema=not args.no_ema)


def add_protocol(parser: argparse.ArgumentParser, kind: str = 'longer-side', sizes: bool = False) -> None:
    """--size (several with `sizes`), --protocol (`kind` by default), --scales, --flip, --exif."""
    parser.set_defaults(default_kind=kind)
    add = parser.add_argument_group('protocol').add_argument
    add('--size', type=int, nargs='+' if sizes else None, metavar='N',
        help='side of the crop, or longer or shorter side, in pixels (default: what a whitening was fitted for, or the '
             "model's)")
    add('--protocol', choices=('crop', 'longer-side', 'shorter-side', 'thumbnail'),
        help="crop: shorter side size / the model's crop_pct, centre crop; longer-side, shorter-side: nothing is cut "
             'off; thumbnail: as longer-side, smaller images are not enlarged (default: '
             + ("as the benchmark's public evaluation, or " if sizes else '')
             + f'the one a whitening was fitted for, or {kind})')
    add('--scales', nargs='+', metavar='F', help="average over the input at these scales; 'ms' for 1 0.7071 0.5")
    add('--flip', action='store_true', default=None, help='average over the image and its mirror image')
    add('--exif', action=argparse.BooleanOptionalAction,
        help='turn images as their EXIF orientation says (default: yes' + ', in published sets no' * sizes + ')')


def protocol_of(args: argparse.Namespace, model, **published):
    """The protocol that the arguments describe.

    What they leave open is as `published`, else as the model's whitening was fitted for, else the command's default
    kind at the model's own size; see `Protocol.for_model`. It warns on stderr where the model's whitening was fitted
    for another one.
    """
    from timm_multigrain.embed.protocol import MS_SCALES, Protocol, check_fitted

    scales = args.scales
    if scales is not None:
        try:
            scales = MS_SCALES if scales == ['ms'] else tuple(float(scale) for scale in scales)
        except ValueError:
            raise ValueError(f"--scales {' '.join(scales)}: give numbers, or 'ms'.") from None
    given = {'size': args.size, 'kind': args.protocol, 'scales': scales, 'flip': args.flip, 'exif': args.exif}
    given = {name: value for name, value in given.items() if value is not None}
    protocol = Protocol.for_model(model, args.default_kind, **{**published, **given})
    warning = check_fitted(model, protocol)
    if warning:
        print(f'warning: {warning}', file=sys.stderr)
    return protocol


def add_extraction(parser: argparse.ArgumentParser, batch_size: str = '32') -> None:
    """--batch-size, --workers, --device, --dtype, --fast."""
    add = parser.add_argument_group('extraction').add_argument
    add('--batch-size', type=int, metavar='N', help=f'images per batch (default: {batch_size})')
    add('--workers', type=int, metavar='N', help='processes that read images (default: from the number of cores)')
    add('--device', metavar='NAME', help='cpu, cuda, cuda:1 (default: a GPU if there is one)')
    add('--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32', help='arithmetic (%(default)s)')
    add('--fast', action='store_true', help='fold batch norms, images channels last: equal up to rounding only')


def extraction_of(args: argparse.Namespace) -> dict:
    """Keyword arguments of `embed_images` and `extract`."""
    import torch

    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    batch_size = 32 if args.batch_size is None else args.batch_size
    return {'batch_size': batch_size, 'workers': args.workers, 'device': device, 'dtype': getattr(torch, args.dtype),
            'fast': args.fast}


def write_json(file: str, value) -> None:
    """Write a value as JSON, to stdout if the file is '-'."""
    from timm_multigrain.files import write_text

    text = json.dumps(value, indent=1) + '\n'
    if file == '-':
        sys.stdout.write(text)
    else:
        print(f'Written: {write_text(file, text)}', file=sys.stderr)
