"""Inference of multigrain_resnet50 against timm's resnet50, images to logits, at 224 x 224 and 500 x 375.

    python benchmarks/inference.py [--batch-size 4] [--json FILE]

Both have 1000 classes and random weights; what differs is GeM (p = 3) in place of average pooling.
"""
import timing
import timm
import torch

import timm_multigrain  # noqa: F401 - registers the models


def main() -> None:
    parser = timing.make_parser(__doc__)
    parser.add_argument('--batch-size', type=int, default=4)
    parser.add_argument('--trunk', default='resnet50')
    parser.add_argument('--bf16', action='store_true', help='under autocast')
    args = timing.start(parser)
    ours = timm.create_model(f'multigrain_{args.trunk}').eval().to(args.device)
    peer = timm.create_model(args.trunk).eval().to(args.device)
    rows = []
    for height, width in ((224, 224), (375, 500)):
        x = torch.randn(args.batch_size, 3, height, width, device=args.device)

        def run(model, x=x):
            with torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16, enabled=args.bf16):
                return model(x)

        seconds = timing.interleave({'ours': lambda: run(ours), 'peer': lambda: run(peer)}, args.rounds, args.device)
        rows.append({
            'input': f'{args.batch_size} x {width} x {height}', f'multigrain_{args.trunk} ms': 1000 * seconds['ours'],
            f'timm {args.trunk} ms': 1000 * seconds['peer'], 'ratio': seconds['ours'] / seconds['peer']})
    timing.finish(args, rows)


if __name__ == '__main__':
    main()
