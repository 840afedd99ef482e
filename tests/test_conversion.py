import os
import pickle
import zipfile

import pytest
import torch
from conftest import make_model, tiny_config
from test_parity import MICRO, micro_fixture

from efficientsam_hf import VARIANTS, EfficientSamConfig, EfficientSamModel
from efficientsam_hf.conversion import (
    convert,
    from_official,
    read_config,
    read_official,
    save_official,
    to_official,
)


@pytest.fixture
def official() -> dict[str, torch.Tensor]:
    return micro_fixture()[1]


@pytest.fixture
def checkpoint(tmp_path, official):
    torch.save({"model": official}, tmp_path / "efficient_sam_micro.pt")
    return tmp_path / "efficient_sam_micro.pt"


def test_every_tensor_of_either_layout_has_its_place_in_the_other(official):
    assert from_official(official).keys() == EfficientSamModel(MICRO).state_dict().keys()
    assert to_official(from_official(official)).keys() == official.keys()


def test_there_and_back_is_bit_equal(checkpoint, official, tmp_path):
    save_official(convert(checkpoint, MICRO), tmp_path / "back.pt")
    back = read_official(tmp_path / "back.pt")
    assert all(torch.equal(back[key], official[key]) for key in official)
    assert not list(tmp_path.glob("*.part"))


def test_a_config_that_the_official_layout_does_not_tell_is_named(tmp_path):
    for fields, words in (
        ({"window_size": 14}, "window_size: found 14, it is read as 0"),
        ({"image_size": 512}, "image_size: found 512, it is read as 1024"),
    ):
        config = EfficientSamConfig(vision_config={**VARIANTS["tiny"], "num_hidden_layers": 1, **fields})
        with pytest.raises(ValueError, match=f"an official file has no place for {words}"):
            save_official(EfficientSamModel(config), tmp_path / "back.pt")
    assert not list(tmp_path.iterdir())


def test_released_zip(checkpoint, tmp_path, official):
    with zipfile.ZipFile(tmp_path / "efficient_sam_micro.pt.zip", "w") as archive:
        archive.write(checkpoint, "weights/efficient_sam_micro.pt")
        archive.writestr("__MACOSX/weights/._efficient_sam_micro.pt", b"junk")
    found = read_official(tmp_path / "efficient_sam_micro.pt.zip")
    assert all(torch.equal(found[key], official[key]) for key in official)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_is_read_from_the_shapes(variant):
    wanted = EfficientSamConfig(vision_config=VARIANTS[variant])
    with torch.device("meta"):
        official = to_official(EfficientSamModel(wanted).state_dict())
    assert read_config(official).to_dict() == wanted.to_dict()


def test_sizes_that_were_never_released_need_a_config(checkpoint):
    with pytest.raises(ValueError, match=r"\[192, 384, 768\] wide, got image_encoder.pos_embed \(1, 197, 48\)"):
        convert(checkpoint)


def test_what_the_official_model_lacks_cannot_go_back():
    with pytest.raises(ValueError, match=r"has no place for 'prompt_encoder.background'"):
        to_official(make_model(tiny_config(negative_points=True)).state_dict())


class Bomb:
    """A pickle that leaves a trace when it is executed."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_pickle_is_executed(tmp_path):
    trace = tmp_path / "executed"
    torch.save({"model": Bomb(str(trace))}, tmp_path / "bomb.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(str(trace))))
    for name in ("bomb.pt", "plain.pt"):
        with pytest.raises(ValueError, match="no checkpoint of plain tensors"):
            read_official(tmp_path / name)
        assert not trace.exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert trace.exists(), "the bomb itself must work, or the test proves nothing"


def test_other_files_are_refused_in_one_line(tmp_path, checkpoint, official):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:5000])
    torch.save(official, tmp_path / "flat.pt")
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pt")
    torch.save({"model": {"image_encoder.pos_embed": torch.zeros(1, 197, 192)}}, tmp_path / "partial.pt")
    messages = {
        "missing.pt": "no checkpoint at",
        "text.pt": "no checkpoint of plain tensors",
        "cut.pt": "no checkpoint of plain tensors",
        "flat.pt": r'must hold \{"model": state_dict\}, got a dict with the keys',
        "other.pt": "got no image_encoder.pos_embed",
        "partial.pt": "not an EfficientSAM checkpoint of this size: Missing key",
    }
    for name, message in messages.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            convert(tmp_path / name)
        assert "\n" not in str(error.value)


def test_foreign_keys_are_named():
    with pytest.raises(ValueError, match=r"got 1 others, such as 'head.weight'"):
        from_official({"head.weight": torch.zeros(1)})
