"""Pickles of plain values, read without running anything that is in them.

The ground truth of several benchmarks is published as a pickle, a format whose files can run any code when they are
loaded. Here a file may hold numbers, texts, lists, tuples, dicts, sets, and numpy arrays and scalars of numbers, texts
or booleans; whatever else it names is refused, and no constructor of numpy's sees a byte of it.
"""
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ['load_plain_pickle']

MAX_BYTES = 256 << 20
_KINDS = 'biufSU'


def load_plain_pickle(path: str | os.PathLike, max_bytes: int = MAX_BYTES) -> Any:
    """Read a pickle of plain values, also one of Python 2 (texts as Latin-1).

    Args:
        path: The file.
        max_bytes: Larger files are refused.

    Returns:
        Its value; arrays are writeable copies.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no whole pickle, is too large, or holds anything but plain values.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: there is no such file.') from None
    if size > max_bytes:
        raise ValueError(f'{path} has {size} bytes, more than the {max_bytes} of any ground truth: it is not read.')
    try:
        return _Plain().convert(_PlainUnpickler(io.BytesIO(path.read_bytes()), encoding='latin1').load())
    except _Refused as e:
        raise ValueError(f'{path} is refused, nothing of it was run: the pickle {e}; a ground truth holds numbers, '
                         'texts, lists, dicts and numpy arrays only.') from e
    except Exception as e:  # a damaged pickle raises whatever its opcodes run into
        raise ValueError(f'{path} is no whole pickle of plain values ({type(e).__name__}: '
                         f'{str(e) or "no reason given"}): download it again.') from e


class _Refused(Exception):
    pass


class _PlainUnpickler(pickle._Unpickler):
    """The unpickler written in Python: in the one written in C, a few bytes can ask for gigabytes of memo table."""

    def find_class(self, module: str, name: str) -> Callable:
        module = {'__builtin__': 'builtins'}.get(module, module).replace('numpy._core', 'numpy.core')
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Refused(f'calls {module}.{name}') from None

    def get_extension(self, code: int) -> None:
        raise _Refused(f'calls number {code} of the registered extensions')

    def persistent_load(self, pid: Any) -> None:
        raise _Refused('refers to objects outside of it')

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], (_Dtype, _Array)):
            raise _Refused(f'sets the state of a {type(self.stack[-2]).__name__}')
        super().load_build()

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


class _Dtype:
    """What a pickled numpy.dtype says."""

    def __init__(self, code: str, *_: Any):
        if not isinstance(code, str):
            raise _Refused(f'has an array of {code!r}')
        try:
            self.dtype = np.dtype(code)
        except (TypeError, ValueError):
            raise _Refused(f'has an array of {code!r}') from None
        if self.dtype.kind not in _KINDS:
            raise _Refused(f'has an array of {code!r}, not of numbers or texts')

    def __setstate__(self, state: tuple) -> None:
        order = state[1]
        if order not in ('<', '>', '|', '='):
            raise _Refused(f'has an array of byte order {order!r}')
        self.dtype = self.dtype.newbyteorder(order) if order in '<>' else self.dtype


class _Array:
    """A pickled array, before it is one."""

    def __init__(self, *_: Any):
        self.value = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _from_bytes(data, dtype, shape, 'F' if fortran else 'C')


def _from_bytes(data: Any, dtype: Any, shape: Any, order: str = 'C') -> np.ndarray:
    if isinstance(data, str):  # written by Python 2
        data = data.encode('latin1')
    if not isinstance(dtype, _Dtype) or not isinstance(data, (bytes, bytearray)):
        raise _Refused('has an array that is not made of bytes')
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order).copy(order='K')


def _make_array(data: Any, dtype: Any, shape: Any, order: str) -> _Array:
    array = _Array()
    array.value = _from_bytes(data, dtype, shape, order)
    return array


def _make_scalar(dtype: Any, data: Any = b'') -> Any:
    return _from_bytes(data, dtype, ())[()]


def _bytes(data: Any = b'', encoding: Any = 'latin1') -> bytes:
    if encoding not in ('latin1', 'latin-1') or not isinstance(data, (str, bytes)):
        raise _Refused(f'makes bytes of a {type(data).__name__}, encoding {encoding!r}')
    return data.encode('latin1') if isinstance(data, str) else data


def _array_class(*_: Any) -> None:
    raise _Refused('makes an array in an unusual way')


_ALLOWED = {
    ('numpy', 'ndarray'): _array_class,
    ('numpy', 'dtype'): _Dtype,
    ('numpy.core.multiarray', '_reconstruct'): _Array,
    ('numpy.core.multiarray', 'scalar'): _make_scalar,
    ('numpy.core.numeric', '_frombuffer'): _make_array,
    ('_codecs', 'encode'): _bytes,
    ('builtins', 'bytes'): _bytes,
    ('builtins', 'bytearray'): _bytes,
    ('builtins', 'set'): lambda values=(): set(values),
    ('builtins', 'frozenset'): lambda values=(): frozenset(values),
}


class _Plain:
    """Copies what was read, with arrays in place of their stand-ins; each object once, however often it is met."""

    def __init__(self):
        self.done: dict[int, Any] = {}
        self.alive: list[Any] = []  # an id is an object's own only as long as the object is there

    def convert(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, bytearray, np.generic)):
            return value
        if id(value) not in self.done:
            self.alive.append(value)
            self.done[id(value)] = _Refused  # until it is complete: one that holds itself is met again
            self.done[id(value)] = self._copy(value)
        elif self.done[id(value)] is _Refused:
            raise _Refused('holds a list that holds itself')
        return self.done[id(value)]

    def _copy(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self.convert(k): self.convert(v) for k, v in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return type(value)(map(self.convert, value))
        if isinstance(value, _Array) and value.value is not None:
            return value.value
        if isinstance(value, _Dtype):
            return str(value.dtype)
        raise _Refused(f'holds a {type(value).__name__.strip("_")}')
