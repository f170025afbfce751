"""A whole training step, MultiGrain's objective on ResNet-50 against timm's ResNet-50 with cross-entropy.

    python benchmarks/training_step.py [--batch-size 48] [--size 224] [--amp] [--rounds 5] [--json FILE]

The same images, 3 copies of an instance in the batch, SGD. A step is forward, loss, backward and update; 'peak' is what
it holds at most beyond weights, momenta and images.
"""
import timing
import timm
import torch
from timm.task import ClassificationTask

import timm_multigrain  # noqa: F401 - registers the models
from timm_multigrain.task import MultiGrainTask

COPIES = 3


def main() -> None:
    parser = timing.make_parser(__doc__, rounds=5)
    parser.add_argument('--batch-size', type=int, default=48)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--amp', action='store_true', help='autocast to bfloat16')
    parser.add_argument('--channels-last', action='store_true')
    args = timing.start(parser)
    device = torch.device(args.device)
    images = torch.randn(args.batch_size, 3, args.size, args.size, device=device)
    if args.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    instance = torch.arange(args.batch_size, device=device) // COPIES
    target = torch.stack([instance % 1000, instance], 1)
    model = timm.create_model('multigrain_resnet50', num_classes=1000)
    plain = timm.create_model('resnet50', num_classes=1000)
    steps = {
        'timm resnet50, cross-entropy': step(ClassificationTask(plain, device=device, verbose=False),
                                             images, target[:, 0], args),
        'multigrain_resnet50, joint': step(MultiGrainTask(model, num_repeats=COPIES, device=device, verbose=False),
                                           images, target, args),
    }
    seconds = timing.interleave(steps, args.rounds, args.device)
    peaks = {name: timing.peak_memory(function, args.device) / timing.MIB for name, function in steps.items()}
    peer = next(iter(steps))
    timing.finish(args, [{
        'step': name, 'ms': 1e3 * seconds[name], 'x timm': seconds[name] / seconds[peer], 'peak MiB': peaks[name],
        'x its peak': peaks[name] / peaks[peer], 'bar': None if name == peer else 1.05} for name in steps])


def step(task, images: torch.Tensor, target: torch.Tensor, args):
    task.to(images.device).train()
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(task.parameters(), lr=1e-4, momentum=0.9)

    def run() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
            loss = task(images, target)['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


if __name__ == '__main__':
    main()
