"""One run of timm's train.py with MultiGrain's objective: what its rebound names do."""
import argparse
import inspect
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.data import add_img_extensions
from timm.data.readers.class_map import load_class_map
from timm.models import load_checkpoint
from timm.utils import unwrap_model
from torch import nn
from torch.optim import Optimizer

from timm_multigrain.data import DecodedDataset, InstanceDataset, Lighting, create_loader
from timm_multigrain.data.labels import label_instances
from timm_multigrain.data.transforms import insert_jpeg, insert_lighting
from timm_multigrain.images.labels import write_class_names
from timm_multigrain.images.pixels import UnreadableImage
from timm_multigrain.images.walk import EXTENSIONS
from timm_multigrain.models import MultiGrain
from timm_multigrain.models.weights import load_starting_weights
from timm_multigrain.task import MultiGrainTask, MultiGrainTrainableModule

from .evaluation import EditedImages, RetrievalValidation
from .monitor import Monitor
from .options import PREFIX, TrainOptions, conflict, resume_problem, stop

_logger = logging.getLogger(__name__)

EPOCH_ARGUMENTS = ('epoch', 'loader', 'task')  # of the script's train_one_epoch


class TrainPlugin:
    """Rebinds the seams of a train.py.

    Args:
        script: The module, see `timm_multigrain.train.launcher.check`.
        options: MultiGrain's side.
        args: The script's own arguments.
    """

    def __init__(self, script: ModuleType, options: TrainOptions, args: argparse.Namespace):
        self.script = script
        self.options = options
        self.args = args
        names = 'create_model', 'create_dataset', 'create_optimizer_v2', 'validate', 'utils', 'resume_task_checkpoint'
        self.original = {name: getattr(script, name, None) for name in names}
        self.train_one_epoch_of_script = script.train_one_epoch
        self.monitor = Monitor(self.network_lr)
        self.optimizer, self.own_groups = None, 0
        self.class_numbers = None
        self.names_classes = options.instances not in ('copy', 'class')  # and train.py's dataset has other classes

    def bind(self, script: ModuleType) -> None:
        """Rebind the names in `script`; with one repeat and lambda = 1 only those that report errors in a sentence."""
        device = str(getattr(self.args, 'device', ''))
        if device.startswith('cuda') and not torch.cuda.is_available():
            stop(f'--device {device}: torch finds no GPU, give --device cpu')
        for name in ('create_model', 'create_dataset', 'resume_task_checkpoint'):
            if self.original[name] is not None:
                setattr(script, name, getattr(self, name))
        if self.options.plain:
            return
        problem = conflict(self.args, self.options) or resume_problem(self.args, self.options)
        if problem:
            stop(problem)
        if self.options.decode != 'timm':
            add_img_extensions(sorted(EXTENSIONS))  # of the files that all commands find
        if self.options.eval and self.original['validate'] is None:
            stop(f'{script.__file__} has no function validate, which --mg-eval adds to')
        script.ClassificationTask = self.create_task
        script.create_loader = self.create_loader
        script.create_optimizer_v2 = self.create_optimizer
        script.train_one_epoch = self.train_one_epoch
        if hasattr(self.original['utils'], 'update_summary'):
            script.utils = SimpleNamespace(**vars(self.original['utils']) | {'update_summary': self.update_summary})
        if isinstance(getattr(script, '_logger', None), logging.Logger):
            script._logger.addFilter(self.monitor)

    def create_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        """timm's model, without the plug-in's settings among its arguments; --initial-checkpoint of other classes."""
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith(PREFIX)}
        start = kwargs.pop('checkpoint_path', None)
        reason = f'--initial-checkpoint {start} not found' * bool(start and not os.path.exists(start))
        with _stopping(f'--model {self.args.model} cannot be created', reason):
            model = self.original['create_model'](*args, **kwargs)
            if start and isinstance(model, MultiGrain):
                load_starting_weights(model, start)
            elif start:
                load_checkpoint(model, start)
            return model

    def create_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """timm's dataset."""
        folder = kwargs.get('root')
        reason = f'{folder} not found' * bool(folder and not os.path.exists(folder))
        with _stopping('the images cannot be opened', reason):
            if self.names_classes and kwargs.get('class_map'):  # of the first folders; timm would look for the last
                self.class_numbers = load_class_map(kwargs.pop('class_map'), folder)
            return self.original['create_dataset'](*args, **kwargs)

    def resume_task_checkpoint(self, *args: Any, **kwargs: Any) -> int | None:
        """timm's, which takes only what it has saved of the same classes and parameters."""
        with _stopping(f'--resume {self.args.resume} does not suit this training: give the settings it was trained '
                       'with, or start another from it with --initial-checkpoint'):
            return self.original['resume_task_checkpoint'](*args, **kwargs)

    def create_loader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """timm's loader, with our decoding; for training with repeated augmentation."""
        options = self.options
        decoding = dict(decode=options.decode, strict=options.strict)
        try:
            ids = None
            if is_training or self.names_classes:
                numbers = self.class_numbers if self.names_classes else None
                dataset, ids = label_instances(dataset, options.instances, numbers, is_training)
            self._check_classes(dataset, is_training)
            if not is_training:
                if options.eval:
                    self._watch(dataset, ids, *args, **decoding, **kwargs)
                return create_loader(dataset, *args, is_training=False, **decoding, **kwargs)
            if options.joint and len(dataset) < 2:
                raise ValueError(f'the training set holds {len(dataset)} image: an instance loss needs at least 2')
            kwargs['num_aug_repeats'] = 0
            loader = create_loader(
                dataset, *args, num_repeats=options.repeats, instances='copy' if ids is None else ids,
                epoch_len_factor=options.epoch_len_factor, seed=self.args.seed, fast=options.fast_loader, **decoding,
                **kwargs)
            if options.jpeg:
                insert_jpeg(loader.dataset, options.jpeg)
            if options.lighting:
                insert_lighting(loader.dataset, Lighting(options.lighting))
        except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as e:
            stop(e)
        return loader

    def _watch(self, dataset: Any, ids: Any, *args: Any, decode: str, strict: bool, **kwargs: Any) -> None:
        """Rebind `validate` for the figures of retrieval."""
        edited = EditedImages(DecodedDataset(dataset, decode, strict))
        copies = create_loader(edited, *args, is_training=False, **kwargs | {'persistent_workers': False})
        self.script.validate = RetrievalValidation(self.original['validate'], len(dataset), ids, copies, edited.rows)

    def _check_classes(self, dataset: Any, is_training: bool) -> None:
        numbers = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
        if not isinstance(numbers, dict) or not numbers:
            return
        count, classes = max(numbers.values()) + 1, self.args.num_classes
        if classes is not None and count > classes:
            raise ValueError(f'the {"training" if is_training else "validation"} set has {count} classes and the model '
                             f'{classes}: give --num-classes {count}')
        if is_training:
            self.class_numbers = numbers
        elif self.class_numbers not in (None, numbers):
            _logger.warning(
                f'The classes of the validation set ({len(numbers)}) are not those of the training set '
                f'({len(self.class_numbers)}), and a class is known by its number: its metrics may mean nothing. Give '
                'both the same folders, or --class-map.')

    def create_task(self, model: nn.Module, *args: Any, **kwargs: Any) -> MultiGrainTask:
        """MultiGrain's task in place of timm's ClassificationTask."""
        options = self.options
        if _rank() == 0:
            _logger.info(f'MultiGrain: {options}')
            if self.args.batch_size % options.repeats:
                _logger.info(
                    f'Batch size {self.args.batch_size} is not a multiple of {options.repeats} copies: the copies of '
                    'an image at the edge of a batch are split, as in the original.')
        task = MultiGrainTask(
            model, *args, classif_weight=options.classif_weight, instance_loss=options.instance_loss,
            instance_loss_kwargs=options.loss_kwargs(), sampling=options.sampling, num_repeats=options.repeats,
            gather=options.gather, freeze_bn=options.freeze_bn,
            start_weight=options.start_weight, statistics=options.joint, **kwargs)
        task.register_forward_hook(lambda module, inputs, result: self.monitor.update(result))
        return task

    def create_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """timm's optimizer, the parameters of the instance loss in a group of their own."""
        with _stopping(f'--opt {self.args.opt} cannot be created'):
            self.optimizer = optimizer = self.original['create_optimizer_v2'](model, *args, **kwargs)
        trainable = unwrap_model(model)
        if isinstance(trainable, MultiGrainTrainableModule):
            own = [p for p in trainable.instance_loss.parameters() if p.requires_grad]
            if own:
                split_off(optimizer, own, self.options.beta_lr)
                self.own_groups = 1
        return optimizer

    def network_lr(self) -> float:
        """Learning rate of the network, averaged as train.py does, without that of the instance loss."""
        groups = self.optimizer.param_groups
        rates = [group['lr'] for group in groups[:len(groups) - self.own_groups]]
        return sum(rates) / len(rates)

    def update_summary(self, *args: Any, **kwargs: Any) -> Any:
        """timm's line of summary.csv, with the network's learning rate."""
        if kwargs.get('lr') is not None:
            kwargs['lr'] = self.network_lr()
        return self.original['utils'].update_summary(*args, **kwargs)

    def train_one_epoch(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The script's epoch, with an order and negatives that depend on seed and epoch alone, so a resumed run
        repeats an uninterrupted one; gives also the averages of the objective's parts."""
        function = self.train_one_epoch_of_script
        known = inspect.signature(function).bind(*args, **kwargs).arguments
        sampler = known['loader'].sampler
        if hasattr(known['loader'].batch_sampler, 'set_epoch'):
            known['loader'].batch_sampler.set_epoch(known['epoch'])
        elif hasattr(sampler, 'set_epoch'):  # scripts before 1.0.29 do this for distributed runs only
            sampler.set_epoch(known['epoch'])
        if known['task'].joint:
            # all ranks draw the same triplets of a gathered batch, and each its own otherwise
            rank = 0 if self.options.gather else _rank()
            known['task'].sampler.generator = _seed(self.args.seed, known['epoch'], rank)
        self.monitor.start()
        self._write_class_names(known.get('saver'))
        try:
            metrics = function(*args, **kwargs)
        except UnreadableImage as e:
            stop(_last_line(e))
        except (AssertionError, ValueError) as e:
            if self.monitor.samples or not str(e):
                raise
            stop(_last_line(e))  # of the first batch: what is wrong with the data, or with their size
        averages = self.monitor.averages()
        if _rank() == 0:
            self.monitor.warn(averages)
        self._log_skipped(known['loader'].dataset)
        metrics.update(averages)
        return metrics

    def _write_class_names(self, saver: Any) -> None:
        folder, numbers = getattr(saver, 'checkpoint_dir', None), self.class_numbers  # a folder on the first rank only
        if folder and numbers and sorted(numbers.values()) == list(range(self.args.num_classes or 0)):
            write_class_names(folder, [str(name) for name in sorted(numbers, key=numbers.get)])

    def _log_skipped(self, dataset: Any) -> None:
        instances = dataset if isinstance(dataset, InstanceDataset) else dataset.dataset  # of scheduled sizes
        skipped = instances.skipped
        if skipped:
            names = ', '.join(map(instances.name, skipped[:5])) + ', ...' * (len(skipped) > 5)
            _logger.warning(f'{len(skipped)} of {len(instances)} training images cannot be read: {names}')


def split_off(optimizer: Optimizer, parameters: list[nn.Parameter], lr: float | None = None) -> None:
    """Move `parameters` into a new last group: no weight decay, no layer decay, and a learning rate of their own.

    A `param_group_fn` would do the same, but turns timm's layer decay off and is stored in checkpoints.

    Args:
        optimizer: One of timm's, before its first step.
        parameters: Members of its groups.
        lr: Learning rate; None takes the optimizer's.
    """
    own = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        group['params'] = [p for p in group['params'] if id(p) not in own]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group['params']]
    lr = optimizer.defaults['lr'] if lr is None else lr
    optimizer.add_param_group({'params': list(parameters), 'weight_decay': 0., 'lr': lr})


@contextmanager
def _stopping(what: str, reason: str = '') -> Iterator[None]:
    """Stop with a sentence where timm raises an error that the user can mend."""
    try:
        yield
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as e:
        stop(f'{what}: {reason or " ".join(str(e).split()) or type(e).__name__}')


def _last_line(error: Exception) -> str:
    """The message of an error, which a worker process hands over at the end of its traceback."""
    line = str(error).strip().splitlines()[-1]
    return re.sub(r'^[\w.]+(?:Error|Image): ', '', line)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
