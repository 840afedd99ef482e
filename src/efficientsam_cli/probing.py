"""Commands that ask what a frozen encoder knows."""

from typing import Annotated

import typer

from .arguments import Device, place_of


def probe(
    train: Annotated[str, typer.Argument(help="folder of class folders, tar of one, or data set of the Hub")],
    test: Annotated[str, typer.Argument(help="the same with the pictures to be asked; of a Hub set its other split")],
    model: Annotated[str | None, typer.Option(help="folder or Hub id; the bundled checkpoint if left out")] = None,
    image_size: Annotated[int, typer.Option(help="side of the square that is looked at")] = 224,
    k: Annotated[int, typer.Option(help="neighbours that vote")] = 20,
    penalty: Annotated[float, typer.Option(help="on the probe's squared weights")] = 1e-2,
    train_split: Annotated[str, typer.Option(help="of a data set of the Hub")] = "train",
    test_split: Annotated[str, typer.Option(help="of a data set of the Hub")] = "validation",
    device: Device = None,
) -> None:
    """Accuracy of nearest neighbours and of a linear probe on an encoder's features, which no training touches."""
    from efficientsam_hf import EfficientSamForImageClassification, default_checkpoint
    from efficientsam_hf.data.classified_images import centre_crop_processor, open_classified
    from efficientsam_hf.evaluation.classification import (
        collect_features,
        neighbour_scores,
        probe_scores,
        top_accuracy,
    )
    from efficientsam_hf.training.encoders import load_encoder_model

    place = place_of(device)
    known = open_classified(train, train_split, whole=True)
    asked = open_classified(test, test_split, known.names, whole=True)
    encoder = load_encoder_model(EfficientSamForImageClassification, model or str(default_checkpoint()))
    encoder = encoder.to(place).eval()
    processor = centre_crop_processor(image_size)

    def prepare(images: list) -> dict:
        return processor(images, return_tensors="pt")

    features, labels = collect_features(encoder, known, prepare)
    others, wanted = collect_features(encoder, asked, prepare)
    scores = {
        f"k-NN (k = {k})": neighbour_scores(features, labels, others, len(known.names), k),
        "linear probe": probe_scores(features, labels, others, len(known.names), penalty),
    }
    typer.echo(f"{len(known)} pictures known, {len(asked)} asked, {len(known.names)} classes")
    for name, votes in scores.items():
        typer.echo(f"{name}: accuracy {top_accuracy(votes, wanted)['accuracy']:.4f}")
