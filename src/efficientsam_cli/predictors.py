"""Which model a name stands for."""

from pathlib import Path
from typing import Any


def load_predictor(source: str | None, device: str | None, zoom: float = 0) -> Any:
    """This package's models and its peers, ready to be evaluated.

    Args:
        source: Folder or Hub id; an exported folder; `ENCODER.onnx,DECODER.onnx`; None for the bundled checkpoint.
        device: Where to; None, an exported folder's own choice.
        zoom: How close to look at each object, as in `segment`.

    Raises:
        ValueError: for a model of another kind, and for a zoom of one that is not this package's.
        OSError: if there is none.
    """
    from transformers import PreTrainedConfig

    from efficientsam_hf import EfficientSamConfig, default_checkpoint, load_checkpoint
    from efficientsam_hf.evaluation.predictor import EfficientSamPredictor, ZoomingPredictor
    from efficientsam_hf.prediction import find_zoom

    if source and source.endswith(".onnx"):
        if zoom:
            raise ValueError(f"--zoom is for this package's models, got {source}")
        return load_onnx(source, device or "cpu")
    folder = str(default_checkpoint() if source is None else source)
    kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    name = Path(folder).name
    if kind in ("sam", "sam_hq", "sam2", "sam2_video", "edgetam", "edgetam_video"):
        if zoom:
            raise ValueError(f"--zoom is for this package's models, got one of type {kind!r}")
        return load_peer(kind.removesuffix("_video"), folder, device or "cpu")
    if kind != EfficientSamConfig.model_type:
        wanted = "efficientsam, sam, sam_hq, sam2 or edgetam"
        raise ValueError(f"{source} holds a model of type {kind!r}, wanted {wanted}")
    model, processor = load_checkpoint(folder, device=device)
    if zoom := find_zoom(model, zoom):
        return ZoomingPredictor(model, processor, f"{name}, zoom {zoom:g}", zoom)
    return EfficientSamPredictor(model, processor, name)


def load_peer(kind: str, folder: str, device: str) -> Any:
    """One of transformers' models."""
    from transformers.models.edgetam.modeling_edgetam import EdgeTamModel
    from transformers.models.sam.modeling_sam import SamModel
    from transformers.models.sam2.modeling_sam2 import Sam2Model
    from transformers.models.sam_hq.modeling_sam_hq import SamHQModel

    from efficientsam_hf.evaluation.peers import Sam2Predictor, SamPredictor

    classes: dict[str, tuple[Any, Any]] = {
        "sam": (SamModel, SamPredictor),
        "sam_hq": (SamHQModel, SamPredictor),
        "sam2": (Sam2Model, Sam2Predictor),
        "edgetam": (EdgeTamModel, Sam2Predictor),
    }
    model, predictor = classes[kind]
    return predictor(model.from_pretrained(folder).to(device).eval(), Path(folder).name)


def load_onnx(source: str, device: str) -> Any:
    """A pair of files."""
    from efficientsam_hf.evaluation.onnx_pair import OnnxPairPredictor

    encoder, _, decoder = source.partition(",")
    missing = [path for path in (encoder, decoder) if not Path(path).is_file()]
    if missing:
        raise ValueError(f"wanted ENCODER.onnx,DECODER.onnx, nothing at {missing[0]!r}")
    first = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
    return OnnxPairPredictor(encoder, decoder, tuple(dict.fromkeys((first, "CPUExecutionProvider"))))
