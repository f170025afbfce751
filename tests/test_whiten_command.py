"""From images to the folder of a whitened model, in Python and by the command, cut off and gone on with."""
import argparse
import shutil
import signal
import sys

import pytest
import timm
import torch

from timm_multigrain.cli import collection, measure
from timm_multigrain.cli.arguments import protocol_of
from timm_multigrain.cli.main import _parse, main
from timm_multigrain.embed.extract import extract
from timm_multigrain.embed.protocol import Protocol, check_fitted
from timm_multigrain.embed.shards import write_shard
from timm_multigrain.hub import save_pretrained
from timm_multigrain.images.sources import find_images
from timm_multigrain.measure.benchmarks import BENCHMARKS
from timm_multigrain.models.open import open_model
from timm_multigrain.models.save import fitted, note_fitted
from timm_multigrain.whiten.fit import fit_whitening, whiten_model

from .tiny import image_for, tiny_model

SETTINGS = ['--size', '32', '--protocol', 'longer-side', '--device', 'cpu', '--workers', '0']


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    return save_pretrained(tiny_model(), tmp_path_factory.mktemp('models') / 'plain', label_names=['a', 'b', 'c'])


def whiten(model, images, out, *flags) -> int:
    return main(['whiten', str(model), str(images), '-o', str(out), *map(str, flags), *SETTINGS])


def test_in_python_and_by_the_command(saved, noise_folder, tmp_path, capsys):
    assert whiten(saved, noise_folder, tmp_path / 'w') == 0
    shown, warned = capsys.readouterr()
    assert 'warning: 42 images are fewer than' in warned and 'UserWarning' not in warned
    assert '42 images' in shown and 'First class the same as before for 100.00 % of the images' in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ['w']  # the embeddings are gone
    model = open_model(saved)
    protocol = Protocol.for_model(model, size=32, kind='longer-side')
    raw = extract(model, find_images(noise_folder), protocol, descriptor=False, workers=0).vectors
    with pytest.warns(UserWarning, match='42 images are fewer'):
        result = whiten_model(model, find_images(noise_folder), protocol, workers=0)
    with pytest.warns(UserWarning):
        assert torch.equal(result.fit.proj, fit_whitening(raw).proj)
    again = timm.create_model(f'local-dir:{tmp_path}/w', pretrained=True).eval()
    x = image_for(model, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x)) and torch.equal(again.embed(x), model.embed(x))
    assert again.pretrained_cfg['label_names'] == ['a', 'b', 'c']
    assert again.pretrained_cfg['test_input_size'] == (3, 32, 32)


def test_settings_are_recorded_and_compared(saved, noise_folder, tmp_path, capsys):
    assert whiten(saved, noise_folder, tmp_path / 'w', '--p', '2', '--dim', '8') == 0
    capsys.readouterr()
    model = open_model(tmp_path / 'w')
    settings = fitted(model, 'whitening')
    assert (settings['dim'], settings['images'], settings['p'], settings['kind']) == (8, 42, 2.0, 'pca')
    assert settings['protocol']['size'] == 32 and model.embed_dim == 8 and model.gem_p == 2
    save_pretrained(model, tmp_path / 'again')  # it stays with the model
    model = open_model(tmp_path / 'again')
    assert fitted(model, 'whitening') == settings
    same = Protocol.for_model(model, kind='longer-side')
    assert check_fitted(model, same) is None
    warning = check_fitted(model, Protocol(size=64))
    assert 'size 32 there, 64 here' in warning and 'kind longer-side there, crop here' in warning
    model.set_gem_p(3)
    assert 'p 2.0 there, 3.0 here' in check_fitted(model, same)
    assert check_fitted(open_model(saved), same) is None
    assert same == Protocol.for_model(model) == Protocol.for_model(model, 'crop')  # it brings its protocol
    model.set_gem_p(2)
    args = argparse.Namespace(size=None, protocol=None, scales=None, flip=None, exif=None, default_kind='crop')
    assert protocol_of(args, model) == same and not capsys.readouterr().err
    args.size, args.protocol = 64, 'crop'
    assert protocol_of(args, model).kind == 'crop'
    assert 'warning: The whitening was fitted for other settings' in capsys.readouterr().err
    for settings in ({'protocol': None}, {'protocol': 3}, {}, {'protocol': {'scales': [2]}}):  # of other programs
        note_fitted(model, 'whitening', settings)
        assert Protocol.for_model(model).kind == 'longer-side' and check_fitted(model, same) is None
    note_fitted(model, 'whitening', {'p': 5})
    assert fitted(model, 'whitening') == {'p': 5} and fitted(model, 'p') is None


@pytest.mark.parametrize('command', ['embed m x -o y', 'whiten m x -o y', 'tune-p m x', 'validate m x', 'index -o x',
                                     'evaluate m --benchmark folder --data x'])
def test_commands_share_one_default(saved, command):
    """The longer side at the model's size, of `validate` the crop; flags win."""
    model = open_model(saved)

    def get(*flags, benchmark='folder'):
        args = _parse([*command.split(), *flags])
        if args.command == 'index':
            protocol = collection._protocol_options(args)
            return Protocol.for_model(model) if protocol is None else protocol(model)
        if args.command == 'evaluate':
            return measure._protocols(args, model, BENCHMARKS[benchmark])[-1]
        return protocol_of(args, model)
    assert get() == Protocol.for_model(model, kind='crop' if command.startswith('validate') else 'longer-side')
    assert get('--protocol', 'thumbnail', '--size', '99', '--flip', '--no-exif') == Protocol.for_model(
        model, kind='thumbnail', size=99, flip=True, exif=False)
    if command.startswith('evaluate'):
        assert get(benchmark='roxford5k') == Protocol.for_model(model, kind='thumbnail', exif=False)
        assert get('--protocol', 'longer-side', '--exif', '--size', '40', '50', benchmark='roxford5k') == (
            Protocol.for_model(model, size=50))


def test_learned_from_groups_with_a_damaged_image_and_refusals(saved, noise_folder, tmp_path, capsys):
    images = shutil.copytree(noise_folder / 'train', tmp_path / 'images')
    (images / 'a' / 'broken.png').write_bytes(b'no image')
    assert whiten(saved, images, tmp_path / 'w', '--learned') == 0
    shown = capsys.readouterr().out
    assert 'Learned whitening' in shown and '1 image could not be read:\n' in shown
    assert fitted(open_model(tmp_path / 'w'), 'whitening')['kind'] == 'learned'
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'notes.txt').write_text('mine')
    for arguments, message in (
            ((tmp_path / 'w', noise_folder, tmp_path / 'v'), 'whitened already'),
            ((saved, images, tmp_path / 's', '--strict'), 'broken.png'),
            ((saved, noise_folder, tmp_path / 'full'), 'is not a saved model'),
            ((saved, tmp_path / 'nowhere', tmp_path / 'v'), 'nowhere'),
            ((saved, noise_folder, tmp_path / 'v', '--flip'), 'one view at a time'),
            ((saved, noise_folder, tmp_path / 'v', '--shrinkage', '0'), 'give at least'),
            ((saved, noise_folder, tmp_path / 'v', '--dim', '9999'), 'dim=9999'),
            ((saved, noise_folder, tmp_path / 'v', '--limit', '0'), '--limit 0')):
        assert whiten(*arguments) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        whiten(saved, noise_folder, tmp_path / 'v', '--shrinkage', 'x')
    assert "'x': give a share from 0 to 1, or 'oas'" in capsys.readouterr().err
    assert (tmp_path / 'full' / 'notes.txt').read_text() == 'mine'


def test_a_run_that_was_interrupted_goes_on(saved, noise_folder, tmp_path, monkeypatch):
    def write(folder, number, *args):
        if number == 2:
            raise KeyboardInterrupt
        write_shard(folder, number, *args)

    monkeypatch.setitem(extract.__kwdefaults__, 'shard_size', 8)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[extract.__module__], 'write_shard', write)
        assert whiten(saved, noise_folder, tmp_path / 'w') == 128 + signal.SIGINT
    shards = sorted((tmp_path / 'w-embeddings').glob('*.safetensors'))
    before = [path.stat().st_mtime_ns for path in shards]
    assert len(shards) == 2 and not (tmp_path / 'w').exists()
    assert whiten(saved, noise_folder, tmp_path / 'w', '--work-dir', tmp_path / 'w-embeddings') == 0
    assert [path.stat().st_mtime_ns for path in shards] == before
    assert whiten(saved, noise_folder, tmp_path / 'v') == 0
    one, other = (open_model(tmp_path / name).head.whitening.proj for name in ('w', 'v'))
    torch.testing.assert_close(one.abs(), other.abs(), rtol=1e-3, atol=1e-4)
