"""Publish a model on the Hugging Face Hub, with a card.

    timm-multigrain publish output/train/mine/model_best.pth.tar me/my-model --license mit --metrics results.json

MODEL is a folder of save_pretrained, a checkpoint of timm's train.py, or a registered model with its tag. The model is
saved as safetensors, loaded back and compared before anything is sent. Log in first: hf auth login.
"""
import argparse
import os

from . import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def run(args: argparse.Namespace) -> None:
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
