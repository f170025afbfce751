"""Training recipes: YAML files for the -c of timm's train.py, printed by `timm-multigrain recipe NAME`."""
