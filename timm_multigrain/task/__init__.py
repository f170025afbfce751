"""The training task: cross-entropy and an instance loss on one embedding."""
from .multigrain import MultiGrainTask, MultiGrainTrainableModule, all_gather_with_grad

__all__ = ['MultiGrainTask', 'MultiGrainTrainableModule', 'all_gather_with_grad']
