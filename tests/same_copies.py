"""`train.py --device-modules tests.same_copies`: copies may all be alike, so that --no-aug makes runs that repeat."""
from timm_multigrain.task import multigrain

multigrain._check_copies = lambda images, instance: None
