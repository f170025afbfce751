"""Runs timm's own scripts, unmodified, with this package: `python -m timm_multigrain PATH/train.py ...`.

timm's wheel holds no scripts: take them from https://github.com/huggingface/pytorch-image-models. A training script
gets the options of `timm_multigrain.train.options` and trains MultiGrain's objective; every other script (validate.py,
inference.py, benchmark.py, onnx_export.py, ...) runs as it is, with the models and poolings of this package registered.
"""
import argparse
import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType

__all__ = ['launch']

# Tells timm_multigrain.auto, which a YAML file may name as a device module, that its work is done.
running = False


def launch(script: str, argv: list[str]) -> None:
    """Run a script with arguments, as `python SCRIPT ARGV` would.

    Raises:
        SystemExit: As the script; 2 after one sentence on stderr for what the user can mend.
    """
    import timm

    from .script import register_named, stop

    global running
    path = Path(script)
    if not path.is_file():
        stop(f'{script}: there is no such file; timm installs no scripts, get them with '
             'git clone https://github.com/huggingface/pytorch-image-models')
    sys.argv = [script, *argv]
    # Appended: a checkout's own timm/ must not hide the installed one.
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    if is_training_script(path):
        script_module = load_script(path)
        prepare(script_module)
        running = True
        script_module.main()
    else:
        for word in argv:
            name = word.removeprefix('--model=')
            if timm.is_model(name.removeprefix('multigrain_').split('.')[0]):
                register_named(name)
        runpy.run_path(script, run_name='__main__')


def is_training_script(path: Path) -> bool:
    """Whether a script is a train.py of whatever version, by what it defines."""
    return 'def train_one_epoch(' in path.read_text(encoding='utf-8', errors='replace')


def load_script(path: Path) -> ModuleType:
    """Import a script without running its main()."""
    from .script import import_failed

    # Not runpy: it returns a copy of the globals, and the script's functions would not see what is rebound there.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as e:
        import_failed(str(path), e)
    return module


def prepare(script: ModuleType) -> None:
    """Give a training script the plug-in's options, and bind it once they are parsed."""
    from .options import PREFIX, TrainOptions, add_options
    from .plugin import TrainPlugin
    from .script import check, check_config, register_named, stop

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
        try:
            options = TrainOptions.from_mapping(vars(namespace))
        except (ValueError, ImportError) as e:
            stop(e)
        register_named(namespace.model)
        TrainPlugin(script, options, namespace).bind(script)
        return namespace

    script.parser.parse_args = parse_and_bind
