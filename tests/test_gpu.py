"""What a GPU has to do as a CPU does: each test runs on the CPU, and on a GPU where there is one (`pytest -m gpu`).

The numbers are compared with the same in float64, or recomputed in plain ways, on the CPU. That no step of the joint
objective looks at a value on the device or mixes devices is also tested with tensors of a pretended CUDA device.
"""
import contextlib
import copy

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import ImageDataset
from torch._subclasses.fake_tensor import FakeTensorMode

from timm_multigrain.data import create_loader
from timm_multigrain.embed.extract import extract
from timm_multigrain.embed.protocol import Protocol
from timm_multigrain.images.sources import ImageFiles
from timm_multigrain.layers import gem, l2_normalize
from timm_multigrain.loss import MarginLoss, Triplets, create_sampler
from timm_multigrain.task import MultiGrainTask, all_gather_with_grad
from timm_multigrain.whiten.fit import fit_whitening, fold_whitening

from .tiny import tiny_model


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def device(request):
    """A device without TF32, whose float32 is what a CPU's is."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield torch.device(request.param)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


@contextlib.contextmanager
def no_waiting(device):
    """On a GPU, an error where the host waits for it."""
    if device.type == 'cuda':
        torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        if device.type == 'cuda':
            torch.cuda.set_sync_debug_mode('default')


def is_close(values, expected, tolerance=1e-4):
    """Of the largest value."""
    expected = expected.detach().cpu().double()
    assert values.shape == expected.shape and values.isfinite().all()
    assert (values.detach().cpu().double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize('kwargs', [
    {}, {'learn_p': True, 'per_channel_p': True}, {'gem_p': 2.7, 'whitening': 40}, {'global_pool': 'rmac'}],
    ids=['p3', 'learned', 'whitened', 'rmac'])
def test_model(device, kwargs):
    model = tiny_model(**kwargs)
    double = copy.deepcopy(model).double()
    model = model.to(device)
    images = torch.randn(3, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        is_close(model.embed(images.to(device)), double.embed(images.double()))
    logits, expected = model(images.to(device)), double(images.double())
    is_close(logits, expected)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for (name, parameter), of_double in zip(model.named_parameters(), double.parameters(), strict=True):
        assert parameter.grad.device.type == device.type, name
        is_close(parameter.grad, of_double.grad, 2e-3)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('p', [2.5, 3., 'learned', float('inf')])
def test_gem_of_half_maps(device, p, dtype):
    x = torch.rand(4, 96, 7, 7, generator=torch.Generator().manual_seed(0)).mul(200).to(dtype)  # cubes overflow float16
    exponent = torch.tensor(3.3, device=device, requires_grad=True) if p == 'learned' else p
    value = x.detach().to(device).requires_grad_()
    with torch.autocast(device.type, dtype), no_waiting(device):
        y = gem(value, exponent)
        assert y.dtype == dtype
        y.float().sum().backward()
    x, q = x.double().requires_grad_(), torch.tensor(3.3 if p == 'learned' else p, dtype=torch.float64).requires_grad_()
    expected = x.amax((2, 3)) if p == float('inf') else x.clamp(min=1e-6).pow(q).mean((2, 3)).pow(1 / q)
    expected.sum().backward()
    is_close(y, expected, 5e-3)
    if p != float('inf'):  # which gives the gradient to one of equal values
        is_close(value.grad, x.grad, 2e-2)
    if p == 'learned':
        is_close(exponent.grad, q.grad, 1e-3)


@pytest.mark.parametrize('name', ['row', 'batch', 'uniform'])
def test_samplers(device, name):
    embedding = l2_normalize(torch.randn(30, 16, generator=torch.Generator().manual_seed(0)))
    target = torch.arange(30) // 3
    sampler = create_sampler(name, max_positives=2)
    on_device = embedding.to(device), target.to(device)
    with no_waiting(device):
        triplets = sampler(*on_device)
        prob, _ = sampler.probabilities(*on_device)
    assert all(index.device.type == device.type and index.dtype == torch.int64 for index in triplets)
    anchor, positive, negative = (index.cpu() for index in triplets)
    assert anchor.tolist() == [i for i in range(30) for _ in range(2)]
    assert (target[anchor] == target[positive]).all() and (anchor != positive).all()
    assert (target[anchor] != target[negative]).all()
    assert prob.device.type == device.type
    is_close(prob, sampler.probabilities(embedding.double(), target)[0], 1e-3)


def test_margin_loss_of_given_negatives(device):
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    anchor = torch.tensor([0, 0, 1, 3, 4, 8, -1])  # the last one is padding
    positive = torch.tensor([1, 2, 0, 4, 5, 6, -1])
    negative = torch.tensor([3, 8, 5, 0, 7, 2, -1])
    loss = MarginLoss(beta_init=1.35).to(device)
    value = x.detach().to(device).requires_grad_()
    triplets = Triplets(*(i.to(device) for i in (anchor, positive, negative)))
    with no_waiting(device):
        result = loss(l2_normalize(value), None, triplets)
        result.backward()
    x, on_cpu = x.double().requires_grad_(), MarginLoss(beta_init=1.35).double()
    expected = on_cpu(l2_normalize(x), None, Triplets(anchor, positive, negative))
    expected.backward()
    is_close(result, expected)
    is_close(value.grad, x.grad)
    is_close(loss.beta.grad, on_cpu.beta.grad)


def joint_task(device, **kwargs):
    model = tiny_model(**kwargs).train()
    return MultiGrainTask(model, device=device, statistics=True, verbose=False).to(device).train()


def joint_batch(device, number=9):
    instance = torch.arange(number) // 3
    images = torch.randn(number, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    return images.to(device), torch.stack([instance % 3, instance], 1).to(device)


@pytest.mark.parametrize('amp', ['off', 'on', 'scaled'])
def test_training_never_waits(device, amp):
    """Learned p and beta under autocast and GradScaler; the first step may look at the instances."""
    half = torch.float16 if amp == 'scaled' and device.type == 'cuda' else torch.bfloat16  # float16 is slow on a CPU
    task = joint_task(device, learn_p=True)
    images, target = joint_batch(device)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.01, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=2. ** 10, enabled=amp == 'scaled')
    p, beta = task.trainable_module.model.head.pool.p, task.trainable_module.instance_loss.beta
    before = p.item(), beta.item()
    for step in range(3):
        with no_waiting(device) if step else contextlib.nullcontext():
            with torch.autocast(device.type, half, enabled=amp != 'off'):
                result = task(images, target)
            scaler.scale(result['loss']).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert all(value.isfinite().all() and value.device.type == device.type for value in result.values())
    assert p.isfinite() and p.item() != before[0] and beta.isfinite() and beta.item() != before[1]


@pytest.mark.parametrize('device', [pytest.param('cuda', marks=pytest.mark.gpu)], indirect=True)
def test_compiled(device):
    task = joint_task(device)
    batch = joint_batch(device)
    expected = task(*batch)
    expected['loss'].backward()
    gradient = {name: p.grad.clone() for name, p in task.trainable_module.named_parameters()}
    task.zero_grad()
    task.compile(backend='inductor')
    result = task(*batch)
    result['loss'].backward()
    is_close(result['output'], expected['output'], 1e-3)
    for name, p in task.trainable_module.named_parameters():
        if 'head.fc' in name:  # the others depend on the negatives that were drawn, too
            is_close(p.grad, gradient[name.removeprefix('_orig_mod.')], 1e-2)


def test_whitening_is_folded(device):
    model = tiny_model()
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    embeddings = model.forward_head(model.forward_features(images), pre_logits=True).detach()
    before = model(images).detach() / torch.cat([embeddings, torch.ones(4, 1)], 1).norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(2)
    sample = embeddings.mean(0) + torch.randn(300, model.num_features, generator=generator)
    fit = fit_whitening(sample.to(device))
    model.to(device)
    fold_whitening(model, fit)
    is_close(model(images.to(device)), before, 1e-3)
    assert {value.device.type for value in model.state_dict().values()} == {device.type}


def test_loader_prefetches(device, noise_folder):
    batches = {}
    for where in (torch.device('cpu'), device):
        loader = create_loader(
            ImageDataset(str(noise_folder / 'train')), 32, 9, num_repeats=3, no_aug=True, num_workers=0, device=where,
            pin_memory=where.type == 'cuda')
        batches[where] = [(images, targets) for images, targets in loader]
    assert len(batches[device]) == 4
    for (images, targets), (expected, same) in zip(batches[device], batches[torch.device('cpu')], strict=True):
        assert images.device.type == targets.device.type == device.type and targets.dtype == torch.int64
        is_close(images, expected, 1e-6)
        assert torch.equal(targets.cpu(), same) and targets[:, 1].unique().numel() == 3


@pytest.mark.parametrize('fast', [False, True])
def test_extraction(device, tmp_path, fast):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f'{i}.png' for i in range(5)]
    for path, shape in zip(paths, [(60, 80), (80, 60), (60, 80), (64, 64), (60, 80)], strict=True):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(path)
    model, source = tiny_model(), ImageFiles(paths)
    protocol = Protocol(64, 'longer-side', scales=(1., 0.75), flip=True)
    options = dict(batch_size=2, workers=0, progress=False)
    found = extract(model, source, protocol, device=device, fast=fast, **options)
    is_close(found.vectors, extract(model.to('cpu'), source, protocol, **options).vectors)
    with no_waiting(device):  # constants of a pipeline that is to run ahead
        protocol.normalize(torch.zeros(3, 4, 4, dtype=torch.uint8, device=device))


def test_gather_of_one_process(device, tmp_path):
    """Through NCCL on a GPU."""
    dist.init_process_group(
        'nccl' if device.type == 'cuda' else 'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        x = torch.randn(6, 4, device=device, requires_grad=True)
        y = all_gather_with_grad(x)
        y.square().sum().backward()
        assert torch.equal(y, x) and torch.equal(x.grad, 2 * x)
        task = joint_task(device)
        task.gather = True
        task.prepare_distributed([0])
        task(*joint_batch(device))['loss'].backward()
        assert all(p.grad.isfinite().all() for p in task.trainable_module.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize('kwargs', [
    {}, {'sampling': 'batch'}, {'sampling': 'uniform', 'instance_loss': 'contrastive'}, {'instance_loss': 'triplet'}])
def test_joint_forward_on_a_pretended_gpu(kwargs):
    """Fails where a value is looked at, which would wait for the GPU, and where devices are mixed."""
    model = timm.create_model('multigrain', trunk='test_resnet', num_classes=3, learn_p=True)
    task = MultiGrainTask(model, device=torch.device('cpu'), statistics=True, verbose=False, **kwargs).train()
    task(*joint_batch('cpu'))  # which looks whether there are positives
    tensors = [*task.named_parameters(), *task.named_buffers()]
    with FakeTensorMode():
        state = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device='cuda') for name, tensor in tensors}
        images, target = torch.empty(9, 3, 64, 64, device='cuda'), torch.zeros(9, 2, dtype=torch.int64, device='cuda')
        try:
            target[:, 0]
        except RuntimeError as e:  # torch 2.6
            pytest.skip(f'Without a GPU this torch cannot index a pretended tensor: {e}')
        result = torch.func.functional_call(task, state, (images, target))
        assert {value.device.type for value in result.values()} == {'cuda'} and result['output'].shape == (9, 3)
