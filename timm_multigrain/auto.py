"""MultiGrain training for timm's train.py without the launcher: `train.py --device-modules timm_multigrain.auto`.

train.py imports the modules named so at its start. Importing this one rebinds its seams, with the settings of
`--model-kwargs mg_repeats=3 mg_classif_weight=0.5 ...` or of `model_kwargs:` in its YAML file. The launcher
(`python -m timm_multigrain train.py`) does the same with options of their own, which --help shows.
"""
import sys
from types import ModuleType

from timm_multigrain.train import launcher

from .train.options import PREFIX, TrainOptions
from .train.plugin import TrainPlugin
from .train.script import check, register_named, stop


def install(script: ModuleType) -> None:
    """Bind the train.py that runs as `script`; stops with one sentence if it is none."""
    check(script)
    if not hasattr(script, '_parse_args'):
        stop(f'{script.__file__} has no _parse_args: run it as python -m timm_multigrain {script.__file__}')
    args, _ = script._parse_args()  # main() has done the same; its result is not in reach
    settings = {k: v for k, v in (args.model_kwargs or {}).items() if k.startswith(PREFIX)}
    try:
        options = TrainOptions.from_mapping(settings)
    except (ValueError, ImportError) as e:
        stop(e)
    register_named(args.model)
    TrainPlugin(script, options, args).bind(script)


def _install_into_main() -> None:
    main = sys.modules['__main__']
    if launcher.running:
        return
    if not hasattr(main, 'train_one_epoch'):
        stop('timm_multigrain.auto is for train.py --device-modules timm_multigrain.auto; '
             'elsewhere import timm_multigrain')
    install(main)


_install_into_main()
