"""Runs timm's own scripts, unmodified, with this package: `python -m timm_multigrain PATH/train.py ...`.

timm's wheel holds no scripts: take them from https://github.com/huggingface/pytorch-image-models. A training script
gets the options of `timm_multigrain.train.options` and trains MultiGrain's objective; every other script (validate.py,
inference.py, benchmark.py, onnx_export.py, ...) runs as it is, with the models and poolings of this package registered.

`main()` of a training script looks up the names in SEAMS when it calls them: they are rebound. What is private to timm
here is only that it does so; `check` refuses a script where it would not.
"""
import argparse
import importlib.util
import inspect
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import yaml

from timm_multigrain.models.open import is_model

from .options import PREFIX, TrainOptions, add_options, stop
from .plugin import EPOCH_ARGUMENTS, TrainPlugin

SEAMS = ('ClassificationTask', 'create_loader', 'create_optimizer_v2', 'train_one_epoch')
_REMEDY = 'take train.py of timm 1.0.27 or newer (https://github.com/huggingface/pytorch-image-models)'

# Tells timm_multigrain.auto, which a YAML file may name as a device module, that its work is done.
running = False


def launch(script: str, argv: list[str]) -> None:
    """Run a script with arguments, as `python SCRIPT ARGV` would."""
    global running
    path = Path(script)
    if not path.is_file():
        stop(f'{script}: file not found; timm installs no scripts, get them with '
             'git clone https://github.com/huggingface/pytorch-image-models')
    sys.argv = [script, *argv]
    # Appended: a checkout's own timm/ must not hide the installed one.
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    if 'def train_one_epoch(' in path.read_text(encoding='utf-8', errors='replace'):
        module = load_script(path)
        prepare(module)
        running = True
        module.main()
    else:
        for word in argv:
            is_model(word.removeprefix('--model='))  # registers multigrain_TRUNK
        runpy.run_path(script, run_name='__main__')


def load_script(path: Path) -> ModuleType:
    """Import a script without running its main()."""
    # Not runpy: it returns a copy of the globals, and the script's functions would not see what is rebound there.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as e:
        stop(f'{path} cannot be imported beside timm {timm.__version__} ({e}): take the script of that version, '
             f'git clone --branch v{timm.__version__} https://github.com/huggingface/pytorch-image-models')
    return module


def prepare(script: ModuleType) -> None:
    """Give a training script the plug-in's options, and bind it once they are parsed."""
    check(script)
    check_config(script)
    add_options(script.parser)
    parse_args = script.parser.parse_args

    def parse_and_bind(*args, **kwargs) -> argparse.Namespace:
        try:
            namespace = parse_args(*args, **kwargs)
        except ValueError as e:  # of timm's own conversions
            stop(f'an argument of --model-kwargs or the like is not NAME=VALUE: {e}')
        moved = [name for name in getattr(namespace, 'model_kwargs', None) or {} if name.startswith(PREFIX)]
        if moved:
            flag = f'--{moved[0]}'.replace('_', '-')
            stop(f'{moved[0]} in --model-kwargs is for --device-modules timm_multigrain.auto: give {flag} here')
        bind(script, vars(namespace), namespace)
        return namespace

    script.parser.parse_args = parse_and_bind


def check_config(script: ModuleType) -> None:
    """Stop with a --config that is not YAML of arguments, which the script would end at with a traceback."""
    parser = getattr(script, 'config_parser', None)
    if parser is None or not (path := parser.parse_known_args()[0].config):
        return
    try:
        with open(path, encoding='utf-8') as file:
            values = yaml.safe_load(file)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        stop(f'--config {path} cannot be read: {e}')
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        stop(f'--config {path} does not map names of arguments to values, as in "lr: 0.1"')


def bind(script: ModuleType, settings: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Rebind the seams of a training script for the plug-in's settings and the script's own arguments."""
    try:
        options = TrainOptions.from_mapping(settings)
    except (ValueError, ImportError) as e:
        stop(e)
    is_model(args.model)  # registers multigrain_TRUNK
    TrainPlugin(script, options, args).bind(script)


def check(script: ModuleType) -> None:
    """Stop unless `script` is a train.py whose seams are known."""
    where = script.__file__
    text = Path(where).read_text(encoding='utf-8', errors='replace')
    missing = [name for name in (*SEAMS, 'main', 'parser') if not hasattr(script, name)]
    missing += [name for name in SEAMS if f'{name}(' not in text and name not in missing]
    if missing:
        stop(f'{where} is not a train.py that this plug-in works with, it does not use {", ".join(missing)}: {_REMEDY}')
    if 'get_trainable_module' not in text:
        stop(f'{where} is older than timm 1.0.27 and would leave the parameters of the instance loss untrained: '
             f'{_REMEDY}')
    parameters = inspect.signature(script.train_one_epoch).parameters
    lacking = [name for name in EPOCH_ARGUMENTS if name not in parameters]
    if lacking:
        stop(f'train_one_epoch of {where} does not take {", ".join(lacking)}: {_REMEDY}')
