"""Search an indexed collection in the browser: drop a picture, see its classes, nearest images, copies.

    timm-multigrain app my-index
    MULTIGRAIN_PASSWORD=... timm-multigrain app my-index --host 0.0.0.0 --allow-host photos.example.org --auth me

It listens on this computer only, unless --host says otherwise, answers by its own address and the names of --allow-host
only, and loads nothing from elsewhere.
"""
import argparse
import os
import sys

from . import arguments

PASSWORD = 'MULTIGRAIN_PASSWORD'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add(parser, 'index')
    add = parser.add_argument
    add('--host', default='127.0.0.1', help='address to listen on; 0.0.0.0 lets other computers in (%(default)s)')
    add('--port', type=int, help='port (default: the first free one from 7860 on)')
    add('--allow-host', nargs='+', default=[], metavar='NAME', help='other names that it is reached by, as by a proxy')
    add('--auth', metavar='USER[:PASS]', help='ask for this user and password; without the password, which other users '
                                              f'of the computer could see here, that of ${PASSWORD}')
    add('--title', help='heading of the page')
    add('--max-upload', type=float, default=32, metavar='MB', help='largest picture, megabytes (%(default)s)')


def run(args: argparse.Namespace) -> None:
    auth = _auth(args.auth) if args.auth is not None else None
    if not 0 < args.max_upload <= 1000:
        raise ValueError(f'--max-upload {args.max_upload:g}: give megabytes above 0, up to 1000.')
    if args.port is not None and not 0 < args.port < 65536:
        raise ValueError(f'--port {args.port}: give a number from 1 to 65535.')
    from timm_multigrain.app.app import launch_app
    from timm_multigrain.index import Index

    if auth is None and not (args.host in ('localhost', '::1') or args.host.startswith('127.')):
        print(f'warning: everybody who can reach {args.host} sees these pictures: ask for a password with --auth.',
              file=sys.stderr)
    launch_app(Index.open(args.index), host=args.host, port=args.port, title=args.title, allow_hosts=args.allow_host,
               auth=auth, max_upload=round(args.max_upload * 1e6))


def _auth(text: str) -> tuple[str, str]:
    user, colon, password = text.partition(':')
    password = password if colon else os.environ.get(PASSWORD, '')
    if not user or not password or not (user + password).isprintable():
        raise ValueError(f'--auth takes USER:PASS, or USER with the password in the environment variable {PASSWORD}; '
                         'neither may be empty.')
    return user, password
