"""Results on one HTML page that needs nothing else: tables, training curves and a gallery of nearest images.

Pictures are inline JPEG thumbnails, charts inline SVG, and the page forbids itself to load anything. It follows the
reader's light or dark setting; no meaning is carried by colour alone.
"""
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from PIL import Image

from .page import escape, inline_image, write_page

__all__ = ['Curves', 'GalleryRow', 'Neighbor', 'Table', 'write_report']

Curves = Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]

RELATIONS = {'copy': 'Copy', 'class': 'Same class', 'other': 'Other'}
LINE_STYLES = [('#2f7fe6', ''), ('#e0701a', '6 3'), ('#1a9e62', '2 2'), ('#a65bd6', '8 2 2 2')]


@dataclass(frozen=True)
class Table:
    """Result table.

    Attributes:
        headers: One for each column; the first column names the rows.
        rows: Cells, text or numbers; None and NaN show as a dash.
        best: Header of each column whose best number is to stand out, to 'max' or 'min'.
        title: Shown above the table.
        digits: Decimals of the floats.
    """
    headers: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    best: Mapping[str, str] = field(default_factory=dict)
    title: str = ''
    digits: int = 1

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.headers):
                raise ValueError(f'Row {list(row)} has {len(row)} cells for {len(self.headers)} headers.')
        for header, which in self.best.items():
            if header not in self.headers or which not in ('max', 'min'):
                raise ValueError(f"best must map a header to 'max' or 'min', got {header!r}: {which!r}.")


@dataclass(frozen=True)
class Neighbor:
    """Image found for a query; `relation` is 'copy' (of the query), 'class' (same class) or 'other'."""
    image: Image.Image
    score: float
    caption: str
    relation: str

    def __post_init__(self) -> None:
        if self.relation not in RELATIONS:
            raise ValueError(f'relation must be one of {list(RELATIONS)}, got {self.relation!r}.')


@dataclass(frozen=True)
class GalleryRow:
    """What one model finds for one query, nearest first; neighbouring rows of one query image are shown together."""
    model_name: str
    query: Image.Image
    query_caption: str
    neighbors: Sequence[Neighbor]
    prediction: str = ''


def write_report(
        path: str | os.PathLike,
        title: str,
        intro: str,
        tables: Iterable[Table] = (),
        curves: Curves | None = None,
        gallery: Iterable[GalleryRow] = (),
        notes: Iterable[str] = (),
        command: str = '',
        curves_x: str = 'step',
) -> Path:
    """Write the page; a file of that name is replaced in one step.

    Args:
        path: HTML file; its folder is made if missing.
        title: Heading and title of the page.
        intro: Paragraph below it.
        tables: Result tables.
        curves: Run name to series name to (steps, values); there is a chart for each series with a line for each run.
            Values that are not finite leave a gap.
        gallery: Rows of nearest images.
        notes: Remarks, one list item each.
        command: Command line that repeats the results.
        curves_x: What the steps of the curves count.

    Returns:
        The path written.

    Raises:
        ImportError: If there are curves to draw and matplotlib is not installed.
        ValueError: If a series has not as many values as steps.
    """
    sections = [f'<h1>{escape(title)}</h1>\n<p>{escape(intro)}</p>']
    sections += _section('Results', map(_table, tables))
    sections += _section('Training', _charts(curves or {}, curves_x))
    groups = groupby(gallery, key=lambda row: (id(row.query), row.query_caption))
    sections += _section('Nearest images', (_query(list(rows)) for _, rows in groups), _relations_key())
    notes = ''.join(f'<li>{escape(note)}</li>' for note in notes)
    sections += _section('Notes', [f'<ul>{notes}</ul>'] if notes else [])
    sections += _section('Repeat it', [f'<pre><code>{escape(command)}</code></pre>'] if command else [])
    return write_page(path, title, '\n'.join(sections))


def _section(title: str, parts: Iterable[str], lead: str = '') -> list[str]:
    parts = list(parts)
    return [f'<h2>{title}</h2>\n{lead}', *parts] if parts else []


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _table(table: Table) -> str:
    def show(value: object) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return '–'
        return f'{value:.{table.digits}f}' if isinstance(value, float) else escape(value)

    best = {}
    for header, which in table.best.items():
        column = table.headers.index(header)
        numbers = [row[column] for row in table.rows if _is_number(row[column])]
        if len(numbers) > 1:
            best[column] = show(max(numbers) if which == 'max' else min(numbers))
    rows = []
    for first, *others in table.rows:
        cells = [f'<th scope="row">{show(first)}</th>']
        for column, value in enumerate(others, 1):
            if _is_number(value) and best.get(column) == show(value):
                cells.append(f'<td class="best">{show(value)}<span class="hidden"> (best)</span></td>')
            else:
                cells.append(f'<td>{show(value)}</td>')
        rows.append(f'<tr>{"".join(cells)}</tr>')
    caption = f'<caption>{escape(table.title)}</caption>' if table.title else ''
    head = ''.join(f'<th scope="col">{escape(header)}</th>' for header in table.headers)
    label = escape(table.title or 'Results')
    return (
        f'<div class="card scroll" role="region" aria-label="{label}" tabindex="0"><table>{caption}'
        f'<thead><tr>{head}</tr></thead>\n<tbody>' + '\n'.join(rows) + '</tbody></table></div>'
    )


def _charts(curves: Curves, x_label: str) -> list[str]:
    """The key of the runs and one card with a chart for each series."""
    styles = {run: LINE_STYLES[i % len(LINE_STYLES)] for i, run in enumerate(curves)}
    names = list(dict.fromkeys(name for series in curves.values() for name in series))
    charts = []
    for i, name in enumerate(names):
        lines = {run: series[name] for run, series in curves.items() if name in series}
        for run, (steps, values) in lines.items():
            if len(steps) != len(values):
                raise ValueError(f'{run}, {name}: {len(values)} values for {len(steps)} steps.')
        title = f'{escape(name)} <span class="faint">by {escape(x_label)}</span>'
        label = '; '.join(f'{run} from {v[0]:.3g} to {v[-1]:.3g}' for run, (_, v) in lines.items() if len(v))
        svg = _chart(lines, styles, f'chart{i}-').replace(
            '<svg ', f'<svg role="img" aria-label="{escape(name)} by {escape(x_label)}: {escape(label)}" ', 1)
        charts.append(f'<figure class="card"><figcaption>{title}</figcaption>{svg}</figure>')
    if not charts:
        return []
    key = ''.join(
        f'<li><svg viewBox="0 0 34 6" aria-hidden="true"><path d="M0 3h34" stroke="{color}" stroke-width="3" '
        f'stroke-dasharray="{dashes}"/></svg>{escape(run)}</li>' for run, (color, dashes) in styles.items()
    )
    return [f'<ul class="key">{key}</ul>', f'<div class="charts">{"".join(charts)}</div>']


def _chart(lines: Mapping, styles: Mapping[str, tuple[str, str]], id_prefix: str) -> str:
    """SVG of one series; axes take the text colour of the page."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The charts need matplotlib: pip install 'timm_multigrain[report]'") from error
    ink = '#010203'
    with rc_context({'svg.fonttype': 'none', 'svg.hashsalt': id_prefix, 'font.size': 9, 'path.simplify': True}):
        figure = Figure(figsize=(3.9, 2.1), layout='constrained')
        axes = figure.subplots()
        for run, (steps, values) in lines.items():
            color, dashes = styles[run]
            pattern = (0, [float(d) for d in dashes.split()]) if dashes else '-'
            axes.plot(steps, values, color=color, linestyle=pattern, marker='o' if len(values) == 1 else None)
        axes.tick_params(colors=ink)
        axes.grid(axis='y', color=ink, alpha=0.12)
        axes.spines[:].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format='svg', transparent=True, metadata={'Date': None})
    svg = buffer.getvalue()
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg[svg.index('<svg'):], flags=re.DOTALL)
    svg = re.sub(r'^<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', svg)
    return re.sub(r'(id="|url\(#|href="#)', rf'\g<1>{id_prefix}', svg).replace(ink, 'currentColor')


def _relations_key() -> str:
    items = ''.join(f'<li><span class="badge {relation}">{label}</span></li>' for relation, label in RELATIONS.items())
    return f'<p class="faint">Nearest first; the number is the similarity to the query.</p><ul class="key">{items}</ul>'


def _query(rows: Sequence[GalleryRow]) -> str:
    """One query with what every model finds for it."""
    caption, models = escape(rows[0].query_caption), []
    for row in rows:
        copies = sum(neighbor.relation == 'copy' for neighbor in row.neighbors)
        found = f'{copies} of {len(row.neighbors)} are copies'
        strip = ''.join(_neighbor(rank, neighbor) for rank, neighbor in enumerate(row.neighbors, 1))
        prediction = f'<p class="prediction faint">{escape(row.prediction)}</p>' if row.prediction else ''
        models.append(
            f'<section class="model"><header><h3>{escape(row.model_name)}</h3><span class="faint">{found}</span>'
            f'</header><div class="strip">{strip}</div>{prediction}</section>'
        )
    return (
        f'<article class="card query"><figure>{inline_image(rows[0].query, f"Query: {caption}")}'
        f'<figcaption><strong>Query</strong><br>{caption}</figcaption></figure><div>{"".join(models)}</div></article>'
    )


def _neighbor(rank: int, neighbor: Neighbor) -> str:
    label, caption = RELATIONS[neighbor.relation], escape(neighbor.caption)
    image = inline_image(neighbor.image, f'Neighbour {rank}: {caption}, {label.lower()}')
    return (
        f'<figure class="{neighbor.relation}">{image}'
        f'<figcaption><span class="badge">{label}</span><br><span class="score">{neighbor.score:.2f}</span> {caption}'
        '</figcaption></figure>\n'
    )
