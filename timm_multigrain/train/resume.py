"""Whether a checkpoint can be resumed, told before any data is read."""
import argparse
from pathlib import Path

from timm_multigrain.models.weights import UnreadableWeightsError, read_checkpoint

from .options import TrainOptions

__all__ = ['resume_problem']


def resume_problem(args: argparse.Namespace, options: TrainOptions) -> str | None:
    """Why --resume cannot work, in one sentence, or None if it can."""
    path = getattr(args, 'resume', '')
    if not path:
        return None
    if not Path(path).is_file():
        return f'--resume {path}: there is no such file'
    try:
        checkpoint = read_checkpoint(path)
    except UnreadableWeightsError as e:
        return f'--resume {e}'.rstrip('.')
    if not isinstance(checkpoint, dict) or 'state_dict' not in checkpoint:
        return (f'--resume {path} holds weights but no state of a training: give it as --initial-checkpoint, '
                'and start a new training')
    model = getattr(checkpoint.get('args'), 'model', checkpoint.get('arch'))
    if model not in (None, args.model):
        return f'--resume {path} is a checkpoint of {model}, and --model is {args.model}'
    state = checkpoint.get('task_state')
    loss = state.get('instance_loss') if isinstance(state, dict) else None
    if options.joint and loss is None:
        return (f'--resume {path} is a checkpoint of a training without an instance loss: start a new training from it '
                'with --initial-checkpoint, or go on without the loss: --mg-classif-weight 1')
    if not options.joint and loss is not None:
        return (f'--resume {path} is a checkpoint of a training with an instance loss: go on with it, '
                '--mg-classif-weight below 1, or start a new training with --initial-checkpoint')
    if options.joint and (not isinstance(loss, dict) or set(loss) != set(options.create_loss().state_dict())):
        before = getattr(checkpoint.get('args'), 'mg_instance_loss', 'another one')
        return (f'--resume {path} was trained with the instance loss {before}, and --mg-instance-loss is '
                f'{options.instance_loss}')
    return None
