"""Pickles of plain values come back as pickle reads them; one that calls anything runs nothing."""
import collections
import os
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_multigrain.retrieval.unpickle import load_plain_pickle

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


def same(a, b):
    if isinstance(a, (np.ndarray, np.generic)):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and (a == b).all()
    return type(a) is type(b) and a == b


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_come_back(tmp_path, protocol):
    value = {**ARRAYS, 'nested': [1, 2.5, None, (True, 'ü', b'\x00\xff', b''), {3: {4, 5}}, frozenset([6])]}
    read = load_plain_pickle(write(tmp_path / 'a.pkl', value, protocol))
    assert list(read) == list(value) and all(same(value[key], read[key]) for key in value)
    read['int'][0] = 7  # writeable


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
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner), max_leaves=20)


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
    'function itself': note_run,
}


@pytest.mark.parametrize('kind', HOSTILE)
@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_code_is_refused_and_not_run(tmp_path, monkeypatch, kind, protocol):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / 'a.pkl', {'gnd': [HOSTILE[kind]]}, protocol)
    with pytest.raises(ValueError, match=r'a\.pkl is refused, nothing of it was run') as error:
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
    with pytest.raises(ValueError, match=r'a\.pkl is (refused|no whole pickle)'):
        load_plain_pickle(write(tmp_path / 'a.pkl', content))


def test_large_claims_cost_nothing(tmp_path):
    """A memo slot, or a text, whose number says gigabytes."""
    memo = opcodes(b'K\x01', b'r' + struct.pack('<I', 0x7fffffff))
    assert load_plain_pickle(write(tmp_path / 'a.pkl', memo)) == 1
    with pytest.raises(ValueError, match='no whole pickle'):
        load_plain_pickle(write(tmp_path / 'a.pkl', opcodes(b'\x8d' + struct.pack('<Q', 1 << 60))))


def test_shared_lists_are_copied_once(tmp_path):
    """Forty lists that hold the next one twice are 2**40 leaves for who copies naively."""
    value = [1]
    for _ in range(40):
        value = [value, value]
    read = load_plain_pickle(write(tmp_path / 'a.pkl', value))
    assert read[0] is read[1]


def test_other_files(tmp_path):
    loop = []
    loop.append(loop)
    with pytest.raises(ValueError, match='holds itself'):
        load_plain_pickle(write(tmp_path / 'a.pkl', loop))
    with pytest.raises(ValueError, match='no whole pickle'):
        load_plain_pickle(write(tmp_path / 'a.pkl', b''))
    with pytest.raises(ValueError, match='no whole pickle'):
        load_plain_pickle(write(tmp_path / 'a.pkl', pickle.dumps([1] * 100)[:-3]))
    with pytest.raises(ValueError, match='has 115 bytes, more than the 100'):
        load_plain_pickle(write(tmp_path / 'a.pkl', b'x' * 115), max_bytes=100)
    with pytest.raises(FileNotFoundError, match='there is no such file'):
        load_plain_pickle(tmp_path / 'none.pkl')
