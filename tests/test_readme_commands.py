"""Every command of the guides is understood, and those that need nothing from elsewhere run as they stand there."""
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
from PIL import Image

from timm_multigrain import register_multigrain, save_pretrained
from timm_multigrain.cli import main as cli
from timm_multigrain.demo.pictures import CLASSES, make_collection
from timm_multigrain.index import build

from .test_readme import GUIDES

ELSEWHERE = {  # commands that cannot run in a test, by a word of theirs
    'app': 'serves until it is stopped', 'publish': 'the Hub', 'milvus': 'a server', '--download': 'images of others',
    'multigrain_resnet50.fb_p3_l05_in1k': 'the authors\' weights', 'resnet50': 'timm\'s weights',
    'vit_small_patch14_dinov2': 'timm\'s weights', 'checkpoint_120.pth': 'a file of the original\'s',
    'demo': 'takes minutes, see test_demo.py', 'cuda': 'a GPU', 'output': 'the training before it'}


def commands_of(guide: Path) -> list[list[str]]:
    """The lines of the guide's blocks of shell that call this package, without prompts, comments and redirection."""
    blocks = re.findall(r'```sh\n(.*?)```', guide.read_text(), flags=re.DOTALL)
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    found = (re.match(r'(?:\$ )?(?:torchrun .*?-m timm_multigrain|timm-multigrain) (.*)', line) for line in lines)
    return [shlex.split(match[1].split('>')[0], comments=True) for match in found if match]


COMMANDS = {guide: commands for guide in GUIDES
            if guide.parent.name != 'benchmarks' and (commands := commands_of(guide))}


@pytest.mark.parametrize('guide', COMMANDS, ids=lambda path: path.parent.name)
def test_commands_are_understood(guide):
    for command in COMMANDS[guide]:
        if not command[0].endswith('.py'):
            assert cli._parse(command).command == command[0]


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """The model and the pictures that the guides speak of, small."""
    root = tmp_path_factory.mktemp('commands')
    pictures = make_collection(root / 'pictures', train_per_class=5, val_per_class=4, size=72)
    for path in pictures.glob('*/*/'):
        if path.name not in list(CLASSES)[:3]:
            shutil.rmtree(path)
    names = sorted(path.name for path in (pictures / 'val').iterdir())
    register_multigrain('test_resnet')
    model = timm.create_model('multigrain_test_resnet', pretrained=False, num_classes=3)
    save_pretrained(model, root / 'my-model', names, {'input_size': (3, 64, 64)})
    for name in ('photos', 'my-images'):
        shutil.copytree(pictures / 'val', root / name)
    for name in ('products', 'Pictures'):
        shutil.copytree(pictures / 'train', root / name)
    Image.effect_noise((400, 300), 60).convert('RGB').save(root / 'query.jpg')
    paths = [path.relative_to(root / 'my-images') for path in sorted((root / 'my-images').rglob('*.jpg'))]
    (root / 'list.csv').write_text('path,label\n' + ''.join(f'{path},{path.parent}\n' for path in paths))
    (root / 'boxes.csv').write_text('path,box,category\n' + ''.join(f'{path},9 9 60 60,shoe\n' for path in paths))
    for split in ('train', 'val'):
        build.build_index([pictures / split], root / f'{split}.index', root / 'my-model')
    return root


@pytest.mark.slow
@pytest.mark.parametrize('guide', COMMANDS, ids=lambda path: path.parent.name)
def test_commands_run(guide, home, tmp_path, monkeypatch, capfd):
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setattr(build, 'DEFAULT_MODEL', 'my-model')
    for command in COMMANDS[guide]:
        if command[0].endswith('.py') or any(ELSEWHERE.keys() & re.split('[:/]', part) for part in command):
            continue
        status = cli.main([os.path.expanduser(part) for part in command])
        assert status == 0, (shlex.join(command), capfd.readouterr().err)
