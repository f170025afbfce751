"""One run of timm's train.py with MultiGrain's objective: what its four rebound names do."""
import argparse
import logging
from types import ModuleType
from typing import Any

import numpy as np
import torch.distributed as dist
from timm.utils import unwrap_model
from torch import nn

from timm_multigrain.data import Lighting, create_loader
from timm_multigrain.data.lighting import insert_lighting
from timm_multigrain.models.checkpoint import new_classifier
from timm_multigrain.task import MultiGrainTask, MultiGrainTrainableModule

from .monitor import Monitor
from .optimizer import split_off
from .options import TrainOptions, conflict
from .resume import resume_problem
from .script import epoch_arguments, stop

__all__ = ['TrainPlugin']

_logger = logging.getLogger(__name__)


class TrainPlugin:
    """Rebinds the seams of a train.py.

    Args:
        script: The module, see `timm_multigrain.train.script.check`.
        options: MultiGrain's side.
        args: The script's own arguments.
    """

    def __init__(self, script: ModuleType, options: TrainOptions, args: argparse.Namespace):
        self.options = options
        self.args = args
        self.original = {name: getattr(script, name) for name in ('create_optimizer_v2', 'create_loader')}
        self.train_one_epoch_of_script = script.train_one_epoch
        self.monitor = Monitor()

    def bind(self, script: ModuleType) -> None:
        """Rebind the names in `script`; with one repeat and lambda = 1 there is nothing to change."""
        script.create_model = new_classifier()(script.create_model)  # --initial-checkpoint of other classes
        if self.options.plain:
            return
        problem = conflict(self.args, self.options) or resume_problem(self.args, self.options)
        if problem:
            stop(problem)
        script.ClassificationTask = self.create_task
        script.create_loader = self.create_loader
        script.create_optimizer_v2 = self.create_optimizer
        script.train_one_epoch = self.train_one_epoch
        if isinstance(getattr(script, '_logger', None), logging.Logger):
            script._logger.addFilter(self.monitor)

    def create_loader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """timm's loader; for training with repeated augmentation."""
        if not is_training:
            return self.original['create_loader'](dataset, *args, is_training=False, **kwargs)
        options = self.options
        try:
            if options.joint and len(dataset) < 2:
                raise ValueError(f'the training set holds {len(dataset)} image: an instance loss needs at least 2')
            kwargs['num_aug_repeats'] = 0
            loader = create_loader(
                dataset, *args, num_repeats=options.repeats, epoch_len_factor=options.epoch_len_factor,
                seed=self.args.seed, fast=options.fast_loader, **kwargs)
            if options.lighting:
                insert_lighting(loader.dataset, Lighting(options.lighting))
        except (ValueError, TypeError, RuntimeError) as e:
            stop(e)
        return loader

    def create_task(self, model: nn.Module, *args: Any, **kwargs: Any) -> MultiGrainTask:
        """MultiGrain's task in place of timm's ClassificationTask."""
        options = self.options
        if _rank() == 0:
            _logger.info(f'MultiGrain: {options}')
            if self.args.batch_size % options.repeats:
                _logger.info(
                    f'Batches of {self.args.batch_size} are no multiple of {options.repeats} copies: the copies of an '
                    'image at the edge of a batch are split, as in the original.')
        task = MultiGrainTask(
            model, *args, classif_weight=options.classif_weight, instance_loss=options.instance_loss,
            instance_loss_kwargs=options.loss_kwargs(), sampling=options.sampling, num_repeats=options.repeats,
            gather=options.gather, statistics=options.joint, **kwargs)
        task.register_forward_hook(lambda module, inputs, result: self.monitor.update(result))
        return task

    def create_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """timm's optimizer, the parameters of the instance loss in a group of their own."""
        optimizer = self.original['create_optimizer_v2'](model, *args, **kwargs)
        trainable = unwrap_model(model)
        if isinstance(trainable, MultiGrainTrainableModule):
            own = [p for p in trainable.instance_loss.parameters() if p.requires_grad]
            if own:
                split_off(optimizer, own, self.options.beta_lr)
        return optimizer

    def train_one_epoch(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The script's epoch, with an order and negatives that depend on seed and epoch alone, so a resumed run
        repeats an uninterrupted one; gives also the averages of the objective's parts."""
        function = self.train_one_epoch_of_script
        known = epoch_arguments(function, args, kwargs)
        sampler = known['loader'].sampler
        if hasattr(known['loader'].batch_sampler, 'set_epoch'):
            known['loader'].batch_sampler.set_epoch(known['epoch'])
        elif hasattr(sampler, 'set_epoch'):  # scripts before 1.0.29 do this for distributed runs only
            sampler.set_epoch(known['epoch'])
        if getattr(known['task'], 'joint', False):
            # all ranks draw the same triplets of a gathered batch, and each its own otherwise
            rank = 0 if self.options.gather else _rank()
            known['task'].sampler.generator = _seed(self.args.seed, known['epoch'], rank)
        self.monitor.start()
        metrics = function(*args, **kwargs)
        averages = self.monitor.averages()
        if _rank() == 0:
            self.monitor.warn(averages)
        metrics.update(averages)
        return metrics


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
