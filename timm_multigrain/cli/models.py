"""Commands that give a model, or pass it on: demo, recipe, convert, publish."""
import argparse
import difflib
import os
import shlex
import sys
from dataclasses import fields
from importlib.resources import files
from pathlib import Path

from . import arguments


def add_demo(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--data-dir', metavar='DIR', help='image folder with train/ and val/ (default: draw a collection)')
    add('-o', '--output', default='multigrain-demo', metavar='DIR', help='folder of page, model, results (%(default)s)')
    add('--model', default='multigrain_test_resnet', help='multigrain_<timm model> (%(default)s, a small one)')
    add('--img-size', type=int, default=64, metavar='N', help='side of the training crop (%(default)s)')
    add('--epochs', type=int, default=12, metavar='N', help='epochs of each training (%(default)s)')
    add('--batch-size', type=int, default=48, metavar='N', help='samples per step, copies counted (%(default)s)')
    add('--num-repeats', type=int, default=2, metavar='N', help='copies of a picture in a batch (%(default)s)')
    add('--classif-weight', type=float, default=0.5, metavar='W', help='lambda of the joint model (%(default)s)')
    add('--sampling', default='row', choices=('row', 'batch', 'uniform'), help='negatives (%(default)s)')
    add('--lr', type=float, default=3e-3, help='peak learning rate (%(default)s)')
    add('--seed', type=int, default=0, help='first seed of weights, order, augmentation (%(default)s)')
    add('--seeds', type=int, default=3, metavar='N', help='trainings of each kind, from --seed on (%(default)s)')
    add('--workers', type=int, default=2, metavar='N', help='processes that read pictures (%(default)s)')


def run_demo(args: argparse.Namespace) -> None:
    """Train a small MultiGrain and see it classify pictures and find edited copies of them.

    Without --data-dir it draws its own picture collection, on the CPU, in a few minutes, with nothing downloaded. With
    --data-dir it takes any image folder with train/<class>/ and val/<class>/. It trains the same model from the same
    seeds for classes only and jointly, prints a table, saves the last joint model and writes a page to look at.
    """
    from timm_multigrain.demo.run import run_demo
    from timm_multigrain.demo.training import TrainSettings

    settings = TrainSettings(**{field.name: getattr(args, field.name) for field in fields(TrainSettings)})
    command = shlex.join(['timm-multigrain', *sys.argv[1:]])
    print(run_demo(args.output, settings, args.data_dir, command))
    output = Path(args.output).resolve()
    print(f'\nPage:  {output / "index.html"}\nModel: {output / "model"}')


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('name', nargs='?', metavar='NAME', help='recipe to print; none lists them')


def run_recipe(args: argparse.Namespace) -> None:
    """Print a training recipe, a YAML file for timm's train.py.

        timm-multigrain recipe resnet50_paper > resnet50_paper.yaml
        python -m timm_multigrain PATH/train.py -c resnet50_paper.yaml --data-dir DIR

    Without a name it lists the recipes.
    """
    folder = files('timm_multigrain.recipes')
    recipes = {p.name.removesuffix('.yaml'): p for p in folder.iterdir() if p.name.endswith('.yaml')}
    if args.name is None:
        width = max(map(len, recipes))
        for name in sorted(recipes):
            print(f'{name:{width}}  {recipes[name].read_text(encoding="utf-8").splitlines()[0].lstrip("# ")}')
        return
    if args.name not in recipes:
        near = difflib.get_close_matches(args.name, recipes, n=2, cutoff=0.4) or sorted(recipes)
        raise ValueError(f'recipe {args.name!r} not found: did you mean {" or ".join(near)}?')
    # As bytes: as text the line ends would change where they are \r\n.
    sys.stdout.buffer.write(recipes[args.name].read_bytes())
    sys.stdout.buffer.flush()


def add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('source', metavar='FILE_OR_URL', help='checkpoint: a file, an http(s) address, or a pretrained tag')
    arguments.add(parser, '--output')
    add('--model', metavar='NAME', help='model that the weights are of: multigrain_resnet50, resnet50, hf-hub:NAME or '
                                        'local-dir:FOLDER (default: inferred from the file)')


def run_convert(args: argparse.Namespace) -> None:
    """Convert a checkpoint of the original implementation, of SSCD (for torchvision), or of train.py, to a timm folder.

        timm-multigrain convert multigrain_resnet50.fb_p3_l05_in1k -o my-model
        timm-multigrain convert joint_3B_0.5.pth -o my-model
        timm-multigrain convert https://example.org/checkpoint_120.pth -o my-model

    It writes config.json and model.safetensors, loads them back and compares the outputs. The network is inferred from
    what the file says of itself or from the names and shapes of the weights. No code in the file is run.
    """
    from timm_multigrain.files import file_sha256
    from timm_multigrain.models.open import open_model
    from timm_multigrain.models.save import save_pretrained

    model = open_model(args.source, architecture=args.model)
    folder = save_pretrained(model, args.output)
    print(f'{model.pretrained_cfg["architecture"]} in {folder}: {len(model.state_dict())} tensors, '
          f'{sum(p.numel() for p in model.parameters()):,} parameters')
    for path in sorted(folder.iterdir()):
        if path.name != 'README.md':
            print(f'sha256 {file_sha256(path)}  {path.name}')
    print(f"timm.create_model('local-dir:{folder}', pretrained=True) gives the same outputs.")


def add_publish(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('model', metavar='MODEL', help=arguments.MODEL)
    add('repo_id', metavar='USER/NAME', help='repository, created if it does not exist')
    add('--license', metavar='ID', help="license of the weights, such as mit; that of the model's configuration if it "
                                        'names one')
    add('--license-name', metavar='NAME', help="name of a license 'other'")
    add('--license-link', metavar='URL', help='its address')
    add('--metrics', metavar='JSON', help='figures of the model: a list of objects with task, dataset, metric, value, '
                                          'size, p, protocol, whitening')
    add('--description', metavar='TEXT', help='what the weights are, a paragraph of the card')
    add('--private', action='store_true', help='make the new repository private')
    add('--revision', metavar='BRANCH', help='branch to commit to')
    add('--pr', action='store_true', help='open a pull request instead')
    add('--no-ema', action='store_true', help="publish a checkpoint's plain weights, not the averaged ones")
    add('--dry-run', metavar='DIR', help='write what would be published to DIR and send nothing')


def run_publish(args: argparse.Namespace) -> None:
    """Publish a model on the Hugging Face Hub, with a card.

        timm-multigrain publish output/train/mine/model_best.pth.tar me/my-model --license mit --metrics results.json

    MODEL is a folder of save_pretrained, a checkpoint of timm's train.py, or a registered model with its tag. The model
    is saved as safetensors, loaded back and compared before anything is sent. Log in first: hf auth login.
    """
    from timm_multigrain.hub import publish, read_metrics
    from timm_multigrain.models.open import open_model

    metrics = read_metrics(args.metrics) if args.metrics else None
    model = open_model(args.model, ema=not args.no_ema)
    print(f'Publishing {args.model}')
    print(publish(
        model, args.repo_id, license=args.license, license_name=args.license_name, license_link=args.license_link,
        metrics=metrics, description=args.description or model.pretrained_cfg.get('description'),
        card=os.path.join(args.model, 'README.md'), private=args.private, revision=args.revision, create_pr=args.pr,
        dry_run=args.dry_run))
