"""The oldest timm this package works with, checked before anything else of timm is imported.

1.0.31 is the first version whose factory records what a model was built from (`_model_args`) and rebuilds saved models
from it, which saving a MultiGrain relies on, and the one whose pooling seams `layers/pool_factory.py` was written for.
"""
import os
import re
import sys
from itertools import pairwise


def _demote_current_folder() -> None:
    """Let the installed timm win over a folder timm/ of the current directory, which `python -m` puts first.

    `python -m timm_multigrain train.py` is most often typed in a checkout of timm, whose timm/ is of another version.
    """
    words = getattr(sys, 'orig_argv', [])
    started = any(pair == ('-m', __package__) for pair in pairwise(words))
    if started and 'timm' not in sys.modules and sys.path and sys.path[0] == os.getcwd():
        sys.path.append(sys.path.pop(0))


_demote_current_folder()

import timm  # noqa: E402 - see above

MINIMUM = (1, 0, 31)

_found = tuple(int(number) for number in re.findall(r'\d+', timm.__version__)[:3])
if _found < MINIMUM:
    raise ImportError(
        f'timm_multigrain needs timm {".".join(map(str, MINIMUM))} or newer, found {timm.__version__} in '
        f'{timm.__path__[0]}: pip install -U timm, and do not run from a folder that holds an older copy of timm.')
