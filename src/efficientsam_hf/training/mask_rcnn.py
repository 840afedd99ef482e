"""torchvision's Mask R-CNN over the encoder's simple feature pyramid, as in ViTDet (Li et al., ECCV 2022).

torchvision is asked for when a model is built and not before.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..configuration_efficientsam import PYRAMID_STRIDES, EfficientSamVisionConfig
from ..masks_efficientsam import masks_to_boxes
from ..modeling_efficientsam import EfficientSamLayerNorm2d
from ..modeling_efficientsam_backbone import EfficientSamBackbone
from ..written_files import written_together
from .classification import normalize_pixels
from .encoders import backbone_config, load_backbone

SAVED = ("mask_rcnn.safetensors", "mask_rcnn.json")


@dataclass
class MaskRcnnOutput(ModelOutput):
    """What Mask R-CNN gives.

    Args:
        loss: The sum of its five losses, in training.
        losses: Each of them.
        detections: Otherwise of each picture `boxes`, `labels` from 1, `scores`, `masks` (N, 1, S, S) from 0 to 1.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    detections: list[dict[str, Tensor]] | None = None


class PyramidMaps(nn.Module):
    """The backbone's maps under the names that torchvision's heads ask for, and one of twice the largest stride."""

    def __init__(self, backbone: EfficientSamBackbone):
        super().__init__()
        self.backbone = backbone
        self.out_channels = backbone.channels[0]

    def forward(self, pixel_values: Tensor) -> OrderedDict[str, Tensor]:
        """Pictures (B, 3, S, S) -> five maps."""
        maps = self.backbone(pixel_values).feature_maps
        named = [(str(number), found) for number, found in enumerate(maps)]
        return OrderedDict([*named, ("pool", F.max_pool2d(maps[-1], kernel_size=1, stride=2))])


class MaskRcnn(nn.Module):
    """Mask R-CNN that is trained and asked like the other models of this package.

    Args:
        backbone: With a pyramid as its features.
        names: The classes by their numbers.
        size: Side of the square pictures.
        head_channels: Of the four convolutions of each head; four times as many leave the box head.
        **fields: Of torchvision's `MaskRCNN`.

    Raises:
        ImportError: if torchvision is not there, or does not fit the torch that is.
    """

    def __init__(
        self,
        backbone: EfficientSamBackbone,
        names: Sequence[str],
        size: int,
        head_channels: int = 256,
        **fields: Any,
    ):
        super().__init__()
        try:
            from torchvision.models.detection import MaskRCNN
            from torchvision.models.detection.anchor_utils import AnchorGenerator
            from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
            from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
            from torchvision.models.detection.rpn import RPNHead
        except (ImportError, RuntimeError) as fault:
            raise ImportError(
                f"Mask R-CNN wants a torchvision that fits torch {torch.__version__}: {fault}; Mask2Former wants none"
            ) from fault
        self.names = list(names)
        # What `load_mask_rcnn` builds it from again.
        self.settings = {"names": self.names, "size": size, "head_channels": head_channels, **fields}
        maps = PyramidMaps(backbone)
        channels, norm = maps.out_channels, partial(EfficientSamLayerNorm2d, eps=1e-6)
        widths, classes = [head_channels] * 4, 1 + len(self.names)
        anchors = AnchorGenerator(tuple((side,) for side in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
        self.detector = MaskRCNN(
            maps,
            min_size=size,
            max_size=size,
            image_mean=[0.0, 0.0, 0.0],
            image_std=[1.0, 1.0, 1.0],
            _skip_resize=True,
            rpn_anchor_generator=anchors,
            rpn_head=RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=2),
            box_head=FastRCNNConvFCHead((channels, 7, 7), widths, [4 * head_channels], norm_layer=norm),
            box_predictor=FastRCNNPredictor(4 * head_channels, classes),
            mask_head=MaskRCNNHeads(channels, widths, 1, norm_layer=norm),
            mask_predictor=MaskRCNNPredictor(head_channels, head_channels, classes),
            **fields,
        )

    def forward(self, pixel_values: Tensor, targets: list[dict[str, Tensor]] | None = None) -> MaskRcnnOutput:
        """Square pictures (B, 3, S, S), normalised; in training for each `boxes`, `labels` from 1, and `masks`."""
        if not self.training:
            return MaskRcnnOutput(detections=self.detector(list(pixel_values)))
        losses = self.detector(list(pixel_values), targets)
        return MaskRcnnOutput(loss=torch.stack(list(losses.values())).sum(), losses=losses)


def build_mask_rcnn(
    source: str | Path, names: Sequence[str], size: int, encoder: dict[str, Any] | None = None, **fields: Any
) -> MaskRcnn:
    """Mask R-CNN over a checkpoint's encoder; all else starts anew.

    Args:
        source: Folder or Hub id of any checkpoint of this package.
        names: The classes by their numbers.
        size: Side of the square pictures.
        encoder: Fields of the encoder's config in place of the checkpoint's.
        **fields: Of torchvision's `MaskRCNN`.

    Raises:
        ImportError: if torchvision is not there.
        ValueError: if the checkpoint lacks the encoder.
        OSError: if there is no such folder or Hub id.
    """
    config = backbone_config(source, **{"out_features": list(PYRAMID_STRIDES), **(encoder or {})})
    model = MaskRcnn(EfficientSamBackbone(config), names, size, **fields)
    load_backbone(model, source)
    return model


def mask_rcnn_inputs(batch: dict[str, Any], generator: torch.Generator | None = None) -> dict[str, Any]:
    """Samples of `data.instances` -> what `MaskRcnn` takes; nothing is left to chance here."""
    pixels = normalize_pixels(batch["pixels"])
    targets = [
        {
            "boxes": masks_to_boxes(masks).to(pixels.device, torch.float32),
            "labels": 1 + labels.to(pixels.device),
            "masks": masks.to(pixels.device, torch.uint8),
        }
        for masks, labels in zip(batch["mask_labels"], batch["class_labels"], strict=True)
    ]
    return {"pixel_values": pixels, "targets": targets}


def save_mask_rcnn(model: MaskRcnn, folder: str | Path, repo_id: str | None = None) -> None:
    """A folder for `load_mask_rcnn`; `EfficientSamBackbone.from_pretrained` takes the encoder out of it.

    Args:
        model: On the CPU.
        folder: Where to.
        repo_id: Repository of the Hub to upload the folder to.
    """
    folder = Path(folder)
    model.detector.backbone.backbone.save_pretrained(folder)
    with written_together([folder / name for name in SAVED]) as (weights, settings):
        save_file(model.detector.state_dict(), weights)
        settings.write_text(json.dumps(model.settings, indent=2) + "\n", encoding="utf-8")
    if repo_id is not None:
        api = HfApi()
        api.upload_folder(repo_id=api.create_repo(repo_id, exist_ok=True).repo_id, folder_path=folder)


def load_mask_rcnn(folder: str | Path) -> MaskRcnn:
    """What `save_mask_rcnn` wrote, in evaluation mode.

    Raises:
        ImportError: if torchvision is not there.
        FileNotFoundError: if the folder has no Mask R-CNN.
    """
    folder = Path(folder)
    lacking = next((name for name in SAVED if not (folder / name).is_file()), None)
    if lacking is not None:
        raise FileNotFoundError(f"{folder} holds no Mask R-CNN: wanted {' and '.join(SAVED)}, found no {lacking}")
    weights, settings = (folder / name for name in SAVED)
    backbone = EfficientSamBackbone(EfficientSamVisionConfig.from_pretrained(folder))
    model = MaskRcnn(backbone, **json.loads(settings.read_text(encoding="utf-8")))
    # Details, which older folders have and nothing here reads.
    found = {name: weight for name, weight in load_file(weights).items() if ".patch_embedding.details." not in name}
    model.detector.load_state_dict(found)
    return model.eval()
