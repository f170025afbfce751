"""What the launcher prints and warns of, recomputed from the results it was given."""
import logging

import pytest
import torch
import torch.distributed as dist

from timm_multigrain.train.monitor import Monitor

GOOD = {'classification_loss': 2.0, 'instance_loss': 0.5, 'beta': 1.2, 'active_positives': 0.25,
        'active_negatives': 0.5, 'effective_negatives': 12.34, 'spread': 0.4}


def _result(size=2, **changes):
    values = {k: torch.tensor([v] if k == 'beta' else v) for k, v in (GOOD | changes).items()}
    return {'loss': torch.tensor(1.), 'output': torch.zeros(size, 3), **values}


@pytest.fixture
def log():
    """A logger as train.py's, filtered by a monitor, with the list of its messages."""
    monitor, messages = Monitor(), []
    logger = logging.Logger('train')
    logger.addFilter(monitor)
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    return monitor, logger, messages


@pytest.mark.parametrize('change, message', [
    ({'active_positives': 0., 'active_negatives': 0.}, 'No pair costs anything'),
    ({'beta': 2.5}, 'beta is 2.5'),
    ({'beta': -0.1}, 'beta is -0.1'),
    ({'balanced_beta': 0.9}, 'beta is 1.2, and as many positives as negatives cost something at 0.9'),
    ({'spread': 1e-5}, 'collapsed'),
    ({'instance_loss': float('nan')}, 'instance_loss not finite'),
])
def test_warns_once_an_epoch(log, caplog, change, message):
    monitor, logger, _ = log
    for _ in range(2):
        monitor.update(_result(**change))
        logger.info('Train: 0')
    monitor.warn(monitor.averages())
    assert [message in r.getMessage() for r in caplog.records] == [True]
    assert caplog.records[0].levelname == 'WARNING'
    monitor.start()
    monitor.update(_result(**change))
    logger.info('Train: 1')
    assert len(caplog.records) == 2


def test_a_healthy_training_is_silent(log, caplog):
    monitor, logger, _ = log
    for active in (0., 1.):  # one batch without active pairs is no failure of the window
        monitor.update(_result(active_positives=0., active_negatives=active))
    logger.info('Train: 0')
    monitor.warn(monitor.averages())
    assert not caplog.records


def test_averages_over_processes(log, monkeypatch):
    """Weighed by the samples that each of them has seen."""
    monitor, _, _ = log
    for size, value in ((2, 1.), (6, 3.)):
        monitor.update({'output': torch.zeros(size, 3), 'classification_loss': torch.tensor(value)})
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'all_reduce', lambda sums: sums.add_(torch.tensor([12 * 6., 12.])))
    assert monitor.averages() == {'classification_loss': pytest.approx((2 * 1 + 6 * 3 + 12 * 6) / 20)}
