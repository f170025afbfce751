"""What is only installed with an extra of the package."""
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """For an import in the block: ImportError that says what needs it, and how it is installed."""
    try:
        yield
    except ImportError as e:
        raise ImportError(f"{what} needs {e.name or 'more'}: pip install 'timm_multigrain[{name}]'.") from e
