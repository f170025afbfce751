"""Pickles of plain values, as the ground truth of Revisited Oxford and Paris is published, without running any of them.

Only the opcodes of numbers, texts, lists and dicts are carried out, and numpy's arrays and numbers are read as those.
"""
import io
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from timm_multigrain.images.sources import printable

__all__ = ['load_plain_pickle']

MAX_BYTES, MAX_DEPTH = 16 << 20, 20
_NAMES = (
    'PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING '
    'SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 LIST EMPTY_LIST '
    'APPEND APPENDS DICT EMPTY_DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL '
    'STACK_GLOBAL REDUCE')
_OPCODES = [getattr(pickle, name)[0] for name in _NAMES.split()]


def load_plain_pickle(path: str | os.PathLike) -> Any:
    """Read a pickle of numbers, texts, lists and dicts; tuples and numpy arrays become lists.

    Raises:
        FileNotFoundError: File not found.
        ValueError: It holds anything else, is damaged, or is larger than any ground truth.
    """
    path = Path(path)
    try:
        with open(path, 'rb') as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f'{printable(path)} not found.') from None
    try:
        if len(content) > MAX_BYTES:
            raise ValueError(f'larger than {MAX_BYTES} bytes')
        unpickler = _Unpickler(io.BytesIO(content), encoding='latin1')
        unpickler.left = 10 * len(content)
        return unpickler.plain(unpickler.load())
    except Exception as e:  # a damaged pickle raises whatever its opcodes run into
        reason = printable(str(e)[:200] or type(e).__name__)
        raise ValueError(f'{printable(path)} is not a whole pickle of numbers, texts, lists and dicts ({reason}); '
                         'nothing in it was run.') from e


class _Unpickler(pickle._Unpickler):
    """The one written in Python, whose memo is a dict: in the one in C, a few bytes ask for a table of gigabytes."""
    dispatch = {code: pickle._Unpickler.dispatch[code] for code in _OPCODES}
    # Tuples become lists, which cannot be keys: the hash of a tuple of tuples that are one and the same takes forever.
    dispatch |= {pickle.TUPLE[0]: dispatch[pickle.LIST[0]], pickle.EMPTY_TUPLE[0]: dispatch[pickle.EMPTY_LIST[0]],
                 pickle.BYTEARRAY8[0]: dispatch[pickle.BINBYTES8[0]]}  # which allocates nothing beforehand

    def load_tuple_of(self, number: int) -> None:
        self.stack[-number:] = [self.stack[-number:]]

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (_Dtype, _Array)):
            raise ValueError('it sets the state of an object')
        self.stack[-1].set_state(*state)

    dispatch |= {
        pickle.TUPLE1[0]: lambda self: self.load_tuple_of(1), pickle.TUPLE2[0]: lambda self: self.load_tuple_of(2),
        pickle.TUPLE3[0]: lambda self: self.load_tuple_of(3), pickle.BUILD[0]: load_build}

    def find_class(self, module: str, name: str) -> Any:
        known = {'_codecs.encode': self.encode, '__builtin__.bytes': lambda: b'',
                 'numpy.ndarray': None, 'numpy.dtype': _Dtype,
                 'numpy.core.multiarray._reconstruct': lambda *_: _Array(),
                 'numpy.core.multiarray.scalar': lambda dtype, data: _Array(data, dtype),
                 'numpy.core.numeric._frombuffer': _Array}
        name = f'{module}.{name}'.replace('numpy._core', 'numpy.core')
        if name not in known:
            raise ValueError(f'it calls {name}')
        return known[name]

    def encode(self, text: str, encoding: str) -> bytes:  # how protocols 0 to 2 write bytes
        if encoding != 'latin1':
            raise ValueError(f'it has bytes in {encoding}')
        self.spend(len(text))
        return text.encode('latin1')

    def spend(self, number: int) -> None:
        self.left -= number
        if self.left < 0:
            raise ValueError('it repeats itself')

    def plain(self, value: Any, depth: int = 0) -> Any:
        """The value without stand-ins, as a tree: what is used twice counts twice."""
        self.spend(1)
        if depth > MAX_DEPTH:
            raise ValueError(f'it is nested more than {MAX_DEPTH} deep')
        value = value.to_list() if isinstance(value, _Array) else value
        if isinstance(value, dict):
            return {self.plain(k, depth + 1): self.plain(v, depth + 1) for k, v in value.items()}
        if isinstance(value, list):
            return [self.plain(part, depth + 1) for part in value]
        if value is not None and not isinstance(value, (bool, int, float, str, bytes)):
            raise ValueError(f'it holds a {type(value).__name__}')
        return value


class _Dtype:
    order = '='

    def __init__(self, code: str, *_: Any):
        if not re.fullmatch(r'[biuf][1248]|[SU][1-9]\d{0,3}', code):
            raise ValueError(f'it has an array of {code}')
        self.code = code

    def set_state(self, version: int, order: str, *_: Any) -> None:
        self.order = order.replace('|', '=')


class _Array:
    def __init__(self, data: bytes | str = b'', dtype: _Dtype | None = None, shape: Sequence = (), order: str = 'C'):
        self.data = data.encode('latin1') if isinstance(data, str) else data  # a text in Python 2
        self.dtype, self.shape, self.order = dtype, shape, order

    def set_state(self, version: int, shape: list, dtype: _Dtype, fortran: bool, data: bytes | str) -> None:
        self.__init__(data, dtype, shape, 'F' if fortran else 'C')

    def to_list(self) -> Any:
        if len(self.shape) > 2:
            raise ValueError(f'it has an array of {len(self.shape)} axes')
        if not self.data and 0 in self.shape:  # a million rows of no number are a million lists
            return []
        array = np.frombuffer(self.data, self.dtype.order + self.dtype.code)
        return array.reshape(self.shape, order=self.order).tolist()
