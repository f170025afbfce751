"""A web app over an index, in gradio: search by a picture or a part of it, look at what is found, sort out copies.

It listens on this computer only by default, and answers to its own name only; it loads nothing from elsewhere, reports
to nobody, and serves no file but the small pictures that it draws of the index's images. A picture that is searched for
is in memory until it is answered, and never in a file.
"""
import os
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

from timm_multigrain.extras import extra
from timm_multigrain.files import counted

from .answers import MAX_HITS, Answers, answering

if TYPE_CHECKING:
    import gradio

    from timm_multigrain.index.index import Index

LOOPBACK = '127.0.0.1'
MAX_UPLOAD = 32 << 20  # bytes


def launch_app(
        index: 'Index',
        *,
        host: str = LOOPBACK,
        port: int | None = None,
        title: str | None = None,
        allow_hosts: Sequence[str] = (),
        auth: tuple[str, str] | None = None,
        max_upload: int = MAX_UPLOAD,
        block: bool = True,
) -> 'gradio.Blocks':
    """Run the app, which needs gradio.

    Args:
        host: Address to listen on; '0.0.0.0' lets other computers in, who are told where files are, and shown copies,
            with a password only.
        port: None for the first free one from 7860 on.
        title: Its heading.
        allow_hosts: Other names that it is reached by, such as that of a proxy; requests by any other name are refused.
        auth: User and password to ask for.
        max_upload: Largest picture to search for, bytes.
        block: Return only when it is interrupted.
    """
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'  # read when gradio is imported, and by its launch
    os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
    with extra('app', 'The app'):
        import gradio as gr
        from starlette.middleware import Middleware

        from .guard import Guard
    index.model()  # what is wrong with it is said now
    alone = host in (LOOPBACK, '::1', 'localhost') and not allow_hosts
    answers = Answers(index, places=alone or auth is not None)
    title = title or counted(len(index), 'picture')
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as app:
        page, code = _page()
        gr.HTML(
            {'title': title, 'classes': answers.class_names, 'categories': index.categories, 'most': MAX_HITS,
             'largest': max_upload, 'copies': answers.places},
            html_template=page, js_on_load=code, apply_default_css=False,
            server_functions=[answering(answer) for answer in (answers.search, answers.look, answers.copies)])
    guard = Middleware(Guard, hosts=[LOOPBACK, '::1', 'localhost', host, *allow_hosts],
                       max_bytes=max_upload * 4 // 3 + (1 << 16))  # base64
    fonts = ['system-ui', 'sans-serif']
    theme = gr.themes.Soft(font=fonts, font_mono=['ui-monospace', 'monospace'], primary_hue='blue')
    try:
        app.launch(
            server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True, auth=auth,
            allowed_paths=None, enable_monitoring=False, ssr_mode=False, mcp_server=False, pwa=False, footer_links=[],
            theme=theme, show_error=False, app_kwargs={'middleware': [guard], 'docs_url': None, 'redoc_url': None})
    except OSError as e:  # whose sentence is of gradio's arguments
        raise OSError(f'The app cannot listen at {host}, port {port or "7860 and on"}: it is taken, or not of this '
                      'computer; --port and --host name others.') from e
    if block:
        print(f'{counted(len(index), "picture")} at {app.local_url}  (Ctrl-C ends it)', flush=True)
        app.block_thread()
    return app


def _page() -> tuple[str, str]:
    """The page, which gradio runs as a template and so has nothing of the index in it, with its style; its script."""
    style, own, page, code = (files(f'timm_multigrain.{room}').joinpath(name).read_text('utf-8') for room, name in (
        ('report', 'templates/style.css'), ('app', 'page.css'), ('app', 'page.html'), ('app', 'page.js')))
    # gradio's own style is stronger than plain names of elements, and weaker than what is said of a page within #page
    return f'<style>{style} #page {{ {style} {own} }}</style><div id="page">{page}</div>', code
