"""MultiGrain training for timm's train.py without the launcher: `train.py --device-modules timm_multigrain.auto`.

train.py imports the modules named so at its start. Importing this one rebinds its seams, with the settings of
`--model-kwargs mg_repeats=3 mg_classif_weight=0.5 ...` or of `model_kwargs:` in its YAML file. The launcher
(`python -m timm_multigrain train.py`) does the same with options of their own, which --help shows.
"""
import sys
from types import ModuleType

from timm_multigrain.train import launcher
from timm_multigrain.train.options import PREFIX, stop


def install(script: ModuleType) -> None:
    """Bind the train.py that runs as `script`; stops with one sentence if it is another program."""
    if not hasattr(script, 'train_one_epoch'):
        stop('timm_multigrain.auto is for train.py --device-modules timm_multigrain.auto; '
             'elsewhere import timm_multigrain')
    launcher.check(script)
    if not hasattr(script, '_parse_args'):
        stop(f'{script.__file__} has no _parse_args: run it as python -m timm_multigrain {script.__file__}')
    args, _ = script._parse_args()  # main() has done the same; its result is not in reach
    settings = {k: v for k, v in (args.model_kwargs or {}).items() if k.startswith(PREFIX)}
    launcher.bind(script, settings, args)


if not launcher.running:
    install(sys.modules['__main__'])
