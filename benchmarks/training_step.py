"""A whole training step, MultiGrain's objective on ResNet-50 against timm's ResNet-50 with cross-entropy.

    python benchmarks/training_step.py [--batch-size 48] [--size 224] [--amp [float16]] [--rounds 5] [--json FILE]

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
PEER, OURS = 'timm, cross-entropy', 'multigrain, joint'


def main() -> None:
    parser = timing.make_parser(__doc__, rounds=5)
    parser.add_argument('--batch-size', type=int, default=48)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--amp', nargs='?', const='bfloat16', choices=('bfloat16', 'float16'),
                        help='autocast, to bfloat16 unless float16 is named, which comes with a GradScaler')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--compile', action='store_true')
    args = timing.start(parser)
    steps = make_steps('resnet50', args.batch_size, args.size, args.device, args.amp, args.channels_last,
                       'inductor' if args.compile else None)
    seconds = timing.interleave(steps, args.rounds, args.device)
    peaks = {name: timing.peak_memory(function, args.device) / timing.MIB for name, function in steps.items()}
    timing.finish(args, [{
        'step': name, 'ms': 1e3 * seconds[name], 'x timm': seconds[name] / seconds[PEER], 'peak MiB': peaks[name],
        'x its peak': peaks[name] / peaks[PEER], 'bar': None if name == PEER else 1.05} for name in steps])


def make_steps(
        trunk: str,
        batch_size: int,
        size: int,
        device: str,
        amp: str | None = None,
        channels_last: bool = False,
        backend: str | None = None,
        distributed: bool = False,
) -> dict:
    """A step of timm's task with the trunk, and of the joint one; `distributed` under DDP, with gathered negatives."""
    images = torch.randn(batch_size, 3, size, size, device=device)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    instance = torch.arange(batch_size, device=device) // COPIES
    target = torch.stack([instance % 1000, instance], 1)
    plain, joint = timm.create_model(trunk, num_classes=1000), timm.create_model('multigrain', trunk=trunk)
    tasks = {
        PEER: ClassificationTask(plain, device=images.device, verbose=False),
        OURS: MultiGrainTask(joint, num_repeats=COPIES, gather=distributed, device=images.device, verbose=False)}
    for task in tasks.values():
        task.to(images.device).train()
        if channels_last:
            task.to(memory_format=torch.channels_last)
        if backend:
            task.compile(backend=backend)
        if distributed:
            task.prepare_distributed([images.device.index] if images.is_cuda else None)
    return {name: _step(task, images, target if name == OURS else target[:, 0], amp) for name, task in tasks.items()}


def _step(task, images: torch.Tensor, target: torch.Tensor, amp: str | None):
    # fused: with another optimizer GradScaler waits for the device in every step
    optimizer = torch.optim.SGD(task.parameters(), lr=1e-4, momentum=0.9, fused=images.is_cuda)
    scaler = torch.amp.GradScaler(images.device.type, enabled=amp == 'float16')

    def run() -> None:
        with torch.autocast(images.device.type, getattr(torch, amp or 'bfloat16'), enabled=amp is not None):
            loss = task(images, target)['loss']
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return run


if __name__ == '__main__':
    main()
