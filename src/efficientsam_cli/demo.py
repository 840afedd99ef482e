"""The command that opens a page in the browser."""

import time
from pathlib import Path
from typing import Annotated

import typer

from .arguments import Device, Model, place_of


def demo(
    model: Model = None,
    host: Annotated[
        str, typer.Option(help="address to serve at; 0.0.0.0 is for everybody who reaches it")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="a free one from 7860 on if left out")] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="open a browser")] = True,
    megabytes: Annotated[float, typer.Option(min=0, help="largest upload, in megabytes")] = 20,
    megapixels: Annotated[float, typer.Option(min=0, help="largest picture, in megapixels")] = 40,
    device: Device = None,
) -> None:
    """Click in a browser and see masks: points, boxes, everything, downloads. Needs gradio, from the extra `demo`."""
    try:
        from .demo_page import Limits, build_page, serve
    except ImportError as error:
        raise ValueError("the demo needs gradio: pip install 'efficientsam-hf[demo]'") from error
    from efficientsam_hf import default_checkpoint, load_checkpoint

    loaded, processor = load_checkpoint(model, device=place_of(device, model))
    limits = Limits(megabytes, megapixels)
    blocks = build_page(loaded, processor, Path(model or default_checkpoint()).name, limits)
    _, address, _ = serve(
        blocks, limits, server_name=host, server_port=port, inbrowser=open_browser, prevent_thread_lock=True
    )
    typer.echo(f"serving at {address}  (Ctrl+C ends it)")
    while True:
        time.sleep(3600)
