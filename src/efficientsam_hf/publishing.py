"""A folder of weights made fit for the Hub: its parts checked, its card written, its scores where the Hub looks."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from .hub import load_weights, push_to_hub, save_for_hub, with_front_matter
from .modeling_efficientsam import EfficientSamModel
from .processing_efficientsam import EfficientSamProcessor

# What each part is for, in the words of the error that misses it.
PARTS = {
    "config.json": "the model's config",
    "model.safetensors": "weights",
    "processor_config.json": "the processor's config",
}
SHARDED = "model.safetensors.index.json"

CARD = """# {name}

[EfficientSAM](https://arxiv.org/abs/2312.00863): point at something in a photo with clicks or a box, and get its mask.
{parameters:.1f} million parameters, pictures of {side} x {side} pixels inside. A prompt has up to {slots} slots: a
click takes one, a box two. Background clicks: {background}. Earlier masks as prompts: {masks}.

## Use

With `efficientsam-hf`:

```python
from efficientsam_hf import load_checkpoint, segment

model, processor = load_checkpoint("{repository}")
answer = segment(model, processor, "photo.jpg", points=[[250, 150]])
```

Without it, transformers runs the code that lies beside the weights:

```python
from transformers import pipeline

generator = pipeline("mask-generation", model="{repository}", trust_remote_code=True, dtype="float32")
```
"""


@dataclass(frozen=True)
class CardFacts:
    """What nobody can read off the weights; None or nothing leaves what the folder's own card says.

    Args:
        license: As the Hub spells it.
        datasets: What it was trained on.
        base_model: What it was fine-tuned from.
        scores: Data set -> metric -> value.
    """

    license: str | None = None
    datasets: tuple[str, ...] = ()
    base_model: str | None = None
    scores: dict[str, dict[str, float]] | None = None


def read_scores(path: str | Path) -> dict[str, dict[str, float]]:
    """Scores of a JSON: {"GrabCut": {"mean IoU, box": 0.81}}.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"nothing at {path}: wanted a JSON of data sets, metrics and values")
    try:
        found = json.loads(Path(path).read_text())
        return {str(name): {str(m): float(value) for m, value in rows.items()} for name, rows in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} wants {{"data set": {{"metric": number}}}}, found {error}') from error


def load_folder(folder: str | Path) -> tuple[EfficientSamModel, EfficientSamProcessor]:
    """Model and processor of a folder, in the weights' own type.

    Raises:
        FileNotFoundError: naming the part that the folder lacks.
        ValueError: if it holds another model, or its weights are damaged or not all there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    for name, what in PARTS.items():
        if not (folder / name).is_file() and not (name == "model.safetensors" and (folder / SHARDED).is_file()):
            raise FileNotFoundError(f"{folder} lacks {what}: wanted {name} in it")
    found = json.loads((folder / "config.json").read_text())
    kind = (found.get("architectures") or [EfficientSamModel.__name__])[0]
    if kind != EfficientSamModel.__name__:
        raise ValueError(f"{folder} holds {kind}, wanted {EfficientSamModel.__name__} (push_to_hub takes the others)")
    return load_weights(folder, "auto").eval(), EfficientSamProcessor.from_pretrained(folder)


def model_card(model: EfficientSamModel, folder: str | Path, repository: str, facts: CardFacts) -> str:
    """The folder's own README.md or a new one, with all that the Hub asks in its front matter."""
    own = Path(folder) / "README.md"
    prompts = model.config.prompt_encoder_config
    text = own.read_text(encoding="utf-8") if own.is_file() else CARD.format(
        name=repository.rpartition("/")[2],
        repository=repository,
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        side=model.config.vision_config.image_size,
        slots=prompts.max_prompt_points,
        background="yes" if prompts.negative_points else "never learnt, and refused",
        masks="yes" if prompts.mask_prompts else "never learnt, and refused",
    )  # fmt: skip
    card = ModelCard(with_front_matter(text))
    given = {"license": facts.license, "base_model": facts.base_model, "datasets": list(facts.datasets)}
    for key, value in given.items():
        if value:
            card.data[key] = value
    if facts.scores:
        card.data["model-index"] = eval_results_to_model_index(repository.rpartition("/")[2], as_results(facts.scores))
        if not own.is_file():
            card.text = f"{card.text.rstrip()}\n\n{score_table(facts.scores)}"
    return str(card)


def as_results(scores: dict[str, dict[str, float]]) -> list[EvalResult]:
    """Scores as the Hub's model-index takes them."""
    return [
        EvalResult("mask-generation", spelled(name), name, spelled(metric), value, metric_name=metric)
        for name, rows in scores.items()
        for metric, value in rows.items()
    ]


def spelled(name: str) -> str:
    """A name as an identifier: small letters, digits and underscores."""
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def score_table(scores: dict[str, dict[str, float]]) -> str:
    """Scores as a table of Markdown."""
    rows = [f"| {name} | {metric} | {value:g} |" for name, found in scores.items() for metric, value in found.items()]
    return "\n".join(["## Scores", "", "| data set | metric | value |", "|---|---|---|", *rows, ""])


def prepare_folder(
    folder: str | Path, target: str | Path, repository: str, facts: CardFacts | None = None
) -> dict[str, int]:
    """Write what would be uploaded.

    Returns:
        Bytes of each file.

    Raises:
        FileNotFoundError: naming the part that the folder lacks.
        ValueError: if it holds another model.
    """
    model, processor = load_folder(folder)
    written = save_for_hub(model, processor, target, model_card(model, folder, repository, facts or CardFacts()))
    return {path.name: path.stat().st_size for path in sorted(written.iterdir())}


def push_folder(
    folder: str | Path,
    repository: str,
    facts: CardFacts | None = None,
    **options: Any,
) -> str:
    """Upload a folder of weights, made whole with code, card and metadata; options as in `push_to_hub`.

    Returns:
        Address of the commit, or of the pull request.

    Raises:
        FileNotFoundError: naming the part that the folder lacks.
        ValueError: as `load_folder` and `push_to_hub` do, before anything is uploaded.
    """
    model, processor = load_folder(folder)
    card = model_card(model, folder, repository, facts or CardFacts())
    return push_to_hub(model, processor, repository, card, **options)


__all__ = ["CardFacts", "load_folder", "model_card", "prepare_folder", "push_folder", "read_scores"]
