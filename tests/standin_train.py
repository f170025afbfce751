"""A training script with the seams of timm's train.py, for tests: its names, flags and calls, and little of the rest.

--naflex-loader, --kd-model-name, --mixup and their like are accepted, but only so that refusing them can be tested.
"""
import argparse
import importlib
import logging
import math
from collections import OrderedDict
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
import yaml
from timm import utils
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from torch import nn

_logger = logging.getLogger('train')

# Flags with their defaults, by type; all of them are timm's.
SHORT = {'batch_size': '-b', 'validation_batch_size': '-vb', 'workers': '-j'}
TEXTS = dict(
    data_dir=None, dataset='', train_split='train', val_split='validation', model='resnet50', initial_checkpoint='',
    resume='', gp=None, device='cuda', amp_dtype='float16', model_dtype=None, opt='sgd',
    sched='cosine', aa=None, train_interpolation='random', dist_bn='reduce', worker_seeding='all', output='',
    experiment='', train_size_schedule='constant', kd_model_name=None, interpolation='', lr_base_scale='')
INTEGERS = dict(
    num_classes=None, img_size=None, batch_size=128, validation_batch_size=None, grad_accum_steps=1, epochs=300,
    warmup_epochs=5, cooldown_epochs=0, patience_epochs=10, aug_splits=0, seed=42, log_interval=50,
    recovery_interval=0, checkpoint_hist=10, workers=4, train_batches_per_epoch=None)
NUMBERS = dict(
    opt_eps=None, momentum=0.9, weight_decay=2e-5, layer_decay=None, lr=None, lr_base=0.1,
    lr_base_size=256, warmup_lr=1e-5, min_lr=0, decay_epochs=90, decay_rate=0.1, hflip=0.5, color_jitter=0.4,
    aug_repeats=0, reprob=0., mixup=0., cutmix=0., smoothing=0.1, model_ema_decay=0.9998,
    train_size_schedule_spread=0.65, train_size_random_mix=0.1, crop_pct=None, vflip=0., gaussian_blur_prob=None)
LISTS = dict(
    input_size=(int, None), decay_milestones=(int, [90, 180, 270]), scale=(float, [0.08, 1.0]),
    ratio=(float, [3 / 4, 4 / 3]), cutmix_minmax=(float, None), train_img_sizes=(int, None),
    train_batch_sizes=(int, None), train_size_probs=(float, None), device_modules=(str, None))
SWITCHES = (
    'pretrained', 'channels_last', 'torchscript', 'amp', 'sched_on_updates', 'warmup_prefix', 'no_aug', 'jsd_loss',
    'split_bn', 'sync_bn', 'model_ema', 'no_prefetcher', 'pin_mem', 'use_multi_epochs_loader', 'naflex_loader',
    'model_ema_warmup')

config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument('-c', '--config', default='')
parser = argparse.ArgumentParser(description='Trains a model of timm.')


def _add_flags() -> None:
    def add(name, **kwargs):
        parser.add_argument(*filter(None, [SHORT.get(name)]), '--' + name.replace('_', '-'), **kwargs)

    for kind, flags in ((str, TEXTS), (int, INTEGERS), (float, NUMBERS)):
        for name, default in flags.items():
            add(name, type=kind, default=default)
    for name, (kind, default) in LISTS.items():
        add(name, type=kind, default=default, nargs='+')
    for name in SWITCHES:
        add(name, action='store_true')
    for name in ('model_kwargs', 'opt_kwargs'):
        add(name, nargs='*', default={}, action=utils.ParseKwargs)
    add('torchcompile', nargs='?', default=None, const='inductor')


_add_flags()


def _parse_args() -> tuple[argparse.Namespace, str]:
    known, rest = config_parser.parse_known_args()
    if known.config:
        parser.set_defaults(**yaml.safe_load(Path(known.config).read_text()))
    args = parser.parse_args(rest)
    return args, yaml.safe_dump(vars(args))


def make_model(args, device, dtype) -> nn.Module:
    model = create_model(
        args.model, pretrained=args.pretrained, in_chans=(args.input_size or [3])[0], num_classes=args.num_classes,
        global_pool=args.gp, checkpoint_path=args.initial_checkpoint, **args.model_kwargs)
    return model.to(device=device, dtype=dtype).to(
        memory_format=torch.channels_last if args.channels_last else torch.preserve_format)


def make_loaders(args, config, device, dtype) -> tuple:
    def dataset(split, **kwargs):
        return create_dataset(
            args.dataset, root=args.data_dir, split=split, batch_size=args.batch_size,
            input_img_mode='RGB' if config['input_size'][0] == 3 else 'L', **kwargs)

    common = dict(
        input_size=config['input_size'], mean=config['mean'], std=config['std'], num_workers=args.workers,
        pin_memory=args.pin_mem, img_dtype=dtype or torch.float32, device=device, distributed=args.distributed,
        use_prefetcher=not args.no_prefetcher)
    train = create_loader(
        dataset(args.train_split, is_training=True, seed=args.seed), batch_size=args.batch_size, is_training=True,
        no_aug=args.no_aug, scale=args.scale, ratio=args.ratio, hflip=args.hflip, color_jitter=args.color_jitter,
        auto_augment=args.aa, num_aug_repeats=args.aug_repeats, re_prob=args.reprob, worker_seeding=args.worker_seeding,
        interpolation=config['interpolation'] if args.no_aug else args.train_interpolation,
        use_multi_epochs_loader=args.use_multi_epochs_loader, input_size_choices=args.train_img_sizes,
        batch_size_choices=args.train_batch_sizes, batch_choice_weights=args.train_size_probs,
        batch_choice_seed=args.seed, batch_choice_schedule=args.train_size_schedule,
        batch_schedule_epochs=args.epochs if args.train_size_schedule == 'progressive' else None,
        batch_schedule_spread=args.train_size_schedule_spread, batch_schedule_random_mix=args.train_size_random_mix,
        num_batches=args.train_batches_per_epoch, **common)
    evaluation = create_loader(
        dataset(args.val_split), batch_size=args.validation_batch_size or args.batch_size, is_training=False,
        interpolation=config['interpolation'], crop_pct=config['crop_pct'], **common)
    return train, evaluation


def make_task(args, device, dtype) -> tuple:
    model = make_model(args, device, dtype)
    loaders = make_loaders(args, resolve_data_config(vars(args), model=model), device, dtype)
    args.lr = args.lr or args.lr_base * args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    criterion = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
    task = ClassificationTask(
        model=model, criterion=criterion, device=device, dtype=dtype, verbose=utils.is_primary(args))
    optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    start = None
    if args.resume:
        start = resume_task_checkpoint(task, args.resume, optimizer=optimizer, log_info=utils.is_primary(args))
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
        task.compile_ema(backend=args.torchcompile)
    eval_model = task.get_eval_model()
    if args.distributed:
        task.prepare_distributed(device_ids=[device])
    return task, eval_model, optimizer, loaders, start or 0


def main() -> None:
    utils.setup_default_logging()
    args, args_text = _parse_args()
    for name in args.device_modules or []:
        importlib.import_module(name)
    args.prefetcher = not args.no_prefetcher
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, args.rank)
    dtype = getattr(torch, args.model_dtype) if args.model_dtype else None
    autocast = partial(torch.autocast, device.type, dtype=getattr(torch, args.amp_dtype)) if args.amp else suppress
    task, eval_model, optimizer, (loader, loader_eval), start = make_task(args, device, dtype)
    folder, saver = None, None
    if utils.is_primary(args):
        folder = Path(utils.get_outdir(args.output or 'output', args.experiment or args.model))
        (folder / 'args.yaml').write_text(args_text)
        saver = utils.CheckpointSaver(
            task.get_trainable_module(), optimizer, args=args, checkpoint_dir=str(folder), recovery_dir=str(folder),
            max_history=args.checkpoint_hist, task=task)
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=math.ceil(len(loader) / args.grad_accum_steps))
    scheduler.step(start)
    for epoch in range(start, epochs):
        if args.distributed and hasattr(loader.sampler, 'set_epoch'):
            loader.sampler.set_epoch(epoch)
        metrics = train_one_epoch(
            epoch, task.get_trainable_module(), loader, optimizer, args, task=task, device=device, saver=saver,
            lr_scheduler=scheduler, amp_autocast=autocast, model_dtype=dtype)
        found = evaluate(task, eval_model, loader_eval, args, device, autocast, dtype)
        if saver is not None:
            rates = [group['lr'] for group in optimizer.param_groups]
            utils.update_summary(
                epoch, metrics, found, filename=folder / 'summary.csv', lr=sum(rates) / len(rates),
                write_header=epoch == start)
            saver.save_checkpoint(epoch, metric=found['top1'])
        scheduler.step(epoch + 1, found['top1'])
    if args.distributed:
        torch.distributed.destroy_process_group()


def train_one_epoch(
        epoch, model, loader, optimizer, args, task=None, device=None, lr_scheduler=None, saver=None,
        amp_autocast=suppress, loss_scaler=None, model_dtype=None) -> OrderedDict:
    losses = utils.AverageMeter()
    model.train()
    optimizer.zero_grad()
    updates = math.ceil(len(loader) / args.grad_accum_steps)
    for index, (images, targets) in enumerate(loader):
        update = index // args.grad_accum_steps
        share = min(args.grad_accum_steps, len(loader) - update * args.grad_accum_steps)
        complete = index + 1 == update * args.grad_accum_steps + share
        if args.no_prefetcher:
            images, targets = images.to(device=device, dtype=model_dtype), targets.to(device)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with nullcontext() if complete else task.no_sync():
            with amp_autocast():
                loss = task(images, targets)['loss']
            losses.update(loss.item(), len(images))
            loss /= share
            loss.backward()
        if not complete:
            continue
        optimizer.step()
        optimizer.zero_grad()
        done = epoch * updates + update + 1
        task.update_ema(step=done)
        if utils.is_primary(args) and (update % args.log_interval == 0 or update + 1 == updates):
            rates = [group['lr'] for group in optimizer.param_groups]
            _logger.info(
                f'Train: {epoch} [{update}/{updates}]  Loss: {losses.val:#.3g} ({losses.avg:#.3g})  '
                f'LR: {sum(rates) / len(rates):.3e}  Data: 0.1')
        if saver is not None and args.recovery_interval and (update + 1) % args.recovery_interval == 0:
            saver.save_recovery(epoch, batch_idx=update)
        lr_scheduler.step_update(num_updates=done, metric=losses.avg)
    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    average = torch.tensor(losses.avg, device=device)
    if args.distributed:
        average = utils.reduce_tensor(average, args.world_size)
    return OrderedDict([('loss', average.item())])


def evaluate(task, eval_model, loader, args, device, amp_autocast, model_dtype) -> OrderedDict:
    """Validates the model, and its average if there is one, whose metrics count then."""
    models = [(task.get_trainable_module(), eval_model)]
    if task.has_ema():
        models.append((task.get_trainable_module(ema=True), task.get_eval_model(ema=True)))
    for trained, model in models:
        if args.distributed and args.dist_bn:
            utils.distribute_bn(trained, args.world_size, args.dist_bn == 'reduce')
        metrics = validate(model, loader, nn.CrossEntropyLoss(), args, device, amp_autocast, model_dtype)
    return metrics


@torch.inference_mode()
def validate(model, loader, loss_fn, args, device=None, amp_autocast=suppress, model_dtype=None) -> OrderedDict:
    meters = OrderedDict((name, utils.AverageMeter()) for name in ('loss', 'top1', 'top5'))
    model.eval()
    for images, targets in loader:
        images, targets = images.to(device=device, dtype=model_dtype), targets.to(device)
        with amp_autocast():
            output = model(images)
            values = [loss_fn(output, targets), *utils.accuracy(output, targets, topk=(1, 5))]
        if args.distributed:
            values = [utils.reduce_tensor(value, args.world_size) for value in values]
        for meter, value in zip(meters.values(), values, strict=True):
            meter.update(value.item(), len(images))
    return OrderedDict((name, meter.avg) for name, meter in meters.items())


if __name__ == '__main__':
    main()
