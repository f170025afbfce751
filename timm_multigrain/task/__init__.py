from .gather import all_gather_with_grad
from .multigrain import MultiGrainTask, MultiGrainTrainableModule

__all__ = ['MultiGrainTask', 'MultiGrainTrainableModule', 'all_gather_with_grad']
