"""The demo as a Space of the Hub: this file as `app.py`, and beside it the two files of `examples/space`.

    python examples/gradio_app.py                    # the bundled checkpoint, at http://127.0.0.1:7860
    EFFICIENTSAM_MODEL=someone/model python examples/gradio_app.py

On one's own machine `efficientsam demo` does the same, with options.
"""

import os

from efficientsam_cli.demo_page import Limits, build_page, serve
from efficientsam_hf import load_checkpoint


def main() -> None:
    source = os.environ.get("EFFICIENTSAM_MODEL") or None
    limits = Limits(megabytes=10, megapixels=20)
    page = build_page(*load_checkpoint(source), name=source or "the bundled checkpoint", limits=limits)
    # A Space says in GRADIO_SERVER_NAME and GRADIO_SERVER_PORT where it wants to be served.
    serve(page, limits)


if __name__ == "__main__":
    main()
