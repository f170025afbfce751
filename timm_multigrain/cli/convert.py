"""Convert a checkpoint of the original implementation, of SSCD (for torchvision), or of train.py, to a timm folder.

    timm-multigrain convert multigrain_resnet50.fb_p3_l05_in1k -o my-model
    timm-multigrain convert joint_3B_0.5.pth -o my-model
    timm-multigrain convert https://example.org/checkpoint_120.pth -o my-model

It writes config.json and model.safetensors, loads them back and compares the outputs. The network is inferred from
what the file says of itself or from the names and shapes of the weights. No code in the file is run.
"""
import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('source', metavar='FILE_OR_URL', help='checkpoint: a file, an http(s) address, or a pretrained tag')
    add('-o', '--output', required=True, metavar='DIR', help='folder to write; an earlier model there is replaced')
    add('--model', metavar='NAME', help='model that the weights are of: multigrain_resnet50, resnet50, hf-hub:NAME or '
                                        'local-dir:FOLDER (default: inferred from the file)')


def run(args: argparse.Namespace) -> None:
    from timm_multigrain.files import file_sha256
    from timm_multigrain.models.open import open_model
    from timm_multigrain.models.save import save_pretrained

    model = open_model(args.source, architecture=args.model)
    folder = save_pretrained(model, args.output)
    print(f'{model.pretrained_cfg["architecture"]} in {folder}: {len(model.state_dict())} tensors, '
          f'{sum(p.numel() for p in model.parameters()):,} parameters')
    for path in sorted(folder.iterdir()):
        if path.name != 'README.md':
            print(f'sha256 {file_sha256(path)}  {path.name}')
    print(f"timm.create_model('local-dir:{folder}', pretrained=True) gives the same outputs.")
