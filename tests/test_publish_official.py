"""Publishing the authors' weights: all tags, in runs that can be repeated, against a Hub on loopback."""
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from timm.models import get_pretrained_cfg

from timm_multigrain.cli.main import main
from timm_multigrain.convert import Conversion
from timm_multigrain.hub import publish_official, save_pretrained
from timm_multigrain.hub.official import official_metrics, official_tags
from timm_multigrain.hub.verify import file_sha256

from . import original
from .hub_server import Fault
from .tiny import tiny_model

TAG = 'multigrain_resnet50.fb_p3_l05_in1k'


@pytest.fixture
def converted(monkeypatch):
    """Sources that were converted, in order; each becomes a tiny model of its own instead of the authors' network."""
    sources = []

    def convert(source, out_dir, model_name=None):
        sources.append(source)
        tag = next(tag for tag in official_tags() if str(source) == tag or str(source).endswith(_file(tag)))
        assert model_name == tag.split('.')[0]
        model = tiny_model(official_tags().index(tag))
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, 'license': 'cc-by-nc-4.0'}
        save_pretrained(model, out_dir)
        return Conversion(model_name, out_dir, 0, 0, '', file_sha256(out_dir / 'model.safetensors'))
    monkeypatch.setattr('timm_multigrain.convert.convert_checkpoint', convert)
    return sources


def _file(tag):
    return get_pretrained_cfg(tag).url.rpartition('/')[2]


def test_every_tag_has_the_figures_that_were_published_for_it():
    tags = official_tags()
    assert len(tags) >= 7 and TAG in tags
    for tag in tags:
        figures = official_metrics(tag)
        assert figures and all(metric.source_url == 'https://arxiv.org/abs/1902.05509' for metric in figures)
        described = get_pretrained_cfg(tag).description.rpartition('top-1 ')[2]
        for metric in figures:
            if metric.metric == 'top1':
                assert f'{metric.value} at' in described and str(metric.size) in described, tag
    assert [(m.metric, m.value, m.size, m.p) for m in official_metrics(TAG)] == [
        ('top1', 77.4, 224, 3), ('top1', 78.6, 500, 4), ('top5', 94.4, 500, 4)]


def test_a_run_and_its_repetition(hub, converted, tmp_path, capsys):
    work = tmp_path / 'work'
    assert main(['publish-official', 'lab', '--work-dir', str(work)]) == 0
    tags = official_tags()
    assert sorted(converted) == sorted(tags) and set(hub.repos) == {f'lab/{tag}' for tag in tags}
    assert f'{len(tags)} published' in capsys.readouterr().out
    files = hub.repos[f'lab/{TAG}'].files()
    assert files['model.safetensors'] == (work / TAG / 'model.safetensors').read_bytes()
    assert files['config.json'] == (work / TAG / 'config.json').read_bytes()
    card = ModelCard(files['README.md'].decode())
    assert card.data.license == 'cc-by-nc-4.0' and card.data.datasets == ['imagenet-1k']
    assert [result.metric_value for result in card.data.eval_results] == [77.4, 78.6, 94.4]
    for text in ('https://dl.fbaipublicfiles.com/multigrain/multigrain_models/joint_3B_0.5.pth',
                 'https://github.com/facebookresearch/multigrain', 'cc-by-nc-4.0', f"'hf-hub:lab/{TAG}'",
                 '| top1 | 78.6 | 500 | 4 | longer side, no crop | none | [Berman et al. 2019]'):
        assert text in card.text
    loaded = timm.create_model(f'hf-hub:lab/{TAG}', pretrained=True)
    assert torch.equal(loaded.head.fc.weight, tiny_model(tags.index(TAG)).head.fc.weight)

    before, commits = len(hub.requests), {name: len(repo.commits) for name, repo in hub.repos.items()}
    assert main(['publish-official', 'lab', '--work-dir', str(work)]) == 0
    out = capsys.readouterr().out
    assert f'{len(tags)} unchanged' in out and 'published' not in out and len(converted) == len(tags)
    assert {name: len(repo.commits) for name, repo in hub.repos.items()} == commits
    assert {method for method, _ in hub.requests[before:]} == {'GET'}


def test_a_run_that_breaks_is_taken_up_again(hub, converted, tmp_path, capsys):
    tags = official_tags()
    same = save_pretrained(tiny_model(tags.index(TAG)), tmp_path / 'same')
    hub.faults.append(Fault('PUT', file_sha256(same / 'model.safetensors'), cut='request'))
    command = ['publish-official', 'me', '--work-dir', str(tmp_path / 'work')]
    assert main(command) == 1
    out = capsys.readouterr().out
    assert f'{len(tags) - 1} published, 1 failed; run the same again' in out
    assert f'{TAG}: failed: model.safetensors could not be uploaded to me/{TAG}: the connection' in out
    assert set(hub.repos) == {f'me/{tag}' for tag in tags if tag != TAG}
    hub.faults.clear()
    assert main(command) == 0
    assert f'{len(tags) - 1} unchanged' in capsys.readouterr().out and f'me/{TAG}' in hub.repos
    assert len(converted) == len(tags)  # what was converted is taken as it is


def test_other_weights_are_replaced_and_peoples_text_is_kept(hub, converted, tmp_path):
    run = publish_official('me', tags=[TAG], work_dir=tmp_path / 'work')
    assert list(run.published) == [TAG]
    repo = hub.repos[f'me/{TAG}']
    tree = dict(repo.commits[repo.refs['main']])
    card = tree['README.md'][0].decode().replace('| top1 | 77.4 |', '| top1 | 99.9 |') + '\nNote of mine.\n'
    repo.commit('main', {**tree, 'model.safetensors': (b'other', True), 'README.md': (card.encode(), False)})
    run = publish_official('me', tags=[TAG], work_dir=tmp_path / 'work')
    assert list(run.published) == [TAG] and not run.unchanged
    files = repo.files()
    assert files['model.safetensors'] == (tmp_path / 'work' / TAG / 'model.safetensors').read_bytes()
    assert files['README.md'].decode().endswith('Note of mine.\n') and b'99.9' not in files['README.md']
    hub.add_repo('you/model', {'config.json': b'{"architecture": "resnet50"}'})
    hub.repos[f'lab/{TAG}'] = hub.repos['you/model']
    run = publish_official('lab', tags=[TAG], work_dir=tmp_path / 'work')
    assert 'holds resnet50, not a MultiGrain' in run.failed[TAG]


def test_what_stops_a_run_before_anything_is_converted(hub, converted, tmp_path, monkeypatch):
    work = {'work_dir': tmp_path / 'work'}
    with pytest.raises(ValueError, match='fb_p9 is no official tag: choose from multigrain_'):
        publish_official('me', tags=['fb_p9'], **work)
    with pytest.raises(ValueError, match='name it USER/NAME'):
        publish_official('me/too', **work)
    monkeypatch.setenv('HF_TOKEN', 'me-read')
    with pytest.raises(RuntimeError, match='may only read'):
        publish_official('me', **work)
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(RuntimeError, match='no token was found'):
        publish_official('me', **work)
    assert not converted and not (tmp_path / 'work').exists() and not hub.repos


def test_files_on_the_disk_and_a_dry_run(hub, converted, tmp_path, capsys):
    (tmp_path / 'files').mkdir()
    (tmp_path / 'files' / 'joint_3B_0.5.pth').write_bytes(b'x')
    other = 'multigrain_resnet50.fb_p1_l05_in1k'
    command = ['publish-official', 'me', '--tags', TAG, other, '--source-dir', str(tmp_path / 'files'), '--dry-run',
               '--work-dir', str(tmp_path / 'work')]
    assert main(command) == 1
    out = capsys.readouterr().out
    assert converted == [tmp_path / 'files' / 'joint_3B_0.5.pth'] and not hub.requests
    assert 'joint_1B_0.5.pth is not there: download it from https://dl.fbai' in out and '1 prepared, 1 failed' in out
    assert {p.name for p in (tmp_path / 'work' / TAG).iterdir()} == {'README.md', 'config.json', 'model.safetensors'}


@pytest.mark.slow
@torch.inference_mode()
def test_a_file_of_the_original_from_disk_to_hub_and_back(hub, tmp_path):
    state = original.state_dict('resnet50')
    torch.save({'model_state': state, 'optimizer_state': {}, 'extra': {}}, tmp_path / 'joint_3B_0.5.pth')
    run = publish_official('me', tags=[TAG], work_dir=tmp_path / 'work', source_dir=tmp_path)
    assert list(run.published) == [TAG], run.failed
    loaded = timm.create_model(f'hf-hub:me/{TAG}', pretrained=True).eval()
    reference = timm.create_model(
        'multigrain_resnet50', pretrained=True, pretrained_cfg_overlay=dict(state_dict=state, source=None)).eval()
    x = original.image(64, 64, 1)
    assert torch.equal(loaded(x), reference(x)) and loaded.gem_p == 3
    assert loaded.pretrained_cfg['license'] == 'cc-by-nc-4.0'
    assert loaded.pretrained_cfg['tag'] == 'fb_p3_l05_in1k'
    assert publish_official('me', tags=[TAG], work_dir=tmp_path / 'work').unchanged
