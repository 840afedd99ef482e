"""Teachers: what turns a picture into the features that SAMI's student guesses. One interface, three kinds.

B pictures, C channels, h x w the teacher's own grid, g x g the student's.
"""

import hashlib
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, ImageProcessingMixin, PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


class Teacher(nn.Module):
    """Pictures (B, 3, S, S) in [0, 1] -> features (B, C, g, g), float32, without gradient.

    Args:
        name: What people call it, with what was chosen of it.
        image_size: Side in pixels at which it looks; pictures of another size are resized.
        mean: Of the colours, in [0, 1].
        std: Their deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, image_size: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.name = name
        self.image_size = image_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def train(self, mode: bool = True) -> "Teacher":
        """A teacher never trains."""
        return super().train(False)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Normalised pictures (B, 3, image_size, image_size) -> the teacher's own grid (B, C, h, w)."""
        raise NotImplementedError(f"{type(self).__name__} gives no features")

    def weights_digest(self) -> str:
        """A fingerprint of what the features depend on."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def identity(self) -> dict[str, Any]:
        """What must be the same for features to be the same: `name`, `image_size`, `dtype`, `weights`."""
        dtype = getattr(getattr(self, "encoder", self.mean), "dtype", torch.float32)
        named = {"name": self.name, "image_size": self.image_size, "dtype": str(dtype).removeprefix("torch.")}
        return {**named, "weights": self.weights_digest()}

    @torch.no_grad()
    def forward(self, pixels: Tensor, grid: int | None = None) -> Tensor:
        """Pictures (B, 3, S, S) in [0, 1] -> (B, C, grid, grid), or the teacher's own grid if None."""
        side = (self.image_size, self.image_size)
        if tuple(pixels.shape[-2:]) != side:
            pixels = F.interpolate(pixels, side, mode="bicubic", antialias=True).clamp(0, 1)
        features = self.features((pixels - self.mean) / self.std).float()
        return features if grid is None else on_grid(features, grid)


def on_grid(features: Tensor, grid: int) -> Tensor:
    """Features (B, C, h, w) -> (B, C, grid, grid): averaged where there are more cells, interpolated where fewer."""
    height, width = features.shape[-2:]
    if (height, width) == (grid, grid):
        return features
    if height >= grid and width >= grid:
        return F.adaptive_avg_pool2d(features, grid)
    return F.interpolate(features, (grid, grid), mode="bilinear", align_corners=False)


class SamTeacher(Teacher):
    """The image encoder of SAM, SAM-HQ or SAM 2 in transformers.

    Args:
        encoder: `SamVisionModel`, `SamHQVisionModel`, `Sam2VisionModel` or what is inside them; it is changed.
        image_size: The paper leaves it open: the student's (positions are interpolated), or the encoder's own 1024.
        after_neck: Features after the neck, with 256 channels; or before it, 1280 for ViT-H.
        name: As for `Teacher`.
        mean: As for `Teacher`.
        std: As for `Teacher`.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        image_size: int,
        after_neck: bool = True,
        name: str = "sam",
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ):
        place = "after" if after_neck else "before"
        super().__init__(f"{name} {place} the neck", image_size, mean, std)
        self.encoder = getattr(encoder, "vision_encoder", encoder).requires_grad_(False).eval()
        self.after_neck = after_neck
        # Hiera (SAM 2) interpolates its positions by itself, and needs its neck's inputs apart.
        if hasattr(self.encoder, "patch_embed") and hasattr(self.encoder, "neck"):
            resize_positions(self.encoder, image_size)
            if not after_neck:
                self.encoder.neck = nn.Identity()

    def features(self, pixel_values: Tensor) -> Tensor:
        """See `Teacher.features`."""
        outputs = self.encoder(pixel_values.to(self.encoder.dtype))
        if self.after_neck:
            pyramid = getattr(outputs, "fpn_hidden_states", None)
            return outputs.last_hidden_state if pyramid is None else pyramid[-1]
        return outputs.last_hidden_state.permute(0, 3, 1, 2)


def resize_positions(encoder: Any, image_size: int) -> None:
    """Let SAM's encoder look at other pictures than its 1024 pixels; relative positions follow by themselves.

    Raises:
        ValueError: if the patches do not divide the picture.
    """
    patch = encoder.config.patch_size
    if image_size % patch:
        raise ValueError(f"the teacher's image_size must be a multiple of its patches' {patch}, got {image_size}")
    encoder.patch_embed.image_size = (image_size, image_size)
    if encoder.pos_embed is None or encoder.pos_embed.shape[1] == image_size // patch:
        return
    side = (image_size // patch, image_size // patch)
    table = encoder.pos_embed.detach().float().permute(0, 3, 1, 2)
    table = F.interpolate(table, side, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    encoder.pos_embed = nn.Parameter(table.to(encoder.pos_embed.dtype), requires_grad=False)


class VisionTeacher(Teacher):
    """Any other vision model of transformers: DINOv2, CLIP, ViT, ConvNeXt, ...

    Args:
        encoder: Its `last_hidden_state` is a token for each patch, after others that are left out, or a grid.
        image_size: Side in pixels; models that can interpolate their positions are asked to.
        name: As for `Teacher`.
        mean: As for `Teacher`.
        std: As for `Teacher`.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        image_size: int,
        name: str = "vision",
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ):
        super().__init__(name, image_size, mean, std)
        self.encoder = getattr(encoder, "vision_model", encoder).requires_grad_(False).eval()

    def features(self, pixel_values: Tensor) -> Tensor:
        """See `Teacher.features`."""
        pixel_values, config = pixel_values.to(self.encoder.dtype), self.encoder.config
        # Some interpolate their positions by themselves, some when asked, some have none.
        asked = "interpolate_pos_encoding" in signature(self.encoder.forward).parameters
        other = {"interpolate_pos_encoding": True} if asked else {}
        tokens = self.encoder(pixel_values, **other).last_hidden_state
        if tokens.ndim == 4:
            return tokens
        side = self.image_size // config.patch_size
        # A class token and registers come first.
        return tokens[:, tokens.shape[1] - side**2 :].unflatten(1, (side, side)).permute(0, 3, 1, 2)


class OnnxTeacher(Teacher):
    """Any ONNX file with one picture input (B, 3, H, W) and a feature map (B, C, h, w) among its outputs.

    Args:
        path: The file.
        image_size: Side in pixels.
        output: Name of the feature map.
        mean: Of the colours, in [0, 1].
        std: Their deviation.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has no such output.
        ImportError: without onnxruntime (`pip install efficientsam-hf[export]`).
    """

    def __init__(
        self,
        path: str | Path,
        image_size: int,
        output: str,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ):
        import onnxruntime

        super().__init__(f"{Path(path).name} {output}", image_size, mean, std)
        if not Path(path).is_file():
            raise FileNotFoundError(f"no ONNX file at {path}")
        self.path = Path(path)
        self.output = output
        options = onnxruntime.SessionOptions()
        # As many threads as torch has: it may share the machine with other processes.
        options.intra_op_num_threads = torch.get_num_threads()
        wanted = onnxruntime.get_available_providers()
        self.session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
        names = [node.name for node in self.session.get_outputs()]
        if output not in names:
            raise ValueError(f"{path} has no output {output!r}: found {', '.join(names)}")

    def weights_digest(self) -> str:
        """The file's fingerprint, and the colours'."""
        digest = hashlib.sha256(self.path.read_bytes())
        digest.update(super().weights_digest().encode())
        return digest.hexdigest()[:16]

    def features(self, pixel_values: Tensor) -> Tensor:
        """See `Teacher.features`."""
        inputs = {self.session.get_inputs()[0].name: pixel_values.float().cpu().numpy()}
        return torch.from_numpy(self.session.run([self.output], inputs)[0]).to(pixel_values.device)


def load_teacher(
    source: str,
    image_size: int,
    after_neck: bool = True,
    output: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Teacher:
    """A teacher by the name of what it is: an ONNX file, or a folder or Hub id of a transformers model.

    Args:
        source: `*.onnx`, a folder, or a Hub id.
        image_size: Side in pixels at which it looks.
        after_neck: Of a SAM encoder: see `SamTeacher`.
        output: Of an ONNX file: see `OnnxTeacher`.
        mean: Of the colours; what comes with the model, or ImageNet's, if None.
        std: Their deviation.
        dtype: Of the weights.

    Raises:
        ValueError: if an ONNX file comes without `output`, and for features before the neck of what has none.
    """
    if source.endswith(".onnx"):
        if not after_neck:
            raise ValueError(f"{source}: only an encoder of SAM has features before its neck, found an ONNX file")
        if output is None:
            raise ValueError(f"{source}: say which output holds the features")
        return OnnxTeacher(source, image_size, output, mean or IMAGENET_DEFAULT_MEAN, std or IMAGENET_DEFAULT_STD)
    try:
        processing = ImageProcessingMixin.get_image_processor_dict(source)[0]
    except OSError:
        processing = {}
    mean = mean or processing.get("image_mean") or IMAGENET_DEFAULT_MEAN
    std = std or processing.get("image_std") or IMAGENET_DEFAULT_STD
    model = AutoModel.from_pretrained(source, dtype=dtype)
    model = getattr(model, "vision_encoder", model)
    if hasattr(model, "neck"):
        return SamTeacher(model, image_size, after_neck, source, mean, std)
    if not after_neck:
        found = type(model).__name__
        raise ValueError(f"{source}: only an encoder of SAM has features before its neck, found {found}")
    return VisionTeacher(model, image_size, source, mean, std)
