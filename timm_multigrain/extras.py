"""What is only installed with an extra of the package."""
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """For an import in the block: ImportError that says what needs it, and how it is installed."""
    try:
        yield
    except ImportError as e:
        module = (e.name or 'more').partition('.')[0]
        raise ImportError(f"{what} needs {module}: pip install 'timm_multigrain[{name}]'.") from e
