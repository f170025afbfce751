"""Results on a page: tables, training curves and a gallery of nearest images."""
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup
from PIL import Image

from timm_multigrain.extras import extra

from .page import write_page

Curves = Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]

RELATIONS = {'copy': 'Copy', 'class': 'Same class', 'other': 'Other'}
LINE_STYLES = [('#2f7fe6', ''), ('#e0701a', '6 3'), ('#1a9e62', '2 2'), ('#a65bd6', '8 2 2 2')]
INK = '#010203'  # stands for the text colour of the page


@dataclass(frozen=True)
class Table:
    """Result table of texts, the first column of which names the rows; `str` is the table to print."""
    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        rows = [self.headers, *self.rows]
        first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
        return '\n'.join('  '.join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows)


class Neighbor(NamedTuple):
    """Image found for a query; `relation` is 'copy' (of the query), 'class' (same class) or 'other'."""
    image: Image.Image
    score: float
    caption: str
    relation: str


class Answer(NamedTuple):
    """What one model finds for a query, nearest first, and what it predicts."""
    model: str
    neighbors: Sequence[Neighbor]
    prediction: str = ''


class Query(NamedTuple):
    """An image that was searched for, and the answers of the models."""
    image: Image.Image
    caption: str
    answers: Sequence[Answer]


def write_report(
        path: str | os.PathLike,
        title: str,
        intro: str,
        tables: Sequence[Table] = (),
        curves: Curves | None = None,
        gallery: Iterable[Query] = (),
        notes: Sequence[str] = (),
        command: str = '',
        curves_x: str = 'step',
) -> Path:
    """Write the page; a file of that name is replaced in one step.

    Args:
        path: HTML file; its folder is made if missing.
        curves: Run name to series name to (steps, values); one chart per series, one line per run, for which
            matplotlib is needed. Values that are not finite leave a gap.
        gallery: Queries with their nearest images.
        curves_x: What the steps of the curves count.
    """
    curves = curves or {}
    styles = {run: LINE_STYLES[i % len(LINE_STYLES)] for i, run in enumerate(curves)}
    names = list(dict.fromkeys(name for series in curves.values() for name in series))
    lines = {name: {run: series[name] for run, series in curves.items() if name in series} for name in names}
    charts = [(name, f'{name} by {curves_x}: {_in_words(lines[name])}', _chart(lines[name], styles, f'chart{i}-'))
              for i, name in enumerate(names)]
    return write_page(
        path, 'report.html', title=title, intro=intro, tables=tables, styles=styles, charts=charts, curves_x=curves_x,
        gallery=list(gallery), relations=RELATIONS, notes=notes, command=command)


def _in_words(lines: Mapping) -> str:
    return '; '.join(f'{run} from {v[0]:.3g} to {v[-1]:.3g}' for run, (_, v) in lines.items() if len(v))


def _chart(lines: Mapping, styles: Mapping[str, tuple[str, str]], prefix: str) -> Markup:
    """SVG of one series without its opening tag's size; ids start with the prefix, axes have the page's text colour."""
    with extra('report', 'A chart'):
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    with rc_context({'svg.fonttype': 'none', 'svg.hashsalt': prefix, 'font.size': 9}):
        figure = Figure(figsize=(3.9, 2.1), layout='constrained')
        axes = figure.subplots()
        for run, (steps, values) in lines.items():
            color, dashes = styles[run]
            pattern = (0, [float(d) for d in dashes.split()]) if dashes else '-'
            axes.plot(steps, values, color=color, linestyle=pattern, marker='o' if len(values) == 1 else None)
        axes.tick_params(colors=INK)
        axes.grid(axis='y', color=INK, alpha=0.12)
        axes.spines[:].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format='svg', transparent=True, metadata={'Date': None})
    svg = re.sub(r'^.*?<svg [^>]*viewBox="([^"]*)"[^>]*>.*?</metadata>', r'<svg viewBox="\1">', buffer.getvalue(),
                 count=1, flags=re.DOTALL)
    return Markup(re.sub(r'(id="|url\(#|href="#)', rf'\g<1>{prefix}', svg).replace(INK, 'currentColor'))
