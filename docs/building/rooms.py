"""Every tutorial begins in a room of its own that holds a copy of the examples, as its reader begins in a clone."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"

# IPython runs this at its start, before the first cell.
START = """
import os, shutil, tempfile
os.chdir(tempfile.mkdtemp(dir={rooms!r}))
shutil.copytree({examples!r}, "examples")
"""


def furnish(app) -> None:
    """Say in the environment, which the tutorials' kernels inherit, where they begin."""
    app.rooms = Path(tempfile.mkdtemp(prefix="tutorials-"))
    startup = app.rooms / "ipython" / "profile_default" / "startup" / "room.py"
    startup.parent.mkdir(parents=True)
    startup.write_text(START.format(rooms=str(app.rooms), examples=str(EXAMPLES)))
    os.environ["IPYTHONDIR"] = str(app.rooms / "ipython")
    # `efficientsam` and `accelerate` are those of the environment that builds.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # No network to wait for, and no terminal to draw bars on.
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", GRADIO_ANALYTICS_ENABLED="False")
    # Sphinx builds several pages at once; their threads would only wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"


def clear_away(app, error) -> None:
    """Take away what the tutorials wrote."""
    shutil.rmtree(app.rooms, ignore_errors=True)


def setup(app) -> dict:
    app.connect("builder-inited", furnish)
    app.connect("build-finished", clear_away)
    return {"parallel_read_safe": True}
