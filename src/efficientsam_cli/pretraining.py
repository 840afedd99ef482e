"""Commands that prepare pretraining."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .arguments import Device, parse_numbers, place_of


def cache_features(
    sources: Annotated[list[str], typer.Argument(help="folders or tars of pictures, in training's order")],
    teacher: Annotated[str, typer.Option(help="folder or Hub id of a vision model, or an ONNX file")],
    output: Annotated[Path, typer.Option(help="folder of the cache")],
    teacher_size: Annotated[int, typer.Option(help="side in pixels that the teacher looks at")] = 1024,
    before_neck: Annotated[bool, typer.Option(help="a SAM encoder's features before its neck")] = False,
    teacher_output: Annotated[str | None, typer.Option(help="an ONNX file's output with the features")] = None,
    teacher_mean: Annotated[str | None, typer.Option(help="three numbers, R,G,B; its own if left out")] = None,
    teacher_std: Annotated[str | None, typer.Option(help="three numbers, R,G,B; its own if left out")] = None,
    grid: Annotated[int, typer.Option(help="side of the kept features in cells")] = 64,
    crops: Annotated[int, typer.Option(help="keep so many random crops of a picture; 0: the whole picture")] = 0,
    seed: Annotated[int, typer.Option(help="of the crops; training's")] = 0,
    smallest_area: Annotated[float, typer.Option(help="of the crops; training's")] = 0.2,
    pictures_per_shard: Annotated[int, typer.Option(help="pictures in a file")] = 1000,
    batch_size: Annotated[int, typer.Option(help="pictures that the teacher sees at once")] = 8,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="of the teacher's weights")
    ] = "float32",
    device: Device = None,
) -> None:
    """Let a teacher look at every picture once and keep its features, for examples/pretrain_sami.py --cache.

    Started again, the command goes on where it stopped. Under torchrun the processes share the work.
    """
    import torch

    from efficientsam_hf.data.crops import RandomResizedCrop, SampleMaker
    from efficientsam_hf.data.images import find_pictures
    from efficientsam_hf.evaluation.journal import Share
    from efficientsam_hf.training.feature_cache import CacheSettings, write_cache
    from efficientsam_hf.training.teachers import load_teacher

    mean = parse_numbers(teacher_mean, "--teacher-mean", (3,), "R,G,B") if teacher_mean else None
    std = parse_numbers(teacher_std, "--teacher-std", (3,), "R,G,B") if teacher_std else None
    share = Share.of_environment()
    place = place_of(device)
    pictures = find_pictures(sources)
    weights = getattr(torch, dtype)
    loaded = load_teacher(teacher, teacher_size, not before_neck, teacher_output, mean, std, weights).to(place)
    maker = SampleMaker(seed=seed, crop=RandomResizedCrop(smallest_area), crops=crops or None)
    settings = CacheSettings(grid, crops, seed, smallest_area, pictures_per_shard)
    for shard in write_cache(output, pictures, loaded, maker, settings, batch_size, share.rank, share.processes):
        typer.echo(f"shard {shard} done", err=True)
    typer.echo(f"features of {len(pictures)} pictures: {output}")
