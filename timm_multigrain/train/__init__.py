"""timm's own train.py with MultiGrain's objective: options, seams and monitoring of the launcher."""
