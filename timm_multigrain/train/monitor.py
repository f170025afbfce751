"""Running averages of the objective's parts for train.py's log lines and summary.csv, and warnings when it dies."""
import logging
import math
import re
from collections.abc import Callable

import torch
import torch.distributed as dist

_logger = logging.getLogger(__name__)

# A spread of 1e-4 is a root mean square distance of 0.014, far below the 0.5 under which the sampler cannot tell
# distances apart.
MIN_SPREAD = 1e-4
MAX_BETA_ERROR = 0.1  # half of the default margin


class Monitor(logging.Filter):
    """Collects the results of a `MultiGrainTask` over an epoch and appends them to train.py's 'Train: ...' lines.

    Averages stay on the device; the host waits for them only where train.py logs, and at the end of an epoch. Log lines
    show this process, the epoch's averages all of them.

    Args:
        network_lr: Gives the learning rate that log lines show in place of train.py's mean over all parameters.
    """

    def __init__(self, network_lr: Callable[[], float] | None = None):
        super().__init__()
        self.network_lr = network_lr
        self.start()

    def start(self) -> None:
        """Begin an epoch."""
        self.names, self.last = [], None
        self.total, self.samples = 0., 0  # of the epoch
        self.window, self.fresh = 0., 0  # since the last log line
        self.warned = set()

    def update(self, result: dict[str, torch.Tensor]) -> None:
        """Take the result of one batch."""
        values = {k: v for k, v in result.items() if k not in ('loss', 'output')}
        if not values:
            return
        size = len(result['output'])  # train.py weighs its average loss by the size of a batch, too
        self.names = list(values)
        self.last = torch.stack([v.detach().float().reshape(()) for v in values.values()])
        self.total = self.total + size * self.last
        self.window = self.window + size * self.last
        self.samples += size
        self.fresh += size

    def averages(self) -> dict[str, float]:
        """Averages over the epoch so far and over all processes, which have to call this together; the last beta."""
        if not self.samples:
            return {}
        sums = torch.cat([self.total, self.total.new_tensor([self.samples])])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        averages = dict(zip(self.names, (sums[:-1] / sums[-1]).tolist(), strict=True))
        if 'beta' in averages:
            averages['beta'] = self.last[self.names.index('beta')].item()
        return averages

    def filter(self, record: logging.LogRecord) -> bool:
        """Append to a log record of train.py; no record is held back."""
        if self.fresh and str(record.msg).startswith('Train: '):
            now, mean, window = (
                dict(zip(self.names, values.tolist(), strict=True))
                for values in (self.last, self.total / self.samples, self.window / self.fresh))
            message = record.getMessage()
            if self.network_lr is not None:
                message = re.sub(r'LR: [-+.e\d]+', f'LR: {self.network_lr():.3e}', message)
            record.msg, record.args = f'{message}  {format_values(now, mean)}', ()
            self.warn(window)
            self.window, self.fresh = 0., 0
        return True

    def warn(self, values: dict[str, float]) -> None:
        """Say once an epoch what has gone wrong with the objective, from averages over some batches."""
        for kind, message in _failures(values).items():
            if kind not in self.warned:
                self.warned.add(kind)
                _logger.warning(message)


def format_values(now: dict[str, float], mean: dict[str, float]) -> str:
    """The parts as text, in the style of train.py: the last value (the average)."""
    words = []
    for name, label in (('classification_loss', 'CE'), ('instance_loss', 'Instance'), ('start_loss', 'Start')):
        if name in now:
            words.append(f'{label}: {now[name]:#.3g} ({mean[name]:#.3g})')
    if 'beta' in now:
        words.append(f'Beta: {now["beta"]:.4f}')
    if 'active_positives' in now:
        words.append(f'Active: {now["active_positives"]:.0%} pos, {now["active_negatives"]:.0%} neg')
    if 'effective_negatives' in now:
        words.append(f'Negatives: {now["effective_negatives"]:.1f}')
    return '  '.join(words)


def _failures(values: dict[str, float]) -> dict[str, str]:
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        return {'finite': f'{", ".join(broken)} not finite: the training has diverged, lower --lr or --mg-beta-lr, or '
                          'clip the gradients'}
    found = {}
    if values.get('active_positives', 1) + values.get('active_negatives', 1) == 0:
        found['active'] = ('No pair costs anything: the margin loss no longer trains the embedding. Raise '
                           '--mg-margin, or give stronger augmentation')
    beta = values.get('beta', 1.)
    balanced = values.get('balanced_beta', beta)
    if not 0 < beta < 2:
        found['beta'] = f'beta is {beta:.3g}, outside the distances 0 to 2 of unit vectors: lower --mg-beta-lr'
    elif abs(beta - balanced) > MAX_BETA_ERROR:
        found['balance'] = (f'beta is {beta:.3g}, and as many positives as negatives cost something at {balanced:.3g}: '
                            f'give --mg-beta-init auto, or start at {balanced:.2g} with another --mg-beta-lr')
    if values.get('spread', 1.) < MIN_SPREAD:
        found['spread'] = (f'The embeddings of a batch are nearly equal (spread {values["spread"]:.1e}): they have '
                           'collapsed, raise --mg-classif-weight or lower --lr')
    return found
