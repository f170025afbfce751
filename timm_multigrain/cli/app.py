"""Search an indexed collection in the browser: drop a picture, see its classes, nearest images, copies.

    timm-multigrain app my-index
    timm-multigrain app my-index --space my-space        # the folder of a Hugging Face Space; python my-space/app.py
    timm-multigrain publish my-space me/my-photos --space

It listens on this computer only, unless --host says otherwise, and loads nothing from elsewhere.
"""
import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('index', metavar='INDEX', help='index folder')
    add('--host', default='127.0.0.1', help='address to listen on; 0.0.0.0 lets other computers in (%(default)s)')
    add('--port', type=int, help='port (default: the first free one from 7860 on)')
    add('--title', help='heading of the page')
    add('--max-upload', type=float, default=32, metavar='MB', help='largest picture, megabytes (%(default)s)')
    add('--space', metavar='DIR', help='write the folder of a Space, with small copies of the pictures')


def run(args: argparse.Namespace) -> int:
    from timm_multigrain.collection import Index

    index = Index.open(args.index)
    if args.space:
        from timm_multigrain.collection.space import write_space
        folder = write_space(index, args.space, title=args.title)
        print(f'{folder} is ready: python {folder / "app.py"}, or timm-multigrain publish {folder} USER/NAME --space')
        return 0
    from timm_multigrain.collection.app import launch_app
    launch_app(index, host=args.host, port=args.port, title=args.title, max_upload=round(args.max_upload * 1e6))
    return 0
