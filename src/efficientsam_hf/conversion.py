"""Official EfficientSAM checkpoints, there and back.

The released `efficient_sam_vitt.pt` and `efficient_sam_vits.pt` (the latter comes zipped) are pickles of
`{"model": state_dict}`. `NAMES` is the only place that knows both layouts.
"""

import json
import math
import re
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .configuration_efficientsam import VARIANTS, EfficientSamConfig
from .modeling_efficientsam import EfficientSamModel
from .written_files import written_together

# Official name, our name. A {} stands for one part of the name and carries over.
NAMES = [
    ("image_encoder.pos_embed", "vision_encoder.embeddings.position_embedding"),
    ("image_encoder.patch_embed.proj.{}", "vision_encoder.embeddings.patch_embedding.{}"),
    ("image_encoder.blocks.{}.norm{}.{}", "vision_encoder.layers.{}.layer_norm{}.{}"),
    ("image_encoder.blocks.{}.attn.q.{}", "vision_encoder.layers.{}.attention.q_proj.{}"),
    ("image_encoder.blocks.{}.attn.k.{}", "vision_encoder.layers.{}.attention.k_proj.{}"),
    ("image_encoder.blocks.{}.attn.v.{}", "vision_encoder.layers.{}.attention.v_proj.{}"),
    ("image_encoder.blocks.{}.attn.proj.{}", "vision_encoder.layers.{}.attention.out_proj.{}"),
    ("image_encoder.blocks.{}.mlp.fc1.{}", "vision_encoder.layers.{}.mlp.layers.0.{}"),
    ("image_encoder.blocks.{}.mlp.fc2.{}", "vision_encoder.layers.{}.mlp.layers.1.{}"),
    ("image_encoder.neck.0.{}", "vision_encoder.neck.conv1.{}"),
    ("image_encoder.neck.1.{}", "vision_encoder.neck.layer_norm1.{}"),
    ("image_encoder.neck.2.{}", "vision_encoder.neck.conv2.{}"),
    ("image_encoder.neck.3.{}", "vision_encoder.neck.layer_norm2.{}"),
    ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "shared_image_embedding.gaussian_matrix"),
    ("prompt_encoder.invalid_points.weight", "prompt_encoder.no_point"),
    ("prompt_encoder.point_embeddings.weight", "prompt_encoder.foreground"),
    ("prompt_encoder.bbox_top_left_embeddings.weight", "prompt_encoder.box_top_left"),
    ("prompt_encoder.bbox_bottom_right_embeddings.weight", "prompt_encoder.box_bottom_right"),
    ("mask_decoder.transformer.layers.{}.norm{}.{}", "mask_decoder.transformer.blocks.{}.layer_norm{}.{}"),
    (
        "mask_decoder.transformer.layers.{}.self_attn.{}.{}",
        "mask_decoder.transformer.blocks.{}.self_attention.{}.{}",
    ),
    (
        "mask_decoder.transformer.layers.{}.cross_attn_token_to_image.{}.{}",
        "mask_decoder.transformer.blocks.{}.token_to_image.{}.{}",
    ),
    (
        "mask_decoder.transformer.layers.{}.cross_attn_image_to_token.{}.{}",
        "mask_decoder.transformer.blocks.{}.image_to_token.{}.{}",
    ),
    ("mask_decoder.transformer.layers.{}.mlp.layers.0.0.{}", "mask_decoder.transformer.blocks.{}.mlp.layers.0.{}"),
    ("mask_decoder.transformer.layers.{}.mlp.fc.{}", "mask_decoder.transformer.blocks.{}.mlp.layers.1.{}"),
    (
        "mask_decoder.transformer.final_attn_token_to_image.{}.{}",
        "mask_decoder.transformer.final_token_to_image.{}.{}",
    ),
    ("mask_decoder.transformer.norm_final_attn.{}", "mask_decoder.transformer.final_layer_norm.{}"),
    ("mask_decoder.iou_token.weight", "mask_decoder.iou_token"),
    ("mask_decoder.mask_tokens.weight", "mask_decoder.mask_tokens"),
    ("mask_decoder.final_output_upscaling_layers.0.0.{}", "mask_decoder.upscale_conv1.{}"),
    ("mask_decoder.final_output_upscaling_layers.0.1.{}", "mask_decoder.upscale_norm.{}"),
    ("mask_decoder.final_output_upscaling_layers.1.0.{}", "mask_decoder.upscale_conv2.{}"),
    ("mask_decoder.output_hypernetworks_mlps.{}.layers.{}.0.{}", "mask_decoder.hypernetworks.{}.layers.{}.{}"),
    ("mask_decoder.output_hypernetworks_mlps.{}.fc.{}", "mask_decoder.hypernetworks.{}.layers.2.{}"),
    ("mask_decoder.iou_prediction_head.layers.{}.0.{}", "mask_decoder.iou_head.layers.{}.{}"),
    ("mask_decoder.iou_prediction_head.fc.{}", "mask_decoder.iou_head.layers.2.{}"),
]
# Fields of a config on which no answer depends.
NOT_ANSWERING = {
    "attention_dropout",
    "drop_path_rate",
    "initializer_range",
    "pooling",
    "pyramid_channels",
    "single_mask_token",
    "_out_features",
    "_out_indices",
}


def rename(key: str, rows: list[tuple[str, str]]) -> str | None:
    """The new name by the first row whose left side fits `key`, or None."""
    for old, new in rows:
        found = re.fullmatch(re.escape(old).replace(r"\{\}", r"([^.]+)"), key)
        if found:
            return new.format(*found.groups())
    return None


def rename_all(state_dict: Mapping[str, Tensor], rows: list[tuple[str, str]]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under their new names, and the keys that no row fits."""
    names = {key: rename(key, rows) for key in state_dict}
    renamed = {name: state_dict[key] for key, name in names.items() if name is not None}
    return renamed, [key for key, name in names.items() if name is None]


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official state dict in our layout.

    Raises:
        ValueError: if a key is none of EfficientSAM's.
    """
    separate = {}
    for key, tensor in state_dict.items():
        if ".attn.qkv." in key:
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                separate[key.replace(".qkv.", f".{part}.")] = chunk.clone()
        else:
            separate[key] = tensor
    renamed, foreign = rename_all(separate, NAMES)
    if foreign:
        raise ValueError(
            f"wanted the keys of an EfficientSAM checkpoint, got {len(foreign)} others, such as {foreign[0]!r}"
        )
    return renamed


def to_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict in the official layout, bit for bit what `from_official` was given.

    Raises:
        ValueError: if the model has parts that the official one lacks (background clicks, mask prompts).
    """
    renamed, foreign = rename_all(state_dict, [(ours, official) for official, ours in reversed(NAMES)])
    if foreign:
        raise ValueError(
            f"the official EfficientSAM has no place for {foreign[0]!r} and {len(foreign) - 1} other tensors"
        )
    for key in [key for key in renamed if ".attn.q." in key]:
        parts = [renamed.pop(key.replace(".q.", f".{part}.")) for part in "qkv"]
        renamed[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    return renamed


def read_config(state_dict: Mapping[str, Tensor]) -> EfficientSamConfig:
    """The variant that the shapes of an official state dict belong to.

    Raises:
        ValueError: if they belong to none.
    """
    positions = state_dict.get("image_encoder.pos_embed")
    wanted = {fields["hidden_size"]: fields for fields in VARIANTS.values()}
    if positions is None or positions.ndim != 3 or positions.shape[2] not in wanted:
        found = (
            "no image_encoder.pos_embed" if positions is None else f"image_encoder.pos_embed {tuple(positions.shape)}"
        )
        raise ValueError(f"wanted an EfficientSAM checkpoint with an encoder {sorted(wanted)} wide, got {found}")
    layers = {key.split(".")[2] for key in state_dict if key.startswith("image_encoder.blocks.")}
    side = 16 * math.isqrt(positions.shape[1] - 1)
    fields = wanted[positions.shape[2]]
    return EfficientSamConfig(vision_config={**fields, "num_hidden_layers": len(layers), "pretrain_image_size": side})


def read_official(path: str | Path) -> dict[str, Tensor]:
    """The state dict in an official `.pt` file, or in a zip around one; nothing in it is ever executed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds anything but `{"model": state_dict}` of plain tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: wanted an official EfficientSAM .pt or .zip file")
    with tempfile.TemporaryDirectory() as folder:
        try:
            content = torch.load(unzip_checkpoint(path, Path(folder)), map_location="cpu", weights_only=True)
        except Exception as error:  # torch's careful unpickler meets foreign bytes with errors of any kind
            reason = str(error).split("\n")[0].split(". ")[0]  # what torch advises then is to load anything
            raise ValueError(
                f"{path} is no checkpoint of plain tensors, and nothing else is loaded: {reason}"
            ) from error
    state_dict = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f'{path} must hold {{"model": state_dict}}, got {describe(content)}')
    return state_dict


def unzip_checkpoint(path: Path, folder: Path) -> Path:
    """The `.pt` inside a released zip, unpacked into `folder`; any other file as it is (torch's own are zips too)."""
    if not zipfile.is_zipfile(path):
        return path
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith((".pt", ".pth")) and "__MACOSX" not in name]
        return Path(archive.extract(members[0], folder)) if members else path


def describe(content: object) -> str:
    """What a checkpoint holds instead, in a few words."""
    if isinstance(content, dict):
        return f"a dict with the keys {', '.join(map(repr, list(content)[:3]))}" + (" ..." if len(content) > 3 else "")
    return f"a {type(content).__name__}"


def convert(path: str | Path, config: EfficientSamConfig | None = None) -> EfficientSamModel:
    """The model in an official checkpoint file.

    Args:
        path: `.pt` file or the released zip around one.
        config: Only for sizes that were never released; otherwise read from the shapes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not an EfficientSAM checkpoint, or not one of `config`'s size.
    """
    official = read_official(path)
    config = config or read_config(official)
    model = EfficientSamModel(config)
    try:
        model.load_state_dict(from_official(official))
    except RuntimeError as error:
        reason = str(error).split("\n")[1].strip()
        raise ValueError(f"{path} is not an EfficientSAM checkpoint of this size: {reason}") from error
    return model.eval()


def check_told(config: EfficientSamConfig, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse a config that an official state dict does not tell: who reads it would have another model.

    Of sizes that were never released it tells none, and whoever reads them gives it.
    """
    try:
        told = read_config(state_dict)
    except ValueError:
        return
    for part in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
        own, others = getattr(config, part), getattr(told, part)
        for name in sorted(set(type(own).__annotations__) - NOT_ANSWERING):
            # As JSON, where tuples are lists.
            found, wanted = json.dumps(getattr(own, name)), json.dumps(getattr(others, name))
            if found != wanted:
                raise ValueError(f"an official file has no place for {name}: found {found}, it is read as {wanted}")


def save_official(model: EfficientSamModel, path: str | Path) -> None:
    """Write the model as an official `.pt` file, for people whose tools need that layout.

    Raises:
        ValueError: for weights or a config that the layout has no place for, such as windows.
    """
    state_dict = to_official({key: tensor.float().cpu() for key, tensor in model.state_dict().items()})
    check_told(model.config, state_dict)
    with written_together([Path(path)]) as (part,):
        torch.save({"model": state_dict}, part)
