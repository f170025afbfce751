"""A web app over an index, in gradio: search by a picture or a part of it, see its classes, browse copies.

It listens on this computer only by default, and answers to its own name only; it loads nothing from
elsewhere, reports to nobody, and serves no file but the small pictures that it draws of the index's images. What is
uploaded lies in a folder of its own, which only its user can read, and is deleted when the app ends.
"""
import atexit
import functools
import html
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from timm_multigrain.images.sources import printable

from .answers import MAX_HITS, Answers

if TYPE_CHECKING:
    import gradio

    from timm_multigrain.index.index import Index

__all__ = ['launch_app']

LOOPBACK = '127.0.0.1'
MAX_UPLOAD = 32 << 20  # bytes
MAX_TEMPORARY = 1 << 30  # bytes of all uploads and small pictures, of which the oldest go
MAX_FILES = 2000
MAX_PIXELS = 50_000_000
DEFAULT_HITS = 12
GROUPS_PER_PAGE = 12
SMALLEST_PART = 8  # pixels
HINT = 'To search for a part of it, click two opposite corners of that part.'
CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
.gallery-container, .grid-wrap { max-height: none !important; height: auto !important; overflow: visible !important; }
#nearest .grid-wrap, #groups .grid-wrap, #members .grid-wrap { padding-top: 2.6rem !important; }
.thumbnail-item { display: flex !important; flex-direction: column; aspect-ratio: auto !important; }
.thumbnail-item img { aspect-ratio: 1; height: auto !important; }
.caption-label { position: static !important; max-width: none !important; margin: 0 !important; border: 0 !important;
    white-space: normal !important; overflow-wrap: anywhere; text-align: left; font-size: 0.8rem !important;
    opacity: 1 !important; }
footer { display: none !important; }
@media (max-width: 640px) { .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; } }
"""


def _gradio():
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'  # read when gradio is imported, and by its launch
    os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
    try:
        import gradio
    except ImportError as e:
        raise ImportError("The app needs gradio: pip install 'timm_multigrain[app]'") from e
    return gradio


@functools.cache
def _temporary_folder() -> str:
    """Where gradio keeps uploads and the pictures it sends, for as long as this process lives."""
    folder = tempfile.mkdtemp(prefix='timm-multigrain-app-')  # 0700
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _build(index: 'Index', title: str | None, max_pixels: int) -> 'gradio.Blocks':
    gr = _gradio()
    os.environ['GRADIO_TEMP_DIR'] = _temporary_folder()  # its own is one for all users of the computer
    index.model()  # what is wrong with it is said now
    answers = Answers(index, max_pixels)
    title = title or f'{len(index):,} pictures'
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.HTML(f'<h1>{html.escape(title)}</h1>', padding=False)
        with gr.Tab('Search'):
            _search_tab(gr, answers)
        with gr.Tab('Copies'):
            _copies_tab(gr, answers)
    return app


@contextmanager
def _told(gr) -> Iterator[None]:
    """What is wrong with a request is shown on the page, in a sentence."""
    try:
        yield
    except ValueError as e:
        raise gr.Error(str(e), print_exception=False) from e


def _gallery(gr, name: str, label: str, **options):
    return gr.Gallery(label=label, columns=4, fit_columns=False, height='auto', object_fit='contain', buttons=[],
                      elem_id=name, format='jpeg', **{'allow_preview': False, **options})


def _search_tab(gr, answers: Answers) -> None:
    corners, found = gr.State([]), gr.State([])
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            picture = gr.Image(
                label='Drop, paste or choose a picture', height=320, sources=['upload', 'clipboard'],
                elem_id='picture', buttons=[])
            hint = gr.Markdown(HINT, elem_id='hint')
            part = gr.Image(label='Part', type='pil', interactive=False, visible=False, height=160, buttons=[],
                            elem_id='part')
            whole = gr.Button('Whole picture', visible=False, size='sm', elem_id='whole')
            with gr.Row():
                k = gr.Slider(1, MAX_HITS, value=DEFAULT_HITS, step=1, label='Images', min_width=120)
                names = [(printable(name), name) for name in answers.class_names]
                of_class = gr.Dropdown([('any', ''), *names], value='', label='Class', min_width=120,
                                       visible=bool(names))
            button = gr.Button('Search', variant='primary', elem_id='search')
        with gr.Column(scale=2, min_width=300):
            classes = gr.Label(label='Classes', num_top_classes=3, visible=False, elem_id='classes')
            nearest = _gallery(gr, 'nearest', 'Nearest images')
            details = gr.Textbox(label='Image', lines=3, visible=False, interactive=False, elem_id='details')

    def search(file, corners, k, class_name):
        with _told(gr):
            image, k = _read(answers, file), min(max(1, int(k)), MAX_HITS)
            shown, hits = answers.search(image, _box(corners, image.size), k, str(class_name or '') or None)
        return (gr.Label(value=shown or None, visible=bool(shown)), [hit[:2] for hit in hits],
                [hit.details for hit in hits], gr.Textbox(visible=False))

    def click(file, corners, event: gr.SelectData):
        corners = [*(corners if len(corners) < 2 else ()), event.index]
        if len(corners) < 2:
            return corners, gr.Image(visible=False), gr.Button(visible=True), 'Now the opposite corner.'
        with _told(gr):
            image = _read(answers, file)
            x, y, width, height = _box(corners, image.size)
        return (corners, gr.Image(value=image.crop((x, y, x + width, y + height)), visible=True),
                gr.Button(visible=True), f'Part of {width} x {height} pixels; click a corner to choose another.')

    def reset():
        return [], gr.Image(value=None, visible=False), gr.Button(visible=False), HINT

    # without gradio's preprocessing, which opens pictures in every format that Pillow has a program for
    query = dict(fn=search, inputs=[picture, corners, k, of_class], outputs=[classes, nearest, found, details],
                 concurrency_limit=2, preprocess=False)
    part_of_page = [corners, part, whole, hint]
    picture.upload(reset, None, part_of_page, api_name=False).then(**query, api_name=False)
    picture.clear(reset, None, part_of_page, api_name=False)
    picture.select(click, [picture, corners], part_of_page, api_name=False, preprocess=False)
    whole.click(reset, None, part_of_page, api_name=False)
    button.click(**query, api_name='search')

    def show(found, event: gr.SelectData):
        return gr.Textbox(value=found[event.index], visible=True)

    nearest.select(show, found, details, api_name=False)


def _read(answers: Answers, file):
    """An uploaded picture, from gradio's description of the file; the guard has seen that it is one."""
    if not isinstance(file, dict) or not isinstance(file.get('path'), str):
        raise ValueError('Give a picture first.')
    return answers.read(file['path'])


def _box(corners, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """(x, y, width, height) of two corners in a picture of this size; None while there are not two."""
    if len(corners) < 2:
        return None
    (x0, x1), (y0, y1) = (sorted(max(0, min(int(corner[axis]), size[axis])) for corner in corners) for axis in (0, 1))
    if min(x1 - x0, y1 - y0) < SMALLEST_PART:
        raise ValueError(f'That part has {x1 - x0} x {y1 - y0} pixels: choose a larger one.')
    return x0, y0, x1 - x0, y1 - y0


def _copies_tab(gr, answers: Answers) -> None:
    page = gr.State(0)
    button = gr.Button('Find copies', variant='primary', elem_id='find-copies')
    summary = gr.Textbox(label='Found', lines=5, interactive=False, visible=False, elem_id='summary')
    groups = _gallery(gr, 'groups', 'Groups', visible=False)
    with gr.Row(visible=False) as pager:
        back = gr.Button('Back', size='sm', min_width=80)
        onward = gr.Button('More', size='sm', min_width=80, elem_id='more')
    members = _gallery(gr, 'members', 'Files of the group, the one to keep first', visible=False, allow_preview=True)

    def turn(page: int):
        with _told(gr):
            found = answers.copies
        pages = max(1, -(-len(found.groups) // GROUPS_PER_PAGE))
        page = min(max(0, page), pages - 1)
        covers = map(answers.cover, found.groups[page * GROUPS_PER_PAGE:(page + 1) * GROUPS_PER_PAGE])
        return (page, gr.Textbox(value=str(found), visible=True),
                gr.Gallery(value=[cover[:2] for cover in covers], label=f'Groups, page {page + 1} of {pages}',
                           visible=bool(found.groups), selected_index=None),
                gr.Row(visible=pages > 1), gr.Gallery(value=None, visible=False))

    outputs = [page, summary, groups, pager, members]
    button.click(lambda: turn(0), None, outputs, api_name=False)
    back.click(lambda page: turn(page - 1), page, outputs, api_name=False)
    onward.click(lambda page: turn(page + 1), page, outputs, api_name=False)

    def open_group(page, event: gr.SelectData):
        group = answers.copies.groups[page * GROUPS_PER_PAGE + event.index]
        return gr.Gallery(value=[member[:2] for member in answers.members(group)], visible=True)

    groups.select(open_group, page, members, api_name=False)


def launch_app(
        index: 'Index',
        *,
        host: str = LOOPBACK,
        port: int | None = None,
        title: str | None = None,
        allow_hosts: Sequence[str] = (),
        auth: tuple[str, str] | None = None,
        max_upload: int = MAX_UPLOAD,
        max_pixels: int = MAX_PIXELS,
        max_temporary: int = MAX_TEMPORARY,
        block: bool = True,
) -> 'gradio.Blocks':
    """Run the app, which needs gradio.

    Args:
        index: The index.
        host: Address to listen on; '0.0.0.0' lets other computers in.
        port: None for the first free one from 7860 on.
        title: Its heading.
        allow_hosts: Other names that it is reached by, such as that of a proxy; requests by any other name are refused.
        auth: User and password to ask for.
        max_upload: Largest request, bytes.
        max_pixels: Larger pictures are refused.
        max_temporary: Bytes of all uploads and small pictures that are kept.
        block: Return only when it is interrupted.
    """
    gr = _gradio()
    from starlette.middleware import Middleware

    from .guard import Guard

    app = _build(index, title, max_pixels)
    if block:
        os.umask(0o077)  # of the pictures that gradio writes
    guard = Middleware(
        Guard, hosts=[LOOPBACK, '::1', 'localhost', host, *allow_hosts], uploads=_temporary_folder(),
        max_bytes=max_upload + (1 << 20), max_total=max_temporary, max_files=MAX_FILES)
    fonts = ['system-ui', 'sans-serif']
    theme = gr.themes.Soft(font=fonts, font_mono=['ui-monospace', 'monospace'], primary_hue='blue')
    app.queue(max_size=64).launch(
        server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True, auth=auth,
        max_file_size=max_upload, allowed_paths=None, enable_monitoring=False, ssr_mode=False,
        mcp_server=False, pwa=False, footer_links=[], theme=theme, css=CSS, show_error=False,
        app_kwargs={'middleware': [guard], 'docs_url': None, 'redoc_url': None})
    if block:
        print(f'{len(index):,} pictures at {app.local_url}  (Ctrl-C ends it)', flush=True)
        app.block_thread()
    return app
