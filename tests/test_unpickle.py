"""Pickles of plain values come back as lists and dicts of them; one that calls anything runs nothing."""
import collections
import os
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_multigrain.measure.unpickle import load_plain_pickle

from .limited import run_limited

ARRAYS = {
    'int': np.arange(6).reshape(2, 3), 'fortran': np.asfortranarray(np.random.default_rng(0).random((3, 4))),
    'big endian': np.arange(3, dtype='>i4'), 'text': np.array(['ab', 'c']), 'bool': np.array([True, False]),
    'empty': np.zeros((0, 4)), '0-d': np.array(3.), 'bytes': np.array([b'ab', b'c']), 'half': np.float16(2.5)}

RAN = []


def note_run(*args):
    """What a hostile pickle calls."""
    RAN.append(args)


class Call:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


class State:
    def __init__(self, value):
        self.value = value


def write(path, value, protocol=4):
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_come_back(tmp_path, protocol):
    value = {**ARRAYS, 'nested': [1, 2.5, None, True, [b'\x00\xff', b''], {3: ['ü'], 2**70: -5}, [], {}], 4: 'x' * 300}
    read = load_plain_pickle(write(tmp_path / 'a.pkl', value, protocol))
    assert list(read) == list(value) and read['nested'] == value['nested'] and read[4] == value[4]
    assert all(read[key] == array.tolist() for key, array in ARRAYS.items() if array.size)
    assert read['empty'] == []
    read = load_plain_pickle(write(tmp_path / 'a.pkl', [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, (4, 5))], protocol))
    assert read == [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, [4, 5]]]


def test_ground_truth_as_published(shared_data):
    path = shared_data / 'gt' / 'gnd_rparis6k.pkl'
    with open(path, 'rb') as file:
        assert load_plain_pickle(path) == pickle.load(file)


def test_python_2(tmp_path):
    """Texts of Python 2 are bytes; the published files are read as Latin-1."""
    read = load_plain_pickle(write(tmp_path / 'a.pkl', b"(dp0\nS'caf\\xe9'\np1\nI3\ns."))
    assert read == {'café': 3}


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@settings(max_examples=60, deadline=None)
@given(value=plain, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_any_plain_value(tmp_path_factory, value, protocol):
    path = write(tmp_path_factory.mktemp('p') / 'a.pkl', pickle.dumps(value, protocol))
    assert load_plain_pickle(path) == value


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_read(tmp_path_factory, data):
    """Whatever the bytes, the answer is a value or a ValueError."""
    content = bytearray(pickle.dumps({'a': ARRAYS, 'b': [1, (2, 'x')]}, data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path_factory.mktemp('p') / 'a.pkl', bytes(content[:data.draw(st.integers(0, len(content)))]))
    try:
        load_plain_pickle(path)
    except ValueError as e:
        assert str(path) in str(e)


HOSTILE = {
    'function': Call(note_run, 1),
    'shell': Call(os.system, 'touch pickled-was-here'),
    'eval': Call(eval, 'note_run()'),
    'getattr': Call(getattr, [], 'append'),
    'own class': State(1),
    'ordered dict': collections.OrderedDict(a=1),
    'import': Call(__import__, 'os'),
    'numpy loader': Call(np.load, 'x'),
    'ndarray': Call(np.ndarray, (1 << 40,)),
    'codec': Call(__import__('_codecs').encode, 'x', 'rot13'),
    'object array': np.array([1, 'x', None], dtype=object),
    'record array': np.zeros(2, dtype=[('a', 'i4'), ('b', 'f8')]),
    'object dtype': np.dtype('O'),
    'date': np.array(['2020-01-01'], dtype='datetime64[D]'),
    'complex': np.array([1j]),
    'set': {1, 2},
    'three axes': np.zeros((2, 2, 2)),
    'function itself': note_run,
}


@pytest.mark.parametrize('kind', HOSTILE)
@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_code_is_refused_and_not_run(tmp_path, monkeypatch, kind, protocol):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / 'a.pkl', {'gnd': [HOSTILE[kind]]}, protocol)
    with pytest.raises(ValueError, match=r'a\.pkl is not .*nothing in it was run') as error:
        load_plain_pickle(path)
    assert not RAN and os.listdir(tmp_path) == ['a.pkl'] and '\n' not in str(error.value)


def opcodes(*parts):
    return b'\x80\x02' + b''.join(parts) + b'.'


@pytest.mark.parametrize('content', [
    opcodes(b'cnumpy\ndtype\n', b'}(X\x01\x00\x00\x00aK\x01u', b'b'),           # state of one of our own functions
    opcodes(b'c_codecs\nencode\n', b'N}X\x0c\x00\x00\x00__defaults__K\x01s\x86', b'b'),
    opcodes(b'cnumpy\nndarray\n', b'K\x01\x85', b'\x81'),                       # cls.__new__
    opcodes(b'\x82\x05'),                                                      # registered extension
    opcodes(b'X\x01\x00\x00\x00a', b'Q'),                                      # persistent id
    opcodes(b'cbuiltins\nset.__class__\n'),                                    # dotted name
    opcodes(b'cnumpy.core.multiarray\n_reconstruct\n', b'cnumpy\nndarray\nK\x00\x85C\x01b\x87', b'R'),
], ids=['build', 'slots', 'newobj', 'extension', 'persistent', 'dotted', 'array without state'])
def test_opcodes_that_reach_around(tmp_path, content):
    with pytest.raises(ValueError, match=r'a\.pkl is not a whole pickle'):
        load_plain_pickle(write(tmp_path / 'a.pkl', content))


def claim(code, size):
    return opcodes(code + struct.pack('<Q', size))


def repeated(call):
    """A file of 240 kB, nearly all of it 20,000 times the same call with 100 kB of data."""
    return pickle.dumps([Call(*call) for _ in range(20_000)], 2)


codecs = __import__('_codecs')
LARGE = {
    'memo': opcodes(b'K\x01', b'r' + struct.pack('<I', 0x7fffffff), b'0'),
    'text': claim(b'\x8d', 1 << 40), 'bytes': claim(b'\x8e', 1 << 40), 'bytearray': claim(b'\x96', 1 << 33),
    'frame': claim(b'\x95', 1 << 40), 'number': opcodes(b'\x8b' + struct.pack('<i', 0x7fffffff)),
    'array': pickle.dumps(np.zeros((1, 1), np.uint8), 4).replace(b'K\x01\x86', b'J\xff\xff\xff\x7f\x86'),
    'wide texts': pickle.dumps(np.array(['a']), 4).replace(b'U1', b'U9999999999'),
    'empty rows': pickle.dumps([np.zeros((0, 7), np.uint8)], 4).replace(b'K\x00K\x07', b'J\xff\xff\xff\x7fK\x00'),
    'bytes again and again': repeated((codecs.encode, 'a' * 100_000, 'latin1')),
    'arrays again and again': repeated(
        (np.zeros(1).__reduce_ex__(5)[0], b'a' * 100_000, np.dtype('u1'), (100_000,), 'C')),
    'lists of the next one twice': b'\x80\x02](K\x01K\x01e' + b'q\x00](h\x00h\x00e' * 40 + b'.',
    'lists of the next one a thousand times': b'\x80\x02](K\x01e' + (b'q\x00](' + b'h\x00' * 1000 + b'e') * 4 + b'.',
    'tuples as a key': b'\x80\x02}K\x01' + b'q\x00h\x00\x86' * 40 + b'K\x01s.',
    'deep': b'\x80\x02' + b']' * 100_000 + b'a' * 99_999 + b'.',
}


def test_large_claims_cost_nothing(tmp_path):
    """Each of these files, of half a MB at most, is refused within 200 MB; `empty rows` is an empty list."""
    for number, content in enumerate(LARGE.values()):
        (tmp_path / f'{number}.pkl').write_bytes(content)
    outcomes = run_limited('''
        from timm_multigrain.measure.unpickle import load_plain_pickle
        limit(200)
        for number in range(int(sys.argv[2])):
            try:
                print(load_plain_pickle(f"{sys.argv[1]}/{number}.pkl"))
            except ValueError as e:
                print(e)
    ''', tmp_path, len(LARGE))
    assert len(outcomes) == len(LARGE)
    for kind, outcome in zip(LARGE, outcomes, strict=True):
        assert ('nothing in it was run' in outcome and 'MemoryError' not in outcome) if kind != 'empty rows' else (
            outcome == '[[]]'), (kind, outcome)


def test_other_files(tmp_path):
    loop = []
    loop.append(loop)
    with pytest.raises(ValueError, match='nested more than 20 deep'):
        load_plain_pickle(write(tmp_path / 'a.pkl', loop))
    for content in (b'', pickle.dumps([1] * 100)[:-3], b'x' * (17 << 20)):
        with pytest.raises(ValueError, match='not a whole pickle'):
            load_plain_pickle(write(tmp_path / 'a.pkl', content))
    with pytest.raises(FileNotFoundError, match='not found'):
        load_plain_pickle(tmp_path / 'none.pkl')
