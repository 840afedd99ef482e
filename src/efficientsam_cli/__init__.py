"""The `efficientsam` command: parsing only, a file for each kind of work.

It is no part of the package, because importing that registers its classes with transformers, which takes seconds that
`efficientsam --help` need not wait for. So its files import torch and the package inside their commands.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from . import demo, evaluating, exporting, labelling, pretraining, probing, publishing, segmenting, weights

# What is not installed under the name that it is imported by.
PACKAGES = {"cv2": "opencv-python-headless", "PIL": "Pillow", "sklearn": "scikit-learn"}

app = typer.Typer(
    help="Segment anything, made light: EfficientSAM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main() -> None:
    """Segment anything, made light: EfficientSAM."""


def one_line_errors(command: Callable) -> Callable:
    """What the user can mend is said in one line, with exit code 2; anything else keeps its traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError) as error:
            reason = str(error).strip() or type(error).__name__
            typer.echo(f"efficientsam: {reason.splitlines()[0]}", err=True)
            raise typer.Exit(2) from error
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if not missing or missing.startswith("efficientsam"):
                raise
            wanted = f"wanted the package {PACKAGES.get(missing, missing)}, found none"
            typer.echo(f"efficientsam: {wanted}: install it, or this package with the extra that has it", err=True)
            raise typer.Exit(2) from error

    return run


# In the order of `efficientsam --help`.
COMMANDS: list[Callable[..., None]] = [
    segmenting.predict,
    segmenting.everything,
    labelling.label,
    demo.demo,
    weights.convert,
    exporting.export,
    publishing.push,
    pretraining.cache_features,
    probing.probe,
]
for command in COMMANDS:
    app.command()(one_line_errors(command))

evaluate = typer.Typer(help="Measure how good masks are, by the protocols of the field.", no_args_is_help=True)
for command in evaluating.COMMANDS:
    evaluate.command()(one_line_errors(command))
app.add_typer(evaluate, name="evaluate")
