"""Descriptors of photographs of many shapes, longer side 500: in buckets, and faster, against one by one.

    python benchmarks/extraction.py --images DIR [--count 8] [--model multigrain_resnet50] [--json FILE]

One by one is the plain way: read, transform, `model.embed`, a picture at a time. Ours is what `embed_images` does, read
in the same process, and the same with `fast`, whose folding, once a run, is timed apart. Prints images/s, the ratios of
throughput by the clock and by the processor's time (on a machine that does other work the second says more), and the
largest difference between descriptors. Weights are random unless the model is a folder or file.
"""
import contextlib
import statistics
import time
from pathlib import Path

import timing
import torch

from timm_multigrain.embed.embedder import Embedder, in_order
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.images.sources import find_images
from timm_multigrain.models.open import open_model


def main() -> None:
    parser = timing.make_parser(__doc__, rounds=7)
    parser.add_argument('--images', required=True, metavar='DIR')
    parser.add_argument('--count', type=int, default=8, help='pictures, evenly spaced over the folder')
    parser.add_argument('--model', default='multigrain_resnet50')
    parser.add_argument('--size', type=int, default=500)
    parser.add_argument('--batch-size', type=int, default=4)
    args = timing.start(parser)
    model = open_steady(args.model)
    source = find_images(args.images)
    source.paths = source.paths[::max(1, len(source.paths) // args.count)][:args.count]
    source.names = source.paths
    protocol = Protocol(args.size, 'longer-side', mean=model.pretrained_cfg['mean'], std=model.pretrained_cfg['std'])

    @torch.inference_mode()
    def one_by_one():
        return torch.cat([
            model.embed(protocol.transform(source.load(i))[None].to(args.device)).cpu() for i in range(len(source))])

    with contextlib.ExitStack() as stack:
        ways = {'one by one': one_by_one}
        for name, fast in (('buckets', False), ('fast', True)):
            embedder = Embedder(
                model, protocol, batch_size=args.batch_size, workers=0, device=args.device, fast=fast)
            begin = time.perf_counter()
            stack.enter_context(embedder.evaluating())
            print(f'{name}: {time.perf_counter() - begin:.2f} s before the first image')
            ways[name] = lambda embedder=embedder: in_order(list(embedder.embed(
                embedder.decode(source, range(len(source)))))).vectors
        vectors = {name: way() for name, way in ways.items()}
        wall, cpu = _interleave(ways, args.rounds)
    shapes = len({protocol.pixels(source.load(i)).shape for i in range(len(source))})
    timing.finish(args, [{
        'case': f'{args.model}, {len(source)} images of {shapes} shapes', 'way': name,
        'images/s': len(source) / wall[name], 'throughput by the clock': wall['one by one'] / wall[name],
        'by CPU time': cpu['one by one'] / cpu[name],
        'largest difference': (vectors[name] - vectors['one by one']).abs().max().item()} for name in ways])


def open_steady(name: str) -> torch.nn.Module:
    """A model without classifier. A random one has run a few inputs: fresh batch norms let deep maps overflow."""
    torch.manual_seed(0)
    saved = Path(name).exists()
    model = open_model(name, pretrained=saved, num_classes=0)
    if not saved:
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # plain averages
        with torch.no_grad():
            model.train()
            for _ in range(2):
                model(torch.randn(4, 3, 128, 128))
    return model.eval()


def _interleave(ways: dict, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds by the clock and of the processor; the ways take turns. Each ends with its result on the CPU."""
    wall, cpu = ({name: [] for name in ways} for _ in range(2))
    for turn in range(rounds):
        for name in list(ways)[::1 if turn % 2 else -1]:
            begin, begin_cpu = time.perf_counter(), time.process_time()
            ways[name]()
            wall[name].append(time.perf_counter() - begin)
            cpu[name].append(time.process_time() - begin_cpu)
    return tuple({name: statistics.median(values) for name, values in times.items()} for times in (wall, cpu))


if __name__ == '__main__':
    main()
