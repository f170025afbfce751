"""GeM against timm's average pooling and the plain formula, forward and backward: time, and memory for the backward.

    python benchmarks/pooling.py [--rounds 15] [--no-compile] [--json FILE]

The plain formula is clamp, pow, mean, pow, as published. Every call makes the gradient of the map anew, as a training
with `zero_grad(set_to_none=True)` does. 'kept' is what stays between forward and backward beside the map, 'extra peak'
what a forward and backward need at most beside the gradient of the map.
"""
import math

import timing
import torch
from timm.layers import SelectAdaptivePool2d

from timm_multigrain.layers import GeM

SHAPES = (64, 2048, 7, 7), (8, 2048, 25, 33)
BARS = {'p=3': 2.0, 'p=2.5': 3.6, 'learnable': 6.0}


def plain_gem(x: torch.Tensor, p: float = 3.0) -> torch.Tensor:
    return x.clamp(min=1e-6).pow(p).mean((-2, -1)).pow(1 / p)


def main() -> None:
    parser = timing.make_parser(__doc__)
    parser.add_argument('--no-compile', action='store_true', help='leave out torch.compile')
    args = timing.start(parser)
    rows = []
    for shape in SHAPES:
        rows += against_average(shape, args)
        rows += against_plain_bfloat16(shape, args)
        rows += [] if args.no_compile else compiled(shape, args)
    timing.finish(args, rows)


def against_average(shape, args) -> list[dict]:
    """float32 in eager mode."""
    x, grad = make_map(shape, torch.float32, args.device)
    poolings = {
        'average': SelectAdaptivePool2d(pool_type='avg', flatten=True),
        'p=3': GeM(3.),
        'p=2.5': GeM(2.5),
        'learnable': GeM(3., learn_p=True).to(args.device),
        'other p (1.7)': GeM(1.7),
        'plain formula': plain_gem,
    }
    steps = {name: step(pooling, x, grad) for name, pooling in poolings.items()}
    seconds = timing.interleave(steps, args.rounds, args.device)
    return [{
        'map': shape_name(shape, x), 'pooling': name, 'ms': 1e3 * seconds[name],
        'x average': seconds[name] / seconds['average'], 'bar': BARS.get(name),
        **memory(poolings[name], steps[name], x, args.device)} for name in poolings]


def against_plain_bfloat16(shape, args) -> list[dict]:
    """bfloat16; errors of the gradient against float64."""
    x, grad = make_map(shape, torch.bfloat16, args.device)
    poolings = {'p=3': GeM(3.), 'plain formula': plain_gem}
    if not args.no_compile:
        torch.compiler.reset()
        poolings['p=3, compiled'] = torch.compile(GeM(3.), fullgraph=True)
    steps = {name: step(pooling, x, grad) for name, pooling in poolings.items()}
    for f in steps.values():
        f()
    seconds = timing.interleave(steps, args.rounds, args.device)
    exact = step(plain_gem, x.detach().double().requires_grad_(), grad.double())()[0]
    error = {name: ((f()[0].double() - exact).norm() / exact.norm()).item() for name, f in steps.items()}
    return [{
        'map': shape_name(shape, x), 'pooling': name, 'ms': 1e3 * seconds[name],
        'x plain': seconds[name] / seconds['plain formula'], 'bar': 1 / 7 if name.startswith('p=3') else None,
        'gradient error': f'{error[name]:.1e}', 'x its error': error[name] / error['plain formula'],
        **memory(poolings[name], steps[name], x, args.device)} for name in poolings]


def compiled(shape, args) -> list[dict]:
    """float32 under torch.compile, against timm's average pooling with and without it."""
    x, grad = make_map(shape, torch.float32, args.device)
    average = SelectAdaptivePool2d(pool_type='avg', flatten=True)
    steps = {'average': step(average, x, grad)}
    for name, pooling in {'average, compiled': average, 'p=3, compiled': GeM(3.)}.items():
        torch.compiler.reset()
        steps[name] = step(torch.compile(pooling, fullgraph=True), x, grad)
        steps[name]()
    seconds = timing.interleave(steps, args.rounds, args.device)
    return [{
        'map': shape_name(shape, x), 'pooling': name, 'ms': 1e3 * seconds[name],
        'x average': seconds[name] / seconds['average'], 'bar': 1.0 if name.startswith('p') else None}
        for name in list(steps)[1:]]


def make_map(shape, dtype, device) -> tuple[torch.Tensor, torch.Tensor]:
    """What a ReLU leaves of normal values, and a gradient for the pooled vectors."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).relu().to(device, dtype)
    return x.requires_grad_(), torch.randn(shape[:2], generator=generator).to(device, dtype)


def step(pooling, x: torch.Tensor, grad: torch.Tensor):
    parameters = list(pooling.parameters()) if isinstance(pooling, torch.nn.Module) else []
    return lambda: torch.autograd.grad(pooling(x), [x, *parameters], grad)


def memory(pooling, function, x: torch.Tensor, device: str) -> dict[str, float]:
    kept = timing.saved_bytes(lambda: pooling(x), (x,))
    peak = timing.peak_memory(function, device) - x.numel() * x.element_size()
    vectors = math.prod(x.shape[:2]) * 4
    return {'kept, N C floats': kept / vectors, 'extra peak MiB': peak / timing.MIB}


def shape_name(shape, x: torch.Tensor) -> str:
    return f'{list(shape)} {str(x.dtype).removeprefix("torch.")}'


if __name__ == '__main__':
    main()
