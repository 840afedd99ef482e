"""Any picture -> RGB pixels (3, H, W): files, URLs, Pillow's colour modes, arrays and tensors of every layout."""

import base64
import io
import os
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

#: What is read as a picture.
Picture = str | os.PathLike | PIL.Image.Image | np.ndarray | Tensor

CHANNELS = (1, 3, 4)  # grey, RGB, RGB and alpha
# Phones take photos of 12000 x 9000, at which Pillow warns; above twice its limit it refuses.
LARGEST_PICTURE = 2**27
PILLOWS_LIMIT = 2**30 // 4 // 3  # as long as nobody has set another one
SILENCE = 60  # seconds that a server may take for a part of its answer


def read_picture(
    source: Picture, name: str = "the picture", to_rgb: bool = True, input_data_format: str | None = None
) -> Tensor:
    """Any picture as RGB (3, H, W): uint8 in 0 to 255, or float32 as it came. Transparency is dropped.

    Args:
        source: A path, URL or base64 text, a PIL picture, or an array or tensor (H, W), (H, W, C) or (C, H, W).
        name: What errors call a picture that has no file name.
        to_rgb: Turn other colour modes into RGB; without it they are refused.
        input_data_format: "channels_first" or "channels_last", for shapes that could be read both ways.

    Raises:
        FileNotFoundError: if the text is no file, URL or picture.
        ConnectionError: if a URL does not give its file.
        ValueError: if there is something else that is no picture.
    """
    name = (getattr(source, "filename", "") or name) if isinstance(source, PIL.Image.Image) else name
    name = str(source)[:200] if isinstance(source, (str, os.PathLike)) else name
    is_array = not isinstance(source, Tensor)
    try:
        if isinstance(source, (str, os.PathLike)):
            source = open_picture(os.fspath(source))
        if isinstance(source, PIL.Image.Image):
            source, input_data_format = torch.from_numpy(upright_pixels(source, to_rgb)), "channels_last"
        elif isinstance(source, np.ndarray):
            source = torch.from_numpy(np.array(source, dtype=source.dtype.newbyteorder("=")))
        if not isinstance(source, Tensor):
            raise ValueError(f"wanted a path, URL, PIL picture, array or tensor, found {type(source).__name__}")
        return arrange_channels(source, input_data_format, is_array, to_rgb)
    except (FileNotFoundError, ConnectionError, MemoryError):
        raise
    except UnidentifiedImageError as fault:
        found = "its address gives something else" if "://" in name else "no format that Pillow knows"
        raise ValueError(f"{name}: cannot be read as a picture: {found}") from fault
    except Exception as fault:  # Pillow's decoders raise OSError, SyntaxError, struct.error and others
        raise ValueError(f"{name}: cannot be read as a picture: {' '.join(str(fault).split())}") from fault


def read_photo(source: Picture) -> PIL.Image.Image:
    """A picture as `segment` sees it, and masks are drawn on it: upright, in RGB with 8 bits a channel.

    Args:
        source: PIL picture, array, tensor, path or URL.

    Raises:
        ValueError: if it is no picture, such as floats outside of 0 to 1.
        FileNotFoundError: if there is no such file.
    """
    pixels = read_picture(source)
    if pixels.is_floating_point():
        pixels = (rescale_pixels(pixels, 1, "the picture") * 255).round()
    return PIL.Image.fromarray(pixels.byte().permute(1, 2, 0).numpy())


def open_picture(text: str) -> PIL.Image.Image:
    """A path, a URL or base64 text (with or without `data:image/...;base64,`) -> a picture, not decoded yet."""
    if text.startswith(("http://", "https://")):
        return PIL.Image.open(io.BytesIO(download(text)))
    if os.path.exists(text):
        return PIL.Image.open(io.BytesIO(Path(text).read_bytes()))
    encoded = text.split(",", 1)[-1] if text.startswith("data:image/") else text
    try:
        return PIL.Image.open(io.BytesIO(base64.b64decode("".join(encoded.split()), validate=True)))
    except (ValueError, UnidentifiedImageError):
        raise FileNotFoundError(f"{text[:200]}: no such file, and neither a URL nor a base64 picture") from None


def download(address: str) -> bytes:
    """What lies at a URL, as it is.

    Raises:
        ConnectionError: if nobody answers, or with anything but the file.
    """
    try:
        with urlopen(Request(address, headers={"User-Agent": "efficientsam-hf"}), timeout=SILENCE) as answer:
            return answer.read()
    except (OSError, HTTPException, ValueError) as fault:
        raise ConnectionError(f"{address[:200]}: {' '.join(str(fault).split()) or type(fault).__name__}") from fault


def upright_pixels(picture: PIL.Image.Image, to_rgb: bool) -> np.ndarray:
    """A picture's pixels (H, W) or (H, W, C), turned as its EXIF data says."""
    limit = LARGEST_PICTURE if PIL.Image.MAX_IMAGE_PIXELS == PILLOWS_LIMIT else PIL.Image.MAX_IMAGE_PIXELS
    if limit and picture.width * picture.height > limit:
        found = f"{picture.height} x {picture.width}"
        raise ValueError(f"found {found} pixels, wanted at most {limit} (PIL.Image.MAX_IMAGE_PIXELS)")
    if picture.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:  # Pillow copies pictures that need no turn
        picture = PIL.ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        return sixteen_bits(picture)
    if picture.mode == "F" or not to_rgb:
        return np.array(picture)
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def sixteen_bits(picture: PIL.Image.Image) -> np.ndarray:
    """The pixels (H, W) of integers above 255, which Pillow would clip there instead of scaling them."""
    pixels = np.array(picture)
    if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 65535):
        raise ValueError(f"16-bit grey wants 0 to 65535, found {pixels.min()} to {pixels.max()}")
    # Files of 16 bits open as "I;16"; "I" is what Pillow makes of an array of integers, which may be of 8.
    return pixels.astype(np.uint8 if picture.mode == "I" and pixels.max(initial=0) <= 255 else np.uint16)


def as_stored(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A picture, decoded, in RGB with 8 bits: the colours that `read_picture` gives, but turned as its file has it."""
    picture.load()
    if picture.mode.startswith("I"):
        picture = PIL.Image.fromarray(eight_bits_or_floats(torch.from_numpy(sixteen_bits(picture))).numpy())
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def arrange_channels(pixels: Tensor, layout: str | None, is_array: bool, to_rgb: bool) -> Tensor:
    """Pixels (H, W), (H, W, C) or (C, H, W) of any type -> (3, H, W), uint8 or float32."""
    if layout not in (None, "channels_first", "channels_last"):
        raise ValueError(f'input_data_format wants "channels_first" or "channels_last", found {layout!r}')
    shape = tuple(pixels.shape)
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim != 3:
        raise ValueError(f"wanted two or three dimensions, found shape {shape}")
    elif is_channels_last(pixels.shape, layout, is_array):
        pixels = pixels.movedim(-1, 0)
    if not pixels.numel():
        raise ValueError(f"wanted some pixels, found shape {shape}")
    if len(pixels) not in (CHANNELS if to_rgb else (3,)):
        wanted = "1, 3 or 4" if to_rgb else "3 (do_convert_rgb is off)"
        raise ValueError(f"wanted {wanted} channels first or last, found shape {shape}")
    return eight_bits_or_floats(pixels[:3]).expand(3, -1, -1)


def is_channels_last(shape: torch.Size, layout: str | None, is_array: bool) -> bool:
    """Whether (H, W, C) or (C, H, W); where both fit, arrays are taken as the first and tensors as the second."""
    first, last = shape[0] in CHANNELS, shape[-1] in CHANNELS
    if layout is not None and first == last:
        return layout == "channels_last"
    if first and last and (shape[0] == 3) != (shape[-1] == 3):
        return shape[-1] == 3
    return last and (is_array or not first)


def eight_bits_or_floats(pixels: Tensor) -> Tensor:
    """Floats as float32, and uint8 in 0 to 255 of everything else: 16 bits are scaled down, booleans up."""
    if pixels.is_floating_point():
        return pixels.float()
    if pixels.dtype == torch.uint16:
        return ((pixels.int() + 128) // 257).byte()
    if pixels.dtype == torch.bool:
        return pixels.byte() * 255
    if pixels.dtype in (torch.uint32, torch.uint64):
        pixels = pixels.long()  # torch has no comparisons of these
    if pixels.dtype != torch.uint8 and (pixels.min() < 0 or pixels.max() > 255):
        raise ValueError(f"integers of {pixels.dtype} want 0 to 255, found {pixels.min()} to {pixels.max()}")
    return pixels.byte()


def rescale_pixels(pixels: Tensor, factor: float, name: str) -> Tensor:
    """uint8 times `factor`; floats are taken as already scaled, which they must look like."""
    if not pixels.is_floating_point():
        return pixels.float().div_(1 / factor)  # a division, as the official code divides by 255
    low, high = pixels.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name}: floats want 0 to 1, found {low:.4g} to {high:.4g}: give uint8, or divide by 255")
    return pixels


__all__ = ["Picture", "read_photo", "read_picture", "rescale_pixels"]
