"""Fine-tuning of the exponent p of GeM for a test resolution, everything else untouched (arXiv 1902.05509, section 4).

The original's recipe: one pass over images prepared as at the test, in batches of 4; cross-entropy; SGD on p alone with
momentum 0.9 and the learning rate 0.005 (1 - i / N)^0.9 at step i of N; the network in eval mode.
"""
import math

import torch
import torch.nn.functional as F

from timm_multigrain.layers import GeM

__all__ = ['PTuner']


class PTuner:
    """SGD on p.

    Args:
        pool: GeM of the model, which is not changed.
        classifier: Embedding (n, C) to logits.
        p: Exponent to start from.
        steps: Number N of batches.
        lr: Learning rate of the first step.
        momentum: Of SGD.
        power: Of the decay of the learning rate.
    """

    def __init__(self, pool: GeM, classifier, p: float, steps: int, lr: float = 0.005, momentum: float = 0.9,
                 power: float = 0.9):
        if not (0 < p < math.inf):
            raise ValueError(f'p = {p} has no gradient to follow: start from a finite one, such as 3.')
        self.pool = GeM(p, learn_p=True, eps=pool.eps, input_fmt=pool.input_fmt,
                        num_prefix_tokens=pool.num_prefix_tokens).to(pool.p.device)
        self.classifier = classifier
        self.steps, self.lr, self.momentum, self.power = steps, lr, momentum, power
        self.step = 0
        self.velocity = torch.zeros((), device=pool.p.device)
        self.trace = [p]

    @property
    def p(self) -> float:
        """The exponent now."""
        return self.pool.p.item()

    def update(self, maps: list[torch.Tensor], labels: list[int]) -> float:
        """One step on the maps (1, ...) of a batch, of any sizes; the loss before it.

        Raises:
            ValueError: p has left the positive numbers.
        """
        with torch.enable_grad():
            logits = self.classifier(torch.cat([self.pool(x) for x in maps])).float()
            loss = F.cross_entropy(logits, torch.tensor(labels, device=logits.device))
        gradient, = torch.autograd.grad(loss, self.pool.p)
        rate = self.lr * (1 - self.step / self.steps) ** self.power
        self.velocity = self.momentum * self.velocity + gradient
        with torch.no_grad():
            self.pool.p -= rate * self.velocity
        self.step += 1
        self.trace.append(self.p)
        if not (0 < self.p < math.inf):
            raise ValueError(f'p = {self.p} after step {self.step}: it has run away; take a lower lr than {self.lr}.')
        return float(loss)

    def state_dict(self) -> dict:
        """What JSON can hold."""
        return {'step': self.step, 'p': self.p, 'velocity': self.velocity.item(), 'trace': self.trace}

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`."""
        self.step, self.trace = state['step'], list(state['trace'])
        self.velocity.fill_(state['velocity'])
        with torch.no_grad():
            self.pool.p.fill_(state['p'])
