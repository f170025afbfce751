"""The seams of timm's train.py: names of the script that are rebound, so that it trains MultiGrain unmodified.

`main()` of the script looks these names up when it calls them. What is private to timm here is only that it does so:
`check` refuses a script where it would not.
"""
import argparse
import inspect
import sys
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any, NoReturn

import timm
import yaml

from timm_multigrain import register_multigrain
from timm_multigrain.files import printable

SEAMS = ('ClassificationTask', 'create_loader', 'create_optimizer_v2', 'train_one_epoch')
EPOCH_ARGUMENTS = ('epoch', 'loader', 'task')
MAX_MESSAGE = 800  # torch lists all keys of a checkpoint that do not fit
_REMEDY = 'take train.py of timm 1.0.27 or newer (https://github.com/huggingface/pytorch-image-models)'


def stop(message: object) -> NoReturn:
    """End the program with one sentence on one line, as argparse does, without its page of usage."""
    text = printable(' '.join(str(message).split()))
    print(f'timm_multigrain: error: {text[:MAX_MESSAGE]}{"..." * (len(text) > MAX_MESSAGE)}', file=sys.stderr)
    raise SystemExit(2)


def check(script: ModuleType) -> None:
    """Stop unless `script` is a train.py whose seams are known."""
    where = getattr(script, '__file__', script.__name__)
    used = set()
    for value in vars(script).values():
        if isinstance(value, FunctionType) and value.__module__ == script.__name__:
            used |= _names(value.__code__)
    missing = [name for name in SEAMS if not hasattr(script, name) or name not in used]
    missing += [name for name in ('main', 'parser') if not hasattr(script, name)]
    if missing:
        stop(f'{where} is no train.py this plug-in works with, it does not use {", ".join(missing)}: {_REMEDY}')
    if 'get_trainable_module' not in used:
        stop(f'{where} is older than timm 1.0.27 and would leave the parameters of the instance loss untrained: '
             f'{_REMEDY}')
    parameters = inspect.signature(script.train_one_epoch).parameters
    lacking = [name for name in EPOCH_ARGUMENTS if name not in parameters]
    if lacking:
        stop(f'train_one_epoch of {where} does not take {", ".join(lacking)}: {_REMEDY}')
    if not isinstance(script.parser, argparse.ArgumentParser):
        stop(f'{where} has no argparse parser named parser: {_REMEDY}')


def check_config(script: ModuleType) -> None:
    """Stop with a --config that is not YAML of arguments, which the script would end at with a traceback."""
    parser = getattr(script, 'config_parser', None)
    path = getattr(parser.parse_known_args()[0], 'config', '') if parser is not None else ''
    if not path:
        return
    try:
        with open(path, encoding='utf-8') as file:
            values = yaml.safe_load(file)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        stop(f'--config {path} cannot be read: {e}')
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        stop(f'--config {path} does not map names of arguments to values, as in "lr: 0.1"')
    for name, value in values.items():
        if isinstance(script.parser.get_default(name), float | int) and not isinstance(value, float | int | str):
            stop(f'--config {path}: {name} is {value!r}, not a number')


def register_named(model: str) -> None:
    """Register the model multigrain_TRUNK if it is not registered yet; stop if TRUNK is not a model of timm."""
    if model.startswith('multigrain_') and not timm.is_model(model):
        trunk = model.removeprefix('multigrain_')
        if '.' in trunk:
            stop(f'--model {model}: give --model multigrain --model-kwargs trunk={trunk}')
        try:
            register_multigrain(trunk)
        except ValueError as e:
            stop(f'--model {model}: {e}')


def _names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def epoch_arguments(function: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of train_one_epoch that the plug-in looks at, by name."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return {name: bound.arguments.get(name) for name in (*EPOCH_ARGUMENTS, 'saver')}


def import_failed(path: str, error: ImportError) -> NoReturn:
    """Stop with a script that wants another timm, or a package that is not there."""
    stop(f'{path} cannot be imported beside timm {timm.__version__} ({error}): take the script of that version, '
         f'git clone --branch v{timm.__version__} https://github.com/huggingface/pytorch-image-models')
