"""An encoder and a decoder in ONNX, with the names and shapes of EfficientSAM's own export, as osam and labelme ship.

encoder   batched_images (1, 3, H, W) in 0 to 1                            -> image_embeddings
decoder   image_embeddings, batched_point_coords (1, Q, P, 2), batched_point_labels (1, Q, P) as floats,
          orig_im_size (2,)                                                -> masks (1, Q, M, H, W), IoU (1, Q, M), ...

A box is two points with the labels 2 and 3. The files that are shipped take one object a call, a Q of 1.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .predictor import Answer, Embedded, Prompts

CORNERS = (2.0, 3.0)  # labels of a box's first and second point
SLOTS = 6  # that the released weights learnt


class OnnxPairPredictor:
    """Two ONNX files, run by onnxruntime.

    Args:
        encoder: See above.
        decoder: See above.
        providers: Of onnxruntime, in order of preference.

    Raises:
        ValueError: if the files have other inputs.
    """

    background_clicks = False
    most_clicks: int | None = SLOTS
    mask_prompts = False

    def __init__(
        self, encoder: str | Path, decoder: str | Path, providers: tuple[str, ...] = ("CPUExecutionProvider",)
    ):
        import onnxruntime

        self.files = (Path(encoder), Path(decoder))
        self.name = Path(encoder).stem
        try:
            self.encoder, self.decoder = (
                onnxruntime.InferenceSession(str(path), providers=list(providers)) for path in self.files
            )
        except Exception as error:
            # onnxruntime has classes of its own for each fault, none of them public.
            raise ValueError(f"{encoder}, {decoder}: no pair that onnxruntime can read: {error}") from error
        self.parameters = sum(map(count_parameters, self.files))
        self.check_names()
        points = next(item for item in self.decoder.get_inputs() if item.name == "batched_point_coords")
        self.one_by_one = points.shape[1] == 1

    def check_names(self) -> None:
        """Refuse files of another model by what their inputs are called."""
        wanted = (
            {"batched_images"},
            {"image_embeddings", "batched_point_coords", "batched_point_labels", "orig_im_size"},
        )
        for path, session, names in zip(self.files, (self.encoder, self.decoder), wanted, strict=True):
            found = {item.name for item in session.get_inputs()}
            if found != names:
                raise ValueError(f"{path} has the inputs {sorted(found)}, wanted {sorted(names)}")

    def embed(self, picture: Image.Image) -> Embedded:
        """See `Predictor`."""
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32).transpose(2, 0, 1)[None] / 255
        return Embedded(self.encoder.run(None, {"batched_images": pixels})[0], (picture.height, picture.width))

    def decode(self, embedded: Embedded, prompts: Prompts) -> Answer:
        """See `Predictor`; the logits are of full size."""
        points, labels = slots_of(prompts)
        step = 1 if self.one_by_one else len(points)
        parts = [
            self.decode_some(embedded, points[at : at + step], labels[at : at + step])
            for at in range(0, len(points), step)
        ]
        logits, scores = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
        return Answer(logits, scores)

    def decode_some(self, embedded: Embedded, points: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        """Points (Q, P, 2), labels (Q, P) -> logits (Q, M, H, W), scores (Q, M)."""
        feed = {
            "image_embeddings": embedded.features,
            "batched_point_coords": points[None],
            "batched_point_labels": labels[None],
            "orig_im_size": np.array(embedded.size, dtype=np.int64),
        }
        masks, scores, *_ = self.decoder.run(None, feed)
        return masks[0], scores[0]

    def at_size(self, embedded: Embedded, logits: Tensor) -> np.ndarray:
        """See `Predictor`."""
        return (logits >= 0).numpy()

    def weights_hash(self) -> str:
        """SHA-256 over both files."""
        return hashlib.sha256(b"".join(path.read_bytes() for path in self.files)).hexdigest()

    def settings(self) -> dict[str, Any]:
        """See `Predictor`: all of it lies in the files."""
        return {}


def slots_of(prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and clicks as labelled points: (Q, P, 2), (Q, P), float32."""
    points, labels = [], []
    if prompts.boxes is not None:
        points.append(prompts.boxes.reshape(-1, 2, 2))
        labels.append(np.tile(CORNERS, (len(prompts.boxes), 1)))
    if prompts.points is not None and prompts.labels is not None:
        points.append(prompts.points)
        labels.append(prompts.labels)
    return np.concatenate(points, 1).astype(np.float32), np.concatenate(labels, 1).astype(np.float32)


def count_parameters(path: Path) -> int:
    """Numbers in an ONNX file's weights; 0 where the package that reads them is missing."""
    try:
        import onnx
    except ImportError:
        return 0
    graph = onnx.load(str(path), load_external_data=False).graph
    return sum(int(np.prod(weight.dims)) for weight in graph.initializer)


__all__ = ["OnnxPairPredictor"]
