"""The card: metadata that the Hub's client reads, figures with their settings, a snippet that runs, people's text."""
import json
import math
import re

import pytest
import torch
from huggingface_hub import ModelCard

from timm_multigrain.hub import Metric, publish, read_metrics
from timm_multigrain.hub.card import CITATION, load_card, make_card, usage_snippet
from timm_multigrain.measure.results import parse_metrics

from .tiny import figure, tiny_model

HOLIDAYS = dict(task='retrieval', dataset='INRIA Holidays', metric='mAP', value=92.5, size=500, p='inf',
                protocol='longer side', whitening=512, command='timm-multigrain evaluate | tee log')
COPYDAYS = dict(task='copy-detection', dataset='INRIA Copydays', metric='mAP', value=75, size=224, p=None,
                protocol='crop', whitening='20,000 images', split='strong', source_name='paper',
                source_url='https://arxiv.org/abs/1902.05509')


def _card(model=None, base=None, **facts):
    return make_card(model or tiny_model(), **{'repo_id': 'me/boats', 'license': 'mit', **facts}, base=base)


def test_metadata():
    metrics = parse_metrics([figure(77.4), figure(94, metric='top5'), HOLIDAYS, COPYDAYS])
    card = _card(metrics=metrics)
    read = ModelCard(str(card)).data  # as a reader of the file finds it
    data = read.to_dict()
    assert data['license'] == 'mit' and data['library_name'] == 'timm'
    assert data['pipeline_tag'] == 'image-classification' and {'multigrain', 'timm'} <= set(data['tags'])
    index = data['model-index']
    assert [entry['name'] for entry in index] == ['boats']
    imagenet, holidays, copydays = index[0]['results']
    assert [Metric.from_eval_result(result) for result in read.eval_results] == metrics
    assert imagenet['task']['type'] == 'image-classification' and imagenet['dataset']['type'] == 'imagenet-1k'
    assert [(m['type'], m['value']) for m in imagenet['metrics']] == [('accuracy', 77.4), ('top_5_accuracy', 94)]
    settings = {'size': 224, 'p': 3, 'protocol': 'shorter side 256, centre crop', 'whitening': 'none'}
    assert all(m['args'] == settings for m in imagenet['metrics'])
    assert holidays['metrics'][0]['args'] == {
        'size': 500, 'p': 'inf', 'protocol': 'longer side', 'whitening': 512,
        'command': 'timm-multigrain evaluate | tee log'}
    assert copydays['task']['type'] == 'image-copy-detection' and copydays['dataset']['split'] == 'strong'
    assert copydays['source'] == {'name': 'paper', 'url': 'https://arxiv.org/abs/1902.05509'}
    assert 'model-index' not in _card().data.to_dict() and 'model_name' not in _card().data.to_dict()
    assert _card(tiny_model(num_classes=0)).data.pipeline_tag == 'image-feature-extraction'


def test_classes_are_named():
    model = tiny_model()
    model.pretrained_cfg['label_names'] = ['boat | ship', 'a<!-- timm_multigrain end model -->', 'tree\n\x1b[31m']
    assert (r'| classes | 3: boat \| ship, a&lt;!-- timm_multigrain end model --&gt;, tree\n\x1b[31m |'
            in _card(model).text)
    model.pretrained_cfg['label_names'] = {'0': 'boat'}
    assert '| classes | 3 |' in _card(model).text


def test_text():
    model = tiny_model(gem_p=2.5, whitening=33)
    text = _card(model, metrics=parse_metrics([figure(77.4), HOLIDAYS, COPYDAYS]), description='Boats only.').text
    for expected in (
            '# boats', 'Boats only.', '| trunk | `test_resnet` of timm |', '| pooling | GeM, p = 2.5 |',
            '| whitening | to 33 components |', '| embedding | 33 components |', '| license of the weights | mit |',
            '| classification | ImageNet-1k | top1 | 77.4 | 224 | 3 | shorter side 256, centre crop | none |  |',
            r'| retrieval | INRIA Holidays | mAP | 92.5 | 500 | inf | longer side | 512 | `timm-multigrain evaluate',
            '| copy-detection | INRIA Copydays, strong | mAP | 75 | 224 | none | crop | 20,000 images | [paper](https:',
            f'| parameters | {sum(p.numel() for p in model.parameters()):,} |', CITATION):
        assert expected in text
    assert 'GeM, p = inf' in _card(tiny_model(gem_p=math.inf)).text
    assert 'one p per channel, 1.' in _card(tiny_model(per_channel_p=True)).text
    assert 'No figures were recorded' in _card().text
    assert 'pooling | rmac' in _card(tiny_model(global_pool='rmac')).text
    for own, shown in ((None, "the trunk's own"), ('max', "the trunk's own, max")):
        assert f'pooling | {shown} |' in _card(tiny_model(global_pool='trunk', trunk_pool=own)).text


@pytest.mark.parametrize('kwargs', [{}, {'in_chans': 5, 'num_classes': 0}])
def test_the_usage_snippet_runs(hub, kwargs):
    model = tiny_model(**kwargs)
    publish(model, 'me/model', license='mit')
    text = hub.repos['me/model'].files()['README.md'].decode()
    snippet = re.search(r'```python\n(.*?)```', text, flags=re.DOTALL)[1]
    assert snippet.splitlines()[0].startswith('import timm_multigrain') and snippet == usage_snippet(model, 'me/model')
    found = {}
    exec(compile(snippet, 'README.md', 'exec'), found)
    assert found['descriptor'].shape == (1, 96) and found['batch'].shape == (1, model.in_chans, 160, 160)
    if model.num_classes:
        assert torch.equal(found['logits'], model(found['batch']))
    torch.testing.assert_close(found['descriptor'].norm(), torch.tensor(1.))


def test_a_second_publication_keeps_what_people_wrote(hub):
    publish(tiny_model(), 'me/model', license='mit', metrics=[figure(70.5)])
    repo = hub.repos['me/model']
    text = repo.files()['README.md'].decode()
    text = text.replace('# model\n', '# My boats\n\nA photo of *every* boat.\n').replace('## Usage', '## How to use it')
    text = text.replace('library_name: timm', 'language: en\nlibrary_name: timm\n' + WIDGET)
    text = text.replace('tags:\n', 'tags:\n- boats\n').replace('| classes | 3 |', '| classes | 99 |')
    text = re.sub(r'(  results:\n)', r'\1' + THEIRS, text) + '\n## Limits\n\nNo ships: $x \\1 \\g<0>$.\n'
    repo.commit('main', {**repo.commits[repo.refs['main']], 'README.md': (text.encode(), False)})
    about = r'Made with \1 and \d+.'
    publish(tiny_model(1, gem_p=4), 'me/model', metrics=[figure(71.25), HOLIDAYS], description=about)
    new = repo.files()['README.md'].decode()
    limits = '\n## Limits\n\nNo ships: $x \\1 \\g<0>$.\n'
    for kept in ('# My boats\n\nA photo of *every* boat.\n', '## How to use it', limits, about):
        assert kept in new
    data = ModelCard(new).data
    assert data.language == 'en' and data.widget == [{'src': 'boat.jpg', 'title': 'a | b'}] and data.tags[0] == 'boats'
    assert data.tags.count('multigrain') == 1 and data.license == 'mit'
    values = {(r.dataset_name, r.metric_value) for r in data.eval_results}
    assert values == {('Boats', 0.5), ('ImageNet-1k', 71.25), ('INRIA Holidays', 92.5)}
    assert '99' not in new and '70.5' not in new and '71.25 | 224' in new and 'GeM, p = 4 |' in new
    assert new.count('begin usage') == new.count('end usage') == new.count('<!-- timm_multigrain: ') == 1
    # once more without anything new: not a byte changes, and the figures stay with the same weights
    commits = len(repo.commits)
    publish(tiny_model(1, gem_p=4), 'me/model', description=about)
    assert repo.files()['README.md'].decode() == new and len(repo.commits) == commits


WIDGET = 'widget:\n- src: boat.jpg\n  title: a | b'
THEIRS = """  - task:
      type: image-classification
    dataset:
      name: Boats
      type: boats
    metrics:
    - type: accuracy
      value: 0.5
"""


def test_cards_of_other_origin(hub):
    hub.add_repo('me/plain', {'README.md': b'# Hello\r\n\r\nNo metadata.\r\n'})
    publish(tiny_model(), 'me/plain', license='mit')
    text = hub.repos['me/plain'].files()['README.md'].decode()
    assert '# Hello\r\n\r\nNo metadata.' in text and ModelCard(text).data.license == 'mit'
    hub.add_repo('me/bom', {'README.md': '\ufeff---\nlicense: apache-2.0\nlanguage: de\n---\nGrüße'.encode()})
    publish(tiny_model(), 'me/bom', license='mit')
    card = ModelCard(hub.repos['me/bom'].files()['README.md'].decode())
    assert card.data.license == 'mit' and card.data.language == 'de' and card.text.lstrip().startswith('Grüße')
    for content in (b'---\nlicense: [\n---\n', b'\xff\xfe\xff', b'---\n- a list\n---\n',
                    b'---\nmodel-index:\n- name: x\n---\n'):
        hub.add_repo('me/broken', {'README.md': content})
        with pytest.raises(ValueError, match=r'README\.md of me/broken cannot be read .*mend its metadata first') as e:
            publish(tiny_model(), 'me/broken', license='mit')
        assert '\n' not in str(e.value) and hub.repos['me/broken'].files()['README.md'] == content


def test_a_deleted_block_stays_deleted_and_a_broken_one_is_left(tmp_path):
    text = str(_card())
    start, end = text.index('## Citation'), text.index('end citation -->') + len('end citation -->')
    edited = (text[:start] + text[end:]).replace('<!-- timm_multigrain end usage -->', 'Mine.')
    path = tmp_path / 'README.md'
    path.write_text(edited)
    new = str(_card(tiny_model(gem_p=4), load_card(path, 'it')))
    assert 'citation' not in new and 'Mine.' in new and 'GeM, p = 4' in new


def test_a_license_the_hub_does_not_know(hub):
    with pytest.raises(ValueError, match=r'me/model could not be uploaded: .*"license" must be one of'):
        publish(tiny_model(), 'me/model', license='do what you like')
    assert not hub.repos and not hub.objects


@pytest.mark.parametrize('change, error', [
    ({'task': 'detection'}, "task is 'detection', and has to be one of classification, retrieval"),
    ({'value': 'high'}, r"value has to be a number, not 'high'"),
    ({'p': -1}, 'p is -1, and has to be above 0'),
    ({'protocol': ' '}, "protocol is ' ', and has to be a printable text"),
    ({'whitning': 3}, "unexpected keyword argument 'whitning'"),
])
def test_wrong_figures_are_one_sentence(tmp_path, change, error):
    path = tmp_path / 'results.json'
    path.write_text(json.dumps([figure(**change)]))
    with pytest.raises(ValueError, match=error) as caught:
        read_metrics(path)
    assert str(caught.value).startswith(f'{path}: figures[0]') and '\n' not in str(caught.value)


def test_a_license_is_no_yaml():
    card = _card(tiny_model(), license='mit\ntags: [x]\x1b')
    assert card.data.license == 'mit\ntags: [x]\x1b' and 'x' not in card.data.tags
