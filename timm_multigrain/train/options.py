"""The plug-in's options for timm's train.py, and which of the script's own flags do not go with them."""
import argparse
import difflib
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NoReturn

import torch
from timm.utils import ParseKwargs
from torch import nn

from timm_multigrain.data.instances import WAYS
from timm_multigrain.data.labels import INSTANCES
from timm_multigrain.files import check_json, printable
from timm_multigrain.loss import UniformSampler, create_instance_loss
from timm_multigrain.models.weights import UnreadableWeightsError, read_checkpoint

PREFIX = 'mg_'
MAX_MESSAGE = 800  # torch lists all keys of a checkpoint that do not fit


def stop(message: object) -> NoReturn:
    """End the program with one sentence on one line, as argparse does, without its page of usage."""
    text = printable(' '.join(str(message).split()))
    print(f'timm_multigrain: error: {text[:MAX_MESSAGE]}{"..." * (len(text) > MAX_MESSAGE)}', file=sys.stderr)
    raise SystemExit(2)


def _option(default: Any, help: str, type: type = str, metavar: str | None = None) -> Any:
    metadata = {'help': help, 'type': type, 'metavar': metavar}
    return field(metadata=metadata, **({'default_factory': dict} if type is dict else {'default': default}))


def _beta(value: str) -> float | str:
    return value if value == 'auto' else float(value)


@dataclass(frozen=True)
class TrainOptions:
    """MultiGrain's side of a training (arXiv 1902.05509, section 3); the help texts below say what each field is."""
    repeats: int = _option(3, 'samples per instance in a batch, m in the paper; 1 for none', int, 'N')
    instances: str = _option(
        'copy', "what the samples of an instance are: copy (augmented copies of an image), folder (photographs in "
        'class/instance/image), class (photographs of the class), or a CSV file with path,class,instance', str, 'WAY')
    classif_weight: float = _option(
        0.5, 'lambda: weight of the classification loss, the instance loss has 1 - lambda', float, 'LAMBDA')
    instance_loss: str = _option(
        'margin', 'margin, contrastive, triplet, or pml:NAME for a loss of pytorch-metric-learning', str, 'LOSS')
    margin: float | None = _option(
        None, "the instance loss's margin (default: 0.2 for margin and triplet, 1 for contrastive)", float, 'ALPHA')
    beta_init: float | str = _option(
        'auto', "boundary of the margin loss: auto follows the distances of positives and negatives; a number is where "
        'it starts as a parameter that the optimizer learns, 1.2 in the paper', _beta, 'auto|BETA')
    beta_lr: float | None = _option(
        None, 'learning rate of the parameters of the instance loss (beta of --mg-beta-init BETA), on the schedule of '
        'train.py (default: the --lr)', float, 'LR')
    instance_loss_kwargs: dict = _option(
        None, 'further arguments of the instance loss, such as use_triplets=False for pml:NAME', dict, 'NAME=VALUE')
    sampling: str = _option(
        'row', "negatives: row (distance-weighted), batch (as the original implementation: uniform from about 512 "
        'channels on) or uniform', str, 'NAME')
    gather: bool = _option(False, 'take negatives from the batches of all processes', bool)
    freeze_bn: bool = _option(
        False, 'batch norms keep their running statistics and normalise by them: for fine-tuning', bool)
    start_weight: float = _option(
        0., 'weight, beside the instance loss, of 1 - the cosine between an embedding and the start for the '
        'samples of the instance: for fine-tuning, so that what is not in the training set is still found', float, 'W')
    epoch_len_factor: float = _option(
        1.0, "samples per epoch over images of the training set (the original's recipe: 2)", float, 'FACTOR')
    lighting: float = _option(0.0, "PCA colour noise; the original's full augmentation uses 0.1", float, 'STD')
    jpeg: float = _option(
        0., 'share of the training images that are compressed as JPEG of quality 5 to 50, so that such copies are '
        'found', float, 'PROB')
    fast_loader: bool = _option(
        False, "decode and augment tensors instead of Pillow's images; pixels differ by a grey level or a few", bool)
    decode: str = _option(
        'multigrain', 'how images of training and validation are decoded: multigrain (as by all commands: upright by '
        "EXIF, transparent parts on a ground, 16 bits reduced to 8) or timm (Pillow's conversion to RGB)", str, 'WAY')
    strict: bool = _option(
        False, 'stop at an image that cannot be read, instead of going on with the next one in its place', bool)
    eval: bool = _option(
        False, 'add recall1, map and copy_map to the metrics, also for --eval-metric: Recall@1 and mAP of the '
        'validation images, and mAP of edited copies of them, in per cent', bool)

    def __post_init__(self):
        _check_values(self)
        if self.joint:
            self.create_loss()

    @property
    def joint(self) -> bool:
        """Whether there is an instance loss."""
        return self.classif_weight < 1

    @property
    def plain(self) -> bool:
        """Whether nothing of train.py is changed at all."""
        return not any((
            self.joint, self.repeats != 1, self.instances != 'copy', self.epoch_len_factor != 1, self.lighting,
            self.jpeg, self.freeze_bn, self.fast_loader, self.strict, self.eval))

    def loss_kwargs(self) -> dict[str, Any]:
        """Arguments of the instance loss."""
        named = {'margin': self.margin, 'beta_init': self.beta_init if self.instance_loss == 'margin' else None}
        return {k: v for k, v in named.items() if v is not None} | self.instance_loss_kwargs

    def create_loss(self) -> nn.Module:
        """The instance loss, tried once on six unit vectors if it has no parameters whose shape that could break."""
        try:
            loss = create_instance_loss(self.instance_loss, **self.loss_kwargs())
        except TypeError as e:
            raise ValueError(f'--mg-instance-loss {self.instance_loss} with {self.loss_kwargs()}: {e}') from e
        if self.instance_loss.startswith('pml:') and not list(loss.parameters()):
            embedding, instance = torch.eye(6), torch.arange(3).repeat_interleave(2)
            loss(embedding, instance, UniformSampler(generator=0)(embedding, instance))
        return loss

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> 'TrainOptions':
        """Options from names with the prefix 'mg_'; other names are passed over."""
        known = {PREFIX + f.name: f for f in fields(cls)}
        given = {name: value for name, value in values.items() if name.startswith(PREFIX)}
        unknown = next((name for name in given if name not in known), None)
        if unknown is not None:
            near = difflib.get_close_matches(unknown, known, n=1) or list(known)
            raise ValueError(f'{unknown} is not an option: did you mean {" or ".join(near)}?')
        return cls(**{known[name].name: _convert(name, value, known[name].metadata['type'], known[name].default)
                      for name, value in given.items()})

    def __str__(self) -> str:
        return ', '.join(f'{name}={value}' for name, value in asdict(self).items() if value not in (None, {}))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds an option --mg-NAME for every field of `TrainOptions`."""
    group = parser.add_argument_group('MultiGrain', 'Classes and instances on one embedding (arXiv 1902.05509).')
    for option in fields(TrainOptions):
        flag = f'--{PREFIX}{option.name}'.replace('_', '-')
        meta = option.metadata
        text = meta['help'].replace('%', '%%')
        if meta['type'] is bool:
            group.add_argument(flag, action='store_true', help=text)
        elif meta['type'] is dict:
            group.add_argument(flag, nargs='*', default={}, action=ParseKwargs, metavar=meta['metavar'], help=text)
        else:
            shown = '' if option.default is None else ' (default: %(default)s)'
            group.add_argument(
                flag, type=meta['type'], default=option.default, metavar=meta['metavar'], help=text + shown)


def conflict(args: argparse.Namespace, options: TrainOptions) -> str | None:
    """Why train.py's arguments do not go with the options, in one sentence, or None if they do."""
    for name, refused, reason in _CONFLICTS:
        value = getattr(args, name, None)
        if value is not None and refused(value):
            flag = f'--{name}'.replace('_', '-')
            return f'{flag} ({value}) does not go with MultiGrain training: {reason}'
    if (options.joint or options.eval) and getattr(args, 'torchscript', False):
        return ('--torchscript does not go with the instance loss and --mg-eval, which need the embedding: use '
                '--torchcompile')
    if options.joint and 'adahessian' in str(getattr(args, 'opt', '')):
        return ('--opt adahessian needs second derivatives, and the boundary of the margin loss has none: '
                'choose another optimizer')
    channels = getattr(args, 'in_chans', None) or (getattr(args, 'input_size', None) or [3])[0]
    for flag in ('lighting', 'jpeg'):
        if getattr(options, flag) and channels != 3:
            return f'--mg-{flag} is made for RGB images, and these have {channels} channels: leave it out'
    kind = str(getattr(args, 'dataset', '') or '').split('/')[0]
    if kind in ('wds', 'tfds', 'hfids'):
        return (f'--dataset {args.dataset} is read as a stream, and repeated augmentation reads images by their index: '
                'use a folder, a tar or hfds/')
    sizes = [args.batch_size, *(getattr(args, 'train_batch_sizes', None) or [])]
    if options.instances != 'copy' and any(size % options.repeats for size in sizes):
        return (f'the batch sizes {", ".join(map(str, sizes))} have to be multiples of {options.repeats}, so that a '
                'batch holds all samples of its instances: change --batch-size or --mg-repeats')
    needed = 2 * options.repeats if options.joint else options.repeats
    if min(sizes) < needed:
        return (f'a batch size of {min(sizes)} is too small for {options.repeats} copies per image: give at least '
                f'{needed}{", so that a batch holds two images" * options.joint}')
    return None


def resume_problem(args: argparse.Namespace, options: TrainOptions) -> str | None:
    """Why --resume cannot work, in one sentence, or None if it can; found before any data is read."""
    path = getattr(args, 'resume', '')
    if not path:
        return None
    if not os.path.isfile(path):  # of names of any length
        return f'--resume {path}: file not found'
    try:
        checkpoint = read_checkpoint(path)
    except UnreadableWeightsError as e:
        return f'--resume {e}'.rstrip('.')
    if not isinstance(checkpoint, dict) or 'state_dict' not in checkpoint:
        return (f'--resume {path} holds weights but not the state of a training: give it as --initial-checkpoint, '
                'and start a new training')
    model = getattr(checkpoint.get('args'), 'model', checkpoint.get('arch'))
    if model not in (None, args.model):
        return f'--resume {path} is a checkpoint of {model}, and --model is {args.model}'
    state = checkpoint.get('task_state')
    loss = state.get('instance_loss') if isinstance(state, dict) else None
    if options.joint != (loss is not None):
        way = ('without an instance loss: go on without it, --mg-classif-weight 1' if options.joint else
               'with an instance loss: go on with it, --mg-classif-weight below 1')
        return f'--resume {path} is a checkpoint of a training {way}, or start a new training with --initial-checkpoint'
    if options.joint and (not isinstance(loss, dict) or set(loss) != set(options.create_loss().state_dict())):
        before = getattr(checkpoint.get('args'), 'mg_instance_loss', 'another one')
        return (f'--resume {path} was trained with the instance loss {before}, and --mg-instance-loss is '
                f'{options.instance_loss}')
    return None


def _positive(value: float) -> bool:
    return value > 0


_MIXED = 'a mixture of two images is a copy of neither; leave it out'
_CONFLICTS = (
    ('mixup', _positive, _MIXED),
    ('cutmix', _positive, _MIXED),
    ('cutmix_minmax', bool, _MIXED),
    ('aug_repeats', _positive, "timm's sampler deals the copies of an image out to different processes; "
                               'leave it out and give --mg-repeats'),
    ('aug_splits', _positive, 'leave it out, --mg-repeats gives the copies'),
    ('jsd_loss', bool, 'leave it out, the instance loss compares the copies'),
    ('split_bn', bool, 'it belongs to augmentation splits; leave it out'),
    ('naflex_loader', bool, "its batches are not made by timm's create_loader; leave it out"),
    ('kd_model_name', bool, 'distillation has a training task of its own; leave it out'),
    ('multi_label', bool, 'an image needs exactly one class; leave it out'),
)


def _check_values(o: TrainOptions) -> None:
    ranges = (
        ('repeats', o.repeats >= 1, 'give at least 1, the paper uses 3'),
        ('instances', o.instances in INSTANCES or os.path.isfile(o.instances),
         f'file not found; give {", ".join(INSTANCES)} or a CSV file'),
        ('classif_weight', 0 <= o.classif_weight <= 1, 'give a lambda from 0 to 1, the paper uses 0.5'),
        ('sampling', o.sampling in ('row', 'batch', 'uniform'), 'give row, batch or uniform'),
        ('margin', o.margin is None or 0 <= o.margin < math.inf, 'give at least 0'),
        ('beta_init', o.beta_init == 'auto' or 0 < o.beta_init < 2,
         'give auto, or a number: distances of unit vectors lie between 0 and 2'),
        ('beta_lr', o.beta_lr is None or 0 <= o.beta_lr < math.inf, 'give at least 0; 0 leaves beta as it is'),
        ('start_weight', 0 <= o.start_weight < math.inf, 'give at least 0'),
        ('epoch_len_factor', 0 < o.epoch_len_factor < math.inf, 'give more than 0'),
        ('lighting', 0 <= o.lighting < math.inf, 'give at least 0, the original uses 0.1'),
        ('jpeg', 0 <= o.jpeg <= 1, 'give a share from 0 to 1'),
        ('decode', o.decode in WAYS, f'give one of {", ".join(WAYS)}'),
    )
    for name, good, hint in ranges:
        if not good:
            raise ValueError(f'--{PREFIX}{name} {getattr(o, name)}'.replace('_', '-') + f': {hint}')
    if o.joint and o.repeats < 2:
        raise ValueError(
            f'--mg-repeats {o.repeats} leaves the instance loss without positives: give at least 2, or '
            '--mg-classif-weight 1 for classification only')
    if o.beta_init != 'auto' and o.instance_loss != 'margin':
        raise ValueError(f'--mg-beta-init belongs to the margin loss, not to {o.instance_loss}: leave it out')
    if o.joint and o.beta_lr is not None and o.instance_loss == 'margin' and o.beta_init == 'auto':
        raise ValueError(f'--mg-beta-lr {o.beta_lr}: beta is a parameter only with --mg-beta-init BETA, such as 1.2: '
                         'give that too, or leave both out')


def _convert(name: str, value: Any, kind: type, default: Any) -> Any:
    """The value of a YAML file or of --model-kwargs, where argparse has not converted it."""
    form = {dict: {}, _beta: str if value == 'auto' else float}.get(kind, kind)
    check_json(value, (form, None) if default is None else form, name)
    return value if value is None else kind(value)
