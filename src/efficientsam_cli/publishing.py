"""The command that shares a model."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[Path, typer.Argument(help="folder of a model, as training and convert write it")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="NAME or OWNER/NAME on the Hub")],
    private: Annotated[bool, typer.Option("--private", help="make a new repository private")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be uploaded, and ask nobody")] = False,
    license: Annotated[str | None, typer.Option(help="as the Hub spells it; the card's if left out")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="trained on; may be given several times")] = None,
    base_model: Annotated[str | None, typer.Option(help="fine-tuned from")] = None,
    metrics: Annotated[Path | None, typer.Option(help='JSON: {"data set": {"metric": number}}')] = None,
    token: Annotated[str | None, typer.Option(help="of the Hub; the one of `hf auth login`, or HF_TOKEN")] = None,
    revision: Annotated[str | None, typer.Option(help="branch to commit to")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="open a pull request")] = False,
) -> None:
    """Put a model on the Hub: weights, processor, code for those who lack this package, and a model card.

    What is missing or wrong is said before anything is uploaded. A README.md in the folder becomes the card; what it
    says in its front matter stays, unless an option says otherwise.
    """
    from transformers.utils import logging

    from efficientsam_hf.publishing import CardFacts, prepare_folder, push_folder, read_scores

    logging.disable_progress_bar()
    facts = CardFacts(license, tuple(dataset or ()), base_model, read_scores(metrics) if metrics else None)
    if not dry_run:
        options = {"private": private or None, "token": token, "revision": revision, "create_pr": create_pr}
        typer.echo(push_folder(folder, repository, facts, **options))
        return
    with tempfile.TemporaryDirectory() as room:
        files = prepare_folder(folder, Path(room) / "model", repository, facts)
        front_matter = (Path(room) / "model" / "README.md").read_text().split("---\n")[1]
    for name, size in files.items():
        typer.echo(f"{size:>12,} {name}")
    typer.echo(f"{sum(files.values()):>12,} bytes would go to {repository}, with this at the head of README.md:")
    typer.echo(front_matter.rstrip())
