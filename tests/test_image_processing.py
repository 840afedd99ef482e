"""Every kind of picture on its way in, every bad one refused, masks on their way out, the pipeline's four calls."""

import base64
import io
import json
import socket
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

# transformers 5.17 offers this class from its front door only where torchvision is installed.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from efficientsam_hf import EfficientSamImageProcessor, pictures_efficientsam
from efficientsam_hf.masks_efficientsam import decode_rle, encode_rle

SIDE = 32
MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)
ASPECTS = {"1:1": (40, 40), "4:3": (48, 64), "16:9": (36, 64), "9:16": (64, 36)}


@pytest.fixture
def processor() -> EfficientSamImageProcessor:
    return EfficientSamImageProcessor(size={"height": SIDE, "width": SIDE})


@pytest.fixture
def raw() -> EfficientSamImageProcessor:
    """Shows the pixels themselves, scaled to 0 to 1."""
    return EfficientSamImageProcessor(do_resize=False, do_normalize=False)


def normalized(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) in 0 to 1 -> (3, H, W) with ImageNet's mean and deviation, written out."""
    return torch.from_numpy((pixels.astype(np.float32) - MEAN) / STD).permute(2, 0, 1)


def stretched(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear without antialiasing, pixel by pixel: sample at the centres, repeat the edges."""
    out = np.zeros((height, width, pixels.shape[2]))
    for row in range(height):
        y = np.clip((row + 0.5) * pixels.shape[0] / height - 0.5, 0, pixels.shape[0] - 1)
        y0, y1 = int(y), min(int(y) + 1, pixels.shape[0] - 1)
        for column in range(width):
            x = np.clip((column + 0.5) * pixels.shape[1] / width - 0.5, 0, pixels.shape[1] - 1)
            x0, x1 = int(x), min(int(x) + 1, pixels.shape[1] - 1)
            top = pixels[y0, x0] * (1 - x + x0) + pixels[y0, x1] * (x - x0)
            bottom = pixels[y1, x0] * (1 - x + x0) + pixels[y1, x1] * (x - x0)
            out[row, column] = top * (1 - y + y0) + bottom * (y - y0)
    return out


def rgb_noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --------------------------------------------------------------------------------------------------------------------
# The official numbers


def test_a_picture_of_the_models_size_is_only_normalized(processor):
    image = rgb_noise(SIDE, SIDE)
    wanted = normalized(torch.from_numpy(image).float().div(255).numpy())
    assert torch.equal(processor(image).pixel_values[0], wanted)


@pytest.mark.parametrize(("height", "width"), [(20, 50), (50, 20), (64, 48), (7, 9)])
def test_other_pictures_are_stretched_by_bilinear_sampling(processor, height, width):
    image = rgb_noise(height, width)
    wanted = normalized(stretched(image / 255, SIDE, SIDE))
    torch.testing.assert_close(processor(image).pixel_values[0], wanted, rtol=1e-4, atol=1e-4)


def test_the_numbers_are_the_official_codes_bit_for_bit(processor):
    image = rgb_noise(50, 70)
    official = torch.from_numpy(image).permute(2, 0, 1)[None].float().div(255)
    official = F.interpolate(official, (SIDE, SIDE), mode="bilinear")
    official = (official - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    assert torch.equal(processor(image).pixel_values, official)


def test_antialiasing_is_an_option(processor):
    image = rgb_noise(320, 320)
    smooth = EfficientSamImageProcessor(size=SIDE, antialias=True)(image).pixel_values
    assert smooth.std() < 0.5 * processor(image).pixel_values.std()
    assert torch.equal(processor(image, antialias=True).pixel_values, smooth)


def test_defaults_are_the_released_weights():
    size = EfficientSamImageProcessor().size
    assert (size.height, size.width) == (1024, 1024)
    assert EfficientSamImageProcessor(size=512).size.width == 512


def test_a_batch_of_different_sizes(processor):
    images = [rgb_noise(20, 50), rgb_noise(64, 48)]
    batch = processor(images, return_tensors="pt")
    assert batch.pixel_values.shape == (2, 3, SIDE, SIDE)
    assert batch.original_sizes.dtype == torch.int64
    assert batch.original_sizes.tolist() == [[20, 50], [64, 48]]
    for index, image in enumerate(images):
        assert torch.equal(batch.pixel_values[index], processor(image).pixel_values[0])


def test_a_four_dimensional_array_is_a_batch(processor):
    images = np.stack([rgb_noise(20, 50), rgb_noise(20, 50)[::-1]])
    assert torch.equal(processor(images).pixel_values, processor(list(images)).pixel_values)


def test_numpy_tensors_on_request(processor):
    batch = processor(rgb_noise(8, 9), return_tensors="np")
    assert {type(value) for value in batch.values()} == {np.ndarray}


def test_without_resizing_pictures_must_be_of_one_size(raw):
    assert raw([rgb_noise(8, 9), rgb_noise(8, 9)]).pixel_values.shape == (2, 3, 8, 9)
    with pytest.raises(ValueError, match=r"pictures of one size, found \[\(8, 9\), \(9, 8\)\]"):
        raw([rgb_noise(8, 9), rgb_noise(9, 8)])


# --------------------------------------------------------------------------------------------------------------------
# Every kind of picture


def eight_bits(raw, picture, **kwargs) -> np.ndarray:
    """(H, W, 3) in 0 to 255, as the processor reads the picture."""
    return (raw(picture, **kwargs).pixel_values[0] * 255).round().byte().permute(1, 2, 0).numpy()


GREY = np.array([[0, 1, 100, 50, 6], [200, 254, 255, 128, 127]], dtype=np.uint8)
GREY_RGB = np.stack([GREY] * 3, axis=-1)
COLOUR = rgb_noise(2, 5)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "RGBX"])
def test_pillows_plain_modes(raw, mode):
    picture = PIL.Image.fromarray(COLOUR).convert(mode)
    wanted = np.array(PIL.Image.fromarray(COLOUR).convert("L")) if mode.startswith("L") else COLOUR
    wanted = np.stack([wanted] * 3, axis=-1) if wanted.ndim == 2 else wanted
    np.testing.assert_array_equal(eight_bits(raw, picture), wanted)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB"])
def test_pillows_other_colour_modes_are_converted_by_pillow(raw, mode):
    picture = PIL.Image.new(mode, (3, 2), tuple(range(40, 160, 30))[: len(PIL.Image.new(mode, (1, 1)).getbands())])
    np.testing.assert_array_equal(eight_bits(raw, picture), np.array(picture.convert("RGB")))


def test_one_bit(raw):
    picture = PIL.Image.fromarray(np.array([[0, 255, 0]], np.uint8)).convert("1")
    assert eight_bits(raw, picture)[0, :, 0].tolist() == [0, 255, 0]


def test_transparency_is_dropped_and_the_colour_below_kept(raw):
    transparent = np.concatenate([COLOUR, np.zeros((2, 5, 1), np.uint8)], axis=-1)
    np.testing.assert_array_equal(eight_bits(raw, PIL.Image.fromarray(transparent)), COLOUR)
    np.testing.assert_array_equal(eight_bits(raw, transparent), COLOUR)


@pytest.mark.parametrize("transparency", [None, 1, bytes([255, 0, 128])])
def test_palettes_with_and_without_transparency(raw, transparency, tmp_path):
    picture = PIL.Image.new("P", (3, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    picture.putdata([0, 1, 2])
    options = {} if transparency is None else {"transparency": transparency}
    picture.save(tmp_path / "palette.png", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = eight_bits(raw, tmp_path / "palette.png")
    assert found.tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]


SIXTEEN = np.array([[0, 128, 129, 257, 65535 - 257, 65535]], dtype=np.uint16)


def test_photos_of_the_largest_phones_are_read_unless_pillow_s_limit_is_set(monkeypatch):
    assert pictures_efficientsam.PILLOWS_LIMIT == PIL.Image.MAX_IMAGE_PIXELS
    assert 12000 * 9000 < pictures_efficientsam.LARGEST_PICTURE < 2 * PIL.Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(pictures_efficientsam, "LARGEST_PICTURE", 1600)
    picture = PIL.Image.new("RGB", (41, 40))
    with pytest.raises(ValueError, match="found 40 x 41 pixels, wanted at most 1600"):
        pictures_efficientsam.read_picture(picture)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1640)
    assert pictures_efficientsam.read_picture(picture).shape == (3, 40, 41)


@pytest.mark.parametrize(
    "picture",
    [
        PIL.Image.fromarray(SIXTEEN),
        PIL.Image.fromarray(SIXTEEN.astype(np.int32)),
        SIXTEEN,
        SIXTEEN.astype(">u2"),
        np.stack([SIXTEEN] * 3, axis=-1),
        torch.from_numpy(SIXTEEN),
    ],
    ids=["I;16", "I", "array", "big-endian array", "RGB array", "tensor"],
)
def test_sixteen_bits_are_scaled_and_not_clipped(raw, picture):
    assert eight_bits(raw, picture)[0, :, 1].tolist() == [0, 0, 1, 1, 254, 255]


def test_a_sixteen_bit_file(raw, tmp_path):
    PIL.Image.fromarray(SIXTEEN).save(tmp_path / "deep.png")
    assert eight_bits(raw, tmp_path / "deep.png")[0, :, 0].tolist() == [0, 0, 1, 1, 254, 255]


def test_float_greyscale(raw):
    picture = PIL.Image.fromarray(np.array([[0.0, 0.25, 1.0]], np.float32))
    assert picture.mode == "F"
    assert raw(picture).pixel_values[0, 2, 0].tolist() == [0, 0.25, 1]


ROTATIONS = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: np.rot90(image),
}


@pytest.mark.parametrize("orientation", ROTATIONS)
@pytest.mark.parametrize("opened", [False, True])
def test_exif_orientation_is_applied(raw, orientation, opened, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    PIL.Image.fromarray(COLOUR).save(path, exif=exif)
    picture = PIL.Image.open(path) if opened else path
    np.testing.assert_array_equal(eight_bits(raw, picture), ROTATIONS[orientation](COLOUR))


@pytest.mark.parametrize(
    "picture",
    [
        GREY,
        GREY[..., None],
        GREY[None],
        GREY_RGB,
        np.ascontiguousarray(GREY_RGB.transpose(2, 0, 1)),
        GREY.astype(np.int64),
        torch.from_numpy(GREY),
        torch.from_numpy(GREY)[None],
        torch.from_numpy(GREY_RGB),
        torch.from_numpy(GREY_RGB).movedim(-1, 0),
        torch.from_numpy(GREY).int(),
        (GREY / 255).astype(np.float32),
        GREY_RGB / 255,
        torch.from_numpy(GREY_RGB).movedim(-1, 0).double() / 255,
    ],
)
def test_arrays_and_tensors_of_every_layout(raw, picture):
    np.testing.assert_array_equal(eight_bits(raw, picture), GREY_RGB)


@pytest.mark.parametrize(
    ("shape", "is_array", "height_width"),
    [
        ((3, 7, 3), True, (3, 7)),
        ((3, 7, 3), False, (7, 3)),
        ((3, 7, 4), True, (7, 4)),
        ((4, 7, 3), False, (4, 7)),
        ((1, 7, 3), False, (1, 7)),
        ((1, 7, 1), True, (1, 7)),
        ((1, 7, 1), False, (7, 1)),
        ((7, 9, 4), False, (7, 9)),
        ((4, 7, 9), True, (7, 9)),
    ],
)
def test_ambiguous_layouts_follow_a_rule(raw, shape, is_array, height_width):
    picture = np.zeros(shape, np.uint8)
    assert raw(picture if is_array else torch.from_numpy(picture)).original_sizes.tolist() == [list(height_width)]


def test_ambiguous_layouts_can_be_told(raw):
    picture = np.zeros((3, 7, 3), np.uint8)
    assert raw(picture, input_data_format="channels_first").original_sizes.tolist() == [[7, 3]]
    wide = np.zeros((3, 7, 9), np.uint8)
    assert raw(wide, input_data_format="channels_last").original_sizes.tolist() == [[7, 9]], "read in one way only"
    with pytest.raises(ValueError, match='wants "channels_first" or "channels_last", found \'CHW\''):
        raw(picture, input_data_format="CHW")


@pytest.mark.parametrize("kind", [np.uint32, np.uint64])
def test_long_integers_are_taken_in_range_and_named_beyond(raw, kind):
    assert eight_bits(raw, np.array([[0, 255]], kind))[0, :, 0].tolist() == [0, 255]
    with pytest.raises(ValueError, match="want 0 to 255, found 0 to 256"):
        raw(np.array([[0, 256]], kind))


def test_booleans_are_black_and_white(raw):
    assert eight_bits(raw, np.array([[True, False]])).tolist() == [[[255] * 3, [0] * 3]]


def test_floats_are_taken_as_scaled_already(raw, processor):
    image = rgb_noise(20, 30)
    as_float = image.astype(np.float32) / 255
    assert torch.equal(processor(as_float).pixel_values, processor(image).pixel_values)


def test_without_rescaling_values_are_left_alone():
    processor = EfficientSamImageProcessor(do_resize=False, do_normalize=False, do_rescale=False)
    assert processor(np.array([[-5.0, 300.0]])).pixel_values[0, 0, 0].tolist() == [-5, 300]
    assert processor(np.array([[7, 250]], np.uint8)).pixel_values[0, 0, 0].tolist() == [7, 250]


def test_another_rescale_factor(raw):
    assert raw(np.array([[255]], np.uint8), rescale_factor=1 / 127.5).pixel_values[0, 0, 0, 0] == 2


@pytest.mark.parametrize("kind", ["path", "string", "base64", "data", "url"])
def test_files_text_and_urls(raw, kind, tmp_path, monkeypatch):
    path = tmp_path / "noise.png"
    PIL.Image.fromarray(COLOUR).save(path)
    text = base64.b64encode(path.read_bytes()).decode()
    monkeypatch.setattr(pictures_efficientsam, "urlopen", lambda request, timeout: path.open("rb"))
    sources = {
        "path": path,
        "string": str(path),
        "base64": text,
        "data": f"data:image/png;base64,{text}",
        "url": "https://example.org/noise.png",
    }
    np.testing.assert_array_equal(eight_bits(raw, sources[kind]), COLOUR)


def test_the_callers_array_is_left_alone(processor):
    image = rgb_noise(20, 30)
    before = image.copy()
    processor(image)
    np.testing.assert_array_equal(image, before)


# --------------------------------------------------------------------------------------------------------------------
# Every bad picture


def jpeg(height: int = 40, width: int = 40) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(rgb_noise(height, width)).save(stream, "jpeg")
    return stream.getvalue()


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["missing.jpg", "missing", "abcdefgh"])
def test_a_missing_file(processor, name, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        processor([rgb_noise(5, 5), str(tmp_path / name)])
    assert one_line(error).startswith(f"{tmp_path / name}: no such file")


def test_a_missing_file_whose_name_could_be_base64(processor):
    with pytest.raises(FileNotFoundError, match=r"^abcdefgh: no such file"):
        processor("abcdefgh")


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (jpeg()[:700], "truncated"),
        (b"These are words, not pixels.", "no format that Pillow knows"),
        (b"", "no format that Pillow knows"),
    ],
    ids=["truncated", "text", "empty"],
)
def test_a_file_that_is_no_picture(processor, data, fault, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=fault) as error:
        processor(path)
    assert one_line(error).startswith(f"{path}: cannot be read as a picture: ")


def test_a_truncated_picture_that_was_opened_by_the_user(processor, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg()[:700])
    with pytest.raises(ValueError, match="truncated") as error:
        processor(PIL.Image.open(path))
    assert one_line(error).startswith(str(path))


def test_a_folder(processor, tmp_path):
    with pytest.raises(ValueError, match="cannot be read as a picture") as error:
        processor(tmp_path)
    assert one_line(error).startswith(str(tmp_path))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [1599, 100], ids=["where Pillow warns", "where Pillow refuses"])
@pytest.mark.parametrize("opened", [False, True])
def test_a_decompression_bomb(processor, limit, opened, tmp_path, monkeypatch):
    path = tmp_path / "bomb.jpg"
    path.write_bytes(jpeg(40, 40))
    picture = PIL.Image.open(path) if opened else path
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1600)
    processor(picture)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=r"found 40 x 40 pixels, wanted at most|bomb") as error:
        processor(picture)
    assert one_line(error).startswith(str(path))


@pytest.mark.parametrize(
    "picture",
    [np.zeros((0, 5, 3), np.uint8), np.zeros((5, 0)), torch.zeros(3, 0, 5), PIL.Image.new("RGB", (5, 0))],
)
def test_a_picture_without_pixels(processor, picture):
    with pytest.raises(ValueError, match="image 1: cannot be read as a picture: wanted some pixels, found shape"):
        processor([rgb_noise(4, 4), picture])


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((5, 6, 2), np.uint8), r"wanted 1, 3 or 4 channels first or last, found shape \(5, 6, 2\)"),
        (np.zeros(5, np.uint8), r"two or three dimensions, found shape \(5,\)"),
        ([[1, 2], [3, 4]], "found list"),
        (7, "found int"),
        (np.full((4, 4), 300), "integers of torch.int64 want 0 to 255, found 300 to 300"),
        (np.full((4, 4), -1, np.int16), "want 0 to 255, found -1"),
        (np.full((4, 4), 255.0), "image 0: floats want 0 to 1, found 255 to 255"),
        (np.full((4, 4), -0.1), "floats want 0 to 1, found -0.1"),
        (np.full((4, 4), np.nan), "floats want 0 to 1, found nan"),
        (PIL.Image.fromarray(np.full((4, 4), 70000, np.int32)), "16-bit grey wants 0 to 65535, found 70000"),
        (np.array([["a"]]), "image 0: cannot be read as a picture"),
    ],
)
def test_other_things_that_are_no_picture(processor, picture, message):
    with pytest.raises(ValueError, match=message) as error:
        processor([picture])
    assert one_line(error).startswith("image 0: ")


def test_an_empty_list(processor):
    with pytest.raises(ValueError, match="at least one picture"):
        processor([])


@pytest.fixture
def address(tmp_path):
    """Of a server that gives what lies in a folder."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_url_gives_the_pixels_of_its_file(raw, address, tmp_path):
    PIL.Image.fromarray(np.full((4, 5), 32896, np.uint16)).save(tmp_path / "grey.png")
    assert eight_bits(raw, f"{address}/grey.png").tolist() == eight_bits(raw, tmp_path / "grey.png").tolist()
    assert eight_bits(raw, f"{address}/grey.png").max() == 128


def test_a_url_that_gives_no_picture(processor, address, tmp_path):
    with pytest.raises(ConnectionError, match=r"/no\.jpg: HTTP Error 404: File not found") as error:
        processor(f"{address}/no.jpg")
    assert one_line(error).startswith(address)
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.raises(ValueError, match=r"page\.jpg: cannot be read as a picture: its address gives something else"):
        processor(f"{address}/page.jpg")


def test_a_silent_address_is_given_up(processor, monkeypatch):
    monkeypatch.setattr(pictures_efficientsam, "SILENCE", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ConnectionError, match=r"a\.png: .*timed out"),
    ):
        processor(f"http://127.0.0.1:{silent.getsockname()[1]}/a.png")


def test_without_conversion_only_rgb_is_taken(processor):
    assert processor(PIL.Image.fromarray(COLOUR), do_convert_rgb=False).pixel_values.shape == (1, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match=r"wanted 3 \(do_convert_rgb is off\) channels"):
        processor(PIL.Image.fromarray(COLOUR).convert("L"), do_convert_rgb=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"longest_edge": 64}}, "size wants a height and a width, found {'longest_edge': 64}"),
        ({"mask_interpolation": "nearest"}, 'wants "bicubic" or "bilinear", found \'nearest\''),
        ({"edge_radius": -1}, "edge_radius wants a whole number of cells, 0 or more, found -1"),
        ({"edge_radius": 1.5}, "edge_radius wants a whole number of cells, 0 or more, found 1.5"),
        ({"edge_radius": True}, "edge_radius wants a whole number of cells, 0 or more, found True"),
    ],
)
def test_settings_that_cannot_be_meant(processor, settings, message):
    with pytest.raises(ValueError, match=message):
        EfficientSamImageProcessor(**settings)
    with pytest.raises(ValueError, match=message):
        processor(COLOUR, **settings)


def test_an_unknown_option_is_refused(processor):
    with pytest.raises(TypeError, match="do_pad"):
        processor(COLOUR, do_pad=True)


# --------------------------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize("backend", [None, "pil", "torchvision"])
def test_one_class_serves_both_backends_after_a_reload(backend, tmp_path):
    saved = EfficientSamImageProcessor(size=48, antialias=True, mask_interpolation="bilinear", image_mean=[0.1] * 3)
    saved.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, **({"backend": backend} if backend else {}))
    assert type(loaded) is EfficientSamImageProcessor
    assert loaded.to_dict() == saved.to_dict()
    image = rgb_noise(60, 20)
    assert torch.equal(loaded(image).pixel_values, saved(image).pixel_values)


def test_only_settings_are_saved(tmp_path):
    EfficientSamImageProcessor().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    saved.pop("auto_map", None)
    assert saved == {
        "antialias": False,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "edge_radius": 0,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "EfficientSamImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "mask_interpolation": "bicubic",
        "rescale_factor": 1 / 255,
        "size": {"height": 1024, "width": 1024},
    }


def test_a_setting_can_be_changed_at_loading(tmp_path):
    EfficientSamImageProcessor().save_pretrained(tmp_path)
    assert EfficientSamImageProcessor.from_pretrained(tmp_path, antialias=True, size=64).to_dict()["antialias"] is True


# --------------------------------------------------------------------------------------------------------------------
# Masks on their way out


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_masks_come_back_at_the_pictures_sizes(mode):
    processor = EfficientSamImageProcessor(size=SIDE, mask_interpolation=mode)
    logits = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[20, 50], [64, 48]])
    masks = processor.post_process_masks(logits, sizes)
    assert [tuple(mask.shape) for mask in masks] == [(4, 3, 20, 50), (4, 3, 64, 48)]
    for mask, scores, size in zip(masks, logits, sizes.tolist(), strict=True):
        official = F.interpolate(scores, size, mode=mode) >= 0
        assert mask.dtype == torch.bool
        assert torch.equal(mask, official)


def test_masks_as_lists_arrays_and_logits(processor):
    logits = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sizes = [(20, 50), (64, 48)]
    wanted = processor.post_process_masks(logits, torch.tensor(sizes), binarize=False)
    assert wanted[0].dtype == torch.float32
    for masks in (list(logits), [part.numpy() for part in logits]):
        found = processor.post_process_masks(masks, sizes, binarize=False)
        assert all(map(torch.equal, found, wanted))
    above = processor.post_process_masks(logits, sizes, mask_threshold=0.5)
    assert torch.equal(above[1], wanted[1] >= 0.5)


def test_what_is_not_offered_is_not_ignored(processor):
    logits = torch.zeros(1, 1, 3, 8, 8)
    assert len(processor.post_process_masks(logits, [(9, 9)], reshaped_input_sizes=None, max_hole_area=None)) == 1
    for name, value in {"reshaped_input_sizes": [(8, 8)], "max_hole_area": 3, "max_sprinkle_area": 1.0}.items():
        with pytest.raises(ValueError, match=f"{name} is not offered"):
            processor.post_process_masks(logits, [(9, 9)], **{name: value})


def test_every_picture_wants_masks(processor):
    with pytest.raises(ValueError, match="found 1 masks and 2 sizes"):
        processor.post_process_masks(torch.zeros(1, 1, 3, 8, 8), [(9, 9), (9, 9)])


# --------------------------------------------------------------------------------------------------------------------
# What the mask-generation pipeline calls


def in_the_picture(points: torch.Tensor, crop_box: torch.Tensor) -> torch.Tensor:
    """Clicks in the model's pixels -> in the whole picture's."""
    corner, size = crop_box[:2], crop_box[2:] - crop_box[:2]
    return corner + points / SIDE * size


@pytest.mark.parametrize(("height", "width"), ASPECTS.values(), ids=ASPECTS)
@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("factor", [1, 2])
def test_the_grid_covers_every_crop_and_the_crops_the_picture(processor, height, width, layers, factor):
    image = PIL.Image.fromarray(rgb_noise(height, width))
    boxes, points, crops, labels = processor.generate_crop_boxes(image, SIDE, layers, 512 / 1500, 4, factor)
    count = sum(4**layer for layer in range(layers + 1))
    assert boxes.shape == (count, 4)
    assert points.shape == (1, 16, count, 2)
    assert labels.shape == (1, 16, count)
    assert (labels == 1).all()
    assert points.dtype == boxes.dtype == torch.float32
    for index, (box, crop) in enumerate(zip(boxes, crops, strict=True)):
        left, top, right, bottom = box.int().tolist()
        np.testing.assert_array_equal(crop.movedim(0, -1), np.array(image)[top:bottom, left:right])
        layer = 0 if index == 0 else 1 if index < 5 else 2
        side = 4 // factor**layer
        clicks = in_the_picture(points[0, :, index], box)
        # A crop is cut into side x side cells, and each has a click in its centre.
        cells = ((clicks - box[:2]) / ((box[2:] - box[:2]) / side)).floor().int()
        assert {tuple(cell) for cell in cells.tolist()} == {(x, y) for x in range(side) for y in range(side)}


def test_the_pipelines_crops_are_read_as_the_picture_was(processor):
    image = rgb_noise(48, 64)
    _, _, crops, _ = processor.generate_crop_boxes(PIL.Image.fromarray(image), SIDE, 1)
    batch = processor(images=crops, return_tensors="pt")
    assert torch.equal(batch.pixel_values[:1], processor(image).pixel_values)
    assert batch.original_sizes[0].tolist() == [48, 64]
    corner = image[: batch.original_sizes[1, 0], : batch.original_sizes[1, 1]]
    assert torch.equal(batch.pixel_values[1:2], processor(corner).pixel_values)


def disc(height, width, y, x, radius, inside=8.0, outside=-8.0):
    ys, xs = np.mgrid[:height, :width]
    return torch.from_numpy(np.where((ys - y) ** 2 + (xs - x) ** 2 < radius**2, inside, outside)).float()


def test_filtering_keeps_what_is_trusted_stable_and_whole(processor):
    height, width, box = 100, 200, torch.tensor([50.0, 0.0, 150.0, 100.0])
    good = disc(100, 100, 50, 50, 20)
    masks = torch.stack(
        [
            torch.stack([good, good, disc(100, 100, 50, 50, 20, inside=0.5)]),  # good, distrusted, unstable
            torch.stack(
                [disc(100, 100, 50, 10, 20), disc(100, 100, 0, 50, 20), good * 0 - 8]
            ),  # cut off, at top, none
        ]
    )
    scores = torch.tensor([[0.95, 0.5, 0.9], [0.91, 0.92, 0.99]])
    run_lengths, kept, boxes = processor.filter_masks(masks, scores, (height, width), box)
    assert kept.tolist() == pytest.approx([0.95, 0.92])
    assert boxes.tolist() == [[81, 31, 120, 70], [81, 0, 120, 20]]
    for rle, logits in zip(run_lengths, (good, masks[1, 1]), strict=True):
        assert rle["size"] == [height, width]
        assert isinstance(rle["counts"], list)
        whole = decode_rle(rle)
        assert torch.equal(whole[:, 50:150], logits >= 0)
        assert not whole[:, :50].any()
        assert not whole[:, 150:].any()


def test_filters_can_be_switched_off(processor):
    masks = torch.stack([disc(40, 40, 20, 20, 5, inside=0.0), disc(40, 40, 20, 20, 8)])[None]
    arguments = masks, torch.tensor([[-0.5, 0.1]]), (40, 40), torch.tensor([0.0, 0.0, 40.0, 40.0])
    assert len(processor.filter_masks(*arguments, 0.0, 0.0, 0.0, 1)[0]) == 2
    assert len(processor.filter_masks(*arguments, 0.0, 0.5, 0.0, 1)[0]) == 1
    assert len(processor.filter_masks(*arguments, 0.0, 0.0, 0.1, 1)[0]) == 1


def test_stability_is_asked_only_of_trusted_masks(processor, monkeypatch):
    seen = []

    def counting(logits, *args):
        seen.append(logits.shape)
        return torch.tensor(1.0)

    monkeypatch.setattr("efficientsam_hf.image_processing_efficientsam.stability_score", counting)
    scores = torch.tensor([[0.9, 0.1, 0.2]] * 30)
    masks = disc(8, 8, 4, 4, 2).expand(30, 3, 8, 8)
    processor.filter_masks(masks, scores, (8, 8), torch.tensor([0.0, 0.0, 8.0, 8.0]))
    assert seen == [(8, 8)] * 30


def test_doubles_are_dropped_and_the_rest_sorted(processor):
    discs = [disc(60, 60, 20, 20, 9), disc(60, 60, 20, 21, 9), disc(60, 60, 45, 45, 9)]
    run_lengths = [encode_rle(logits >= 0, compressed=False) for logits in discs]
    scores = torch.tensor([0.90, 0.95, 0.99])
    boxes = torch.tensor([[12, 12, 29, 29], [13, 12, 30, 29], [37, 37, 54, 54]])
    masks, kept, rles, kept_boxes = processor.post_process_for_mask_generation(run_lengths, scores, boxes, 0.7)
    assert kept.tolist() == pytest.approx([0.99, 0.95])
    assert rles == [run_lengths[2], run_lengths[1]]
    assert kept_boxes.tolist() == [[37, 37, 54, 54], [13, 12, 30, 29]]
    assert all(torch.equal(mask, discs[index] >= 0) for mask, index in zip(masks, (2, 1), strict=True))


def test_nothing_survives_cleanly(processor):
    masks = torch.full((4, 3, 40, 40), -8.0)
    box = torch.tensor([0.0, 0.0, 40.0, 40.0])
    for thresholds in [(0.88, 0.95), (0.0, 0.0)]:
        run_lengths, scores, boxes = processor.filter_masks(masks, torch.full((4, 3), 0.5), (40, 40), box, *thresholds)
        assert run_lengths == []
        assert scores.shape == (0,)
        assert boxes.shape == (0, 4)
        both = torch.cat([scores, scores]), torch.cat([boxes, boxes])
        masks_left, scores_left, rles, boxes_left = processor.post_process_for_mask_generation([], *both, 0.7)
        assert (masks_left, rles) == ([], [])
        assert scores_left.shape == (0,)
        assert boxes_left.shape == (0, 4)
