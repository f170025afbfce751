"""`python -m timm_multigrain`: the command, or one of timm's scripts, see `timm_multigrain.train.launcher`."""
import sys

from .cli.main import main

if __name__ == '__main__':
    sys.exit(main())
