"""Negative sampling and margin loss, forward and backward, against a host loop and pytorch-metric-learning.

    python benchmarks/sampling.py [--batches 128 512 2048] [--json FILE]

Embeddings (B, 2048), 3 copies of each instance, the margin loss of beta = 1.2. The host loop is what the original does,
written here in the plain way: float32 weights scaled by the largest of the batch, moved to numpy, a numpy.random.choice
for each anchor, lists of indices, distances of the gathered rows. pytorch-metric-learning: DistanceWeightedMiner and
MarginLoss, up to B = 1024.
"""
import numpy as np
import timing
import torch

from timm_multigrain.layers import l2_normalize
from timm_multigrain.loss import MarginLoss, create_sampler

DIM, COPIES = 2048, 3
HOST, PML = 'host loop', 'pytorch-metric-learning'


def main() -> None:
    parser = timing.make_parser(__doc__, rounds=9)
    parser.add_argument('--batches', type=int, nargs='+', default=[128, 512, 2048])
    args = timing.start(parser, packages=('pytorch-metric-learning', 'numpy'))
    rows = [row for batch_size in args.batches for row in measure(batch_size, args)]
    timing.finish(args, rows)


def measure(batch_size: int, args) -> list[dict]:
    embedding, target = make_batch(batch_size, args.device)
    steps = {f'ours, {name}': our_step(embedding, target, name) for name in ('row', 'batch', 'uniform')}
    steps[HOST] = host_step(embedding, target)
    if batch_size <= 1024:  # beyond, a step of it takes many seconds
        steps[PML] = pml_step(embedding, target)
    seconds = timing.interleave(steps, args.rounds, args.device)
    return [{
        'B': batch_size, 'way': name, 'ms': 1e3 * seconds[name], 'x host loop': seconds[name] / seconds[HOST],
        'x pml': seconds[name] / seconds[PML] if PML in seconds else None,
        'peak MiB': timing.peak_memory(steps[name], args.device) / timing.MIB} for name in steps]


def make_batch(batch_size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a ReLU and a pooling give: non-negative, heavy-tailed, copies close to their instance."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(batch_size) // COPIES
    centre = torch.randn(batch_size // COPIES + 1, DIM, generator=generator).square()
    x = 0.75 * centre[target] + 0.25 * torch.randn(batch_size, DIM, generator=generator).square()
    return x.to(device).requires_grad_(), target.to(device)


def our_step(x: torch.Tensor, target: torch.Tensor, name: str):
    sampler, loss = create_sampler(name, max_positives=COPIES - 1), MarginLoss(1.2).to(x.device)

    def step():
        embedding = l2_normalize(x)
        triplets = sampler(embedding, target)
        return torch.autograd.grad(loss(embedding, target, triplets), [x, loss.beta])

    return step


def pml_step(x: torch.Tensor, target: torch.Tensor):
    from pytorch_metric_learning import losses, miners
    miner, loss = miners.DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.4), losses.MarginLoss(learn_beta=True)
    loss.to(x.device)

    def step():
        embedding = torch.nn.functional.normalize(x)
        return torch.autograd.grad(loss(embedding, target, miner(embedding, target)), [x, loss.beta], allow_unused=True)

    return step


def host_step(x: torch.Tensor, target: torch.Tensor):
    beta = torch.tensor([1.2], requires_grad=True, device=x.device)

    def step():
        embedding = x / (x.norm(dim=1, keepdim=True) + 1e-6)
        anchor, positive, negative = host_triplets(embedding.detach(), target)
        to_positive = ((embedding[anchor] - embedding[positive]).square().sum(1) + 1e-8).sqrt()
        to_negative = ((embedding[anchor] - embedding[negative]).square().sum(1) + 1e-8).sqrt()
        of_positive = (to_positive - beta + 0.2).clamp(min=0)
        of_negative = (beta - to_negative + 0.2).clamp(min=0)
        active = (of_positive > 0).sum() + (of_negative > 0).sum()
        return torch.autograd.grad((of_positive + of_negative).sum() / active.clamp(min=1), [x, beta])

    return step


def host_triplets(embedding: torch.Tensor, target: torch.Tensor) -> tuple[list[int], list[int], list[int]]:
    number = len(embedding)
    square = embedding.square().sum(1)
    distance = (square + square[:, None] - 2 * embedding @ embedding.T + torch.eye(number, device=target.device)).sqrt()
    distance = distance.clamp(min=0.5)
    log_weight = (2 - DIM) * distance.log() - (DIM - 3) / 2 * (1 - distance.square() / 4).log()
    weight = (log_weight - log_weight.max()).exp()
    same = target == target[:, None]
    weight[same | (distance >= 1.4)] = 0
    weight, same = weight.double().cpu().numpy(), same.cpu().numpy()
    anchors, positives, negatives = [], [], []
    for i in range(number):
        of_anchor = np.flatnonzero(same[i])
        of_anchor = of_anchor[of_anchor != i]
        total = weight[i].sum()
        probability = weight[i] / total if total > 0 else ~same[i] / (~same[i]).sum()
        enough = np.count_nonzero(probability) >= len(of_anchor)
        drawn = np.random.choice(number, len(of_anchor), replace=not enough, p=probability)
        anchors += [i] * len(of_anchor)
        positives += of_anchor.tolist()
        negatives += drawn.tolist()
    return anchors, positives, negatives


if __name__ == '__main__':
    main()
