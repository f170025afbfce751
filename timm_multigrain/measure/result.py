"""What every measured result can do: print itself, be saved as JSON, be drawn."""
import json
import math
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from timm_multigrain.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['Result']


class Result(ABC):
    """Base of the results of a measure; `str` is the line to print."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Figures by name, plain numbers and lists; NaN stands for what was not measured."""

    @abstractmethod
    def plot(self, axes: 'Axes') -> None:
        """Draw into axes of matplotlib."""

    def to_json(self) -> str:
        """`to_dict` as JSON text, null where a figure is NaN."""
        return json.dumps(_plain(self.to_dict()), indent=1) + '\n'

    def save(self, path: str | os.PathLike) -> Path:
        """Write `to_json`, whole or not at all."""
        return write_text(path, self.to_json())

    def draw(self, path: str | os.PathLike) -> Path:
        """Draw into a picture; the ending of its name says which kind (.png, .svg, .pdf).

        Raises:
            ImportError: If matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as e:
            raise ImportError("Drawing needs matplotlib: pip install 'timm_multigrain[report]'.") from e
        figure = Figure(figsize=(6, 3.5), layout='constrained')
        self.plot(figure.subplots())
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        return path


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
