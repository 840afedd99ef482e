"""Commands for folders of weights."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(help="official .pt or its zip; or a model folder, to go back")],
    target: Annotated[Path, typer.Argument(help="folder to write; or the .pt file, when going back")],
) -> None:
    """Turn an official checkpoint into a model folder, or a model folder into an official checkpoint."""
    from efficientsam_hf import load_checkpoint
    from efficientsam_hf.conversion import convert as convert_official
    from efficientsam_hf.conversion import save_official
    from efficientsam_hf.exported.manifest import is_exported
    from efficientsam_hf.hub import save_for_hub
    from efficientsam_hf.processing_efficientsam import EfficientSamProcessor

    if is_exported(source):
        raise ValueError(f"{source} holds an exported model, wanted the model folder that it was made of")
    if source.is_dir():
        save_official(load_checkpoint(source)[0], target)
    else:
        model = convert_official(source)
        save_for_hub(model, EfficientSamProcessor.from_model_config(model.config), target)
    typer.echo(f"wrote {target}")
