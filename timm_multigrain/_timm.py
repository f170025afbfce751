"""The oldest timm this package works with, checked before anything else of timm is imported.

1.0.31 is the first version whose factory records what a model was built from (`_model_args`) and rebuilds saved models
from it, which saving a MultiGrain relies on, and the one whose pooling seams `layers/pool_factory.py` was written for.
"""
import re

import timm

MINIMUM = (1, 0, 31)

_found = tuple(int(number) for number in re.findall(r'\d+', timm.__version__)[:3])
if _found < MINIMUM:
    raise ImportError(
        f'timm_multigrain needs timm {".".join(map(str, MINIMUM))} or newer, found {timm.__version__} in '
        f'{timm.__path__[0]}: pip install -U timm, and do not run from a folder that holds an older copy of timm.')
