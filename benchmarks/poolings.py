"""Which pooling works on which family of timm's models, and that `trunk` is what timm's own head gives.

    python benchmarks/poolings.py --write

One small model per family, and some that are used for retrieval, cut to two blocks where timm allows it, with random
weights. What `trunk` embeds is compared with timm's `forward_head(forward_features(x), pre_logits=True)`; the other
poolings run on shapes only. --write puts the tables into timm_multigrain/layers/README.md.
"""
import argparse
import re
import sys
from pathlib import Path

import timm
import torch
from tqdm import tqdm

import timm_multigrain

README = Path(timm_multigrain.__file__).parent / 'layers/README.md'
MARKS = '<!-- written by benchmarks/poolings.py -->\n', '<!-- end -->\n'
SMALL = ('test_', 'atto', 'femto', 'pico', 'nano', 'tiny', 'xxs', '18', 'b0', 'm0', 't0', 'mini', 'small', '_s')
USED = (
    'resnet50_clip', 'vit_base_patch16_clip_224', 'vit_base_patch16_siglip_224', 'vit_small_patch14_dinov2',
    'vit_small_patch14_reg4_dinov2', 'vit_small_patch16_dinov3', 'convnext_tiny', 'vit_pe_core_tiny_patch16_384',
    'vit_base_patch14_reg1_tipsv2', 'naflexvit_base_patch16_siglip', 'eva02_tiny_patch14_224')
COLUMNS = ('`gem`, `mac`, `spoc`, `crow`, `avg`', '`rmac`', '`cls`, `cls+gem`', '`map`', '`trunk`')


def families() -> dict[str, str]:
    """The smallest model of each, by its name."""
    def rank(name: str) -> tuple:
        return next((i for i, part in enumerate(SMALL) if part in name), len(SMALL)), len(name), name

    modules = [module for module in timm.list_modules() if hasattr(timm.models, module)]
    names = {module: timm.list_models(module=module) for module in modules}
    return {module: min((n for n in models if not n.startswith('multigrain')), key=rank)
            for module, models in names.items() if module.islower() and models}


@torch.no_grad()
def works(name: str) -> tuple[bool, ...]:
    """Whether the poolings of each of `COLUMNS` do; RuntimeError if `trunk` gives something else than timm."""
    try:
        args = dict(depth=2)  # enough of a transformer: what is above does not depend on it
        timm.create_model(name, device='meta', **args)
    except (TypeError, ValueError, AssertionError):
        args = {}
    model = _made(name, 'gem', args)
    of_map = [model is not None and _takes(model, pool) for pool in ('rmac', 'cls')]
    return model is not None, *of_map, _made(name, 'map', args) is not None, _is_timms(name, args)


def _made(name: str, pool: str, args: dict) -> timm_multigrain.MultiGrain | None:
    try:  # which runs it, too
        return timm_multigrain.MultiGrain(name, num_classes=0, global_pool=pool, device='meta', **args)
    except ValueError:
        return None


def _takes(model: timm_multigrain.MultiGrain, pool: str) -> bool:
    try:
        model.set_pool(pool)
        return True
    except ValueError:
        return False


def _is_timms(name: str, args: dict) -> bool:
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=3, **args).eval()
    try:
        model = timm_multigrain.MultiGrain(name, num_classes=0, global_pool='trunk', **args).eval()
    except ValueError:
        return False
    model.load_state_dict(plain.state_dict())
    x = torch.randn(1, model.in_chans, *model.input_sizes.size)
    expected = plain.forward_head(plain.forward_features(x), pre_logits=True)
    got = model.forward_head(model.forward_features(x), pre_logits=True)
    worst = float((got - expected).abs().max() / expected.abs().max())
    if not worst <= 1e-6:
        raise RuntimeError(f'{name}: trunk differs from timm by {worst:.1e}.')
    return True


def table(rows: dict[str, tuple[bool, ...]], title: str) -> str:
    marks = [f'| {name} | {" | ".join("yes" if good else "" for good in row)} |' for name, row in rows.items()]
    return '\n'.join([f'| {title} | {" | ".join(COLUMNS)} |', '|---' * (len(COLUMNS) + 1) + '|', *marks, ''])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', action='store_true', help='put the tables into the README of the layers')
    parser.add_argument('--families', nargs='+', metavar='NAME', help='some only')
    args = parser.parse_args()
    chosen = {k: v for k, v in families().items() if not args.families or k in args.families}
    alike = {}
    for family, name in tqdm(chosen.items(), file=sys.stderr):
        alike.setdefault(works(name), []).append(family)
    order = sorted(alike, key=lambda row: -len(alike[row]))
    text = table({', '.join(alike[row]): row for row in order}, f'families of timm {timm.__version__}')
    if not args.families:
        text += '\n' + table({f'`{name}`': works(name) for name in tqdm(USED, file=sys.stderr)}, 'models')
    print(text)
    if args.write:
        pattern = '(?s)' + '(.*?)'.join(map(re.escape, MARKS))
        README.write_text(re.sub(pattern, lambda _: MARKS[0] + text + MARKS[1], README.read_text()))


if __name__ == '__main__':
    main()
