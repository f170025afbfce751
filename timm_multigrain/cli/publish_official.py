"""Convert the official MultiGrain weights and publish them, one repository a tag.

    timm-multigrain publish-official my-org

The repositories are named my-org/<model>.<tag>. What is there already is left alone, so the command can be repeated
until all are there. The weights are CC BY-NC 4.0, and the cards say so.
"""
import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('org', metavar='ORG', help='user or organization')
    add('--tags', nargs='+', metavar='MODEL.TAG', help='these only')
    add('--work-dir', default='multigrain-official', metavar='DIR', help='folder of the converted models (%(default)s)')
    add('--source-dir', metavar='DIR', help="folder with the authors' files (default: download them)")
    add('--private', action='store_true', help='make new repositories private')
    add('--dry-run', action='store_true', help='convert and write the cards to --work-dir, and send nothing')


def run(args: argparse.Namespace) -> int:
    from timm_multigrain.hub import publish_official

    done = publish_official(
        args.org, tags=args.tags, work_dir=args.work_dir, source_dir=args.source_dir, private=args.private,
        dry_run=args.dry_run)
    print(done)
    return 1 if done.failed else 0
