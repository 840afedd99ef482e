"""Exported folders answer as the model does, whatever the number of pictures, prompts and slots."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from conftest import make_model, tiny_config
from synthetic import make_folder, scene_files
from typer.testing import CliRunner

from efficientsam_cli import app
from efficientsam_hf import (
    EfficientSamProcessor,
    SegmentationStream,
    load_checkpoint,
    save_for_hub,
    segment,
    segment_everything,
)
from efficientsam_hf.export import writing
from efficientsam_hf.export.checking import agreement, difference, verdict
from efficientsam_hf.exported.manifest import checksum
from efficientsam_hf.exported.model import ExportedEfficientSam
from efficientsam_hf.networks import MaskDecoder, SegmentationAnswer, SegmentationNetwork
from efficientsam_hf.training.extension import extend_prompts

pytest.importorskip("onnxscript")
SLOTS = 6
EVERYTHING = {"points_per_side": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def tiny():
    return make_model(tiny_config())


@pytest.fixture(scope="module")
def tiny_processor(tiny):
    return EfficientSamProcessor.from_model_config(tiny.config)


@pytest.fixture(scope="module")
def folder(tiny, tiny_processor, tmp_path_factory) -> Path:
    """An ONNX folder, written by the command."""
    room = tmp_path_factory.mktemp("export")
    save_for_hub(tiny, tiny_processor, room / "model")
    result = run("export", room / "model", "--to", "onnx", "--output", room / "exported")
    assert result.exit_code == 0, result.output
    assert "mask_iou: mean IoU 1.0000" in result.output
    return room / "exported"


@pytest.fixture(scope="module")
def exported(folder):
    return ExportedEfficientSam(folder, threads=1)


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_manifest(folder, **changes):
    content = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps({**content, **changes}))


def test_folder_says_what_it_is(folder):
    manifest = json.loads((folder / "export.json").read_text())
    assert (manifest["format"], manifest["dtype"], manifest["opset"]) == ("onnx", "float32", 20)
    wanted = {"vision_encoder.onnx", "mask_decoder.onnx", "config.json", "processor_config.json"}
    assert wanted <= set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"export.json"}
    assert manifest["graphs"]["mask_decoder"]["inputs"] == ["image_embeddings", "input_points", "input_labels"]
    assert max(manifest["check"][name] for name in ("image_embeddings", "iou_scores", "pred_masks")) < 1e-3
    assert manifest["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(("batch", "queries", "points"), [(1, 1, 1), (3, 2, 5), (1, 7, SLOTS), (2, 1, 3)])
def test_any_number_of_pictures_prompts_and_slots(tiny, exported, batch, queries, points):
    generator = torch.Generator().manual_seed(batch)
    inputs = {
        "pixel_values": torch.randn(batch, 3, 64, 64, generator=generator),
        "input_points": torch.rand(batch, queries, points, 2, generator=generator) * 64,
        "input_labels": torch.randint(-1, 2, (batch, queries, points), generator=generator),
    }
    with torch.inference_mode():
        wanted, found = tiny(**inputs), exported(**inputs)
    for name in ("image_embeddings", "iou_scores", "pred_masks"):
        assert getattr(found, name).shape == getattr(wanted, name).shape
        assert difference(getattr(found, name), getattr(wanted, name)) < 1e-3


def test_weights_with_more_slots_than_they_are_padded_to(tiny, tmp_path):
    model = copy.deepcopy(tiny).train()
    extend_prompts(model, negative_points=True, max_prompt_points=12)
    writing.export_model(
        model, EfficientSamProcessor.from_model_config(model.config), tmp_path / "exported", to="torch-export"
    )
    assert model.training, "it may be in the middle of a training"
    exported, generator = ExportedEfficientSam(tmp_path / "exported"), torch.Generator().manual_seed(0)
    embeddings = model.eval().get_image_embeddings(torch.randn(2, 3, 64, 64, generator=generator)).detach()
    for slots in (1, 4, 6, 7, 12):
        points = torch.rand(2, 3, slots, 2, generator=generator) * 64
        labels = torch.randint(-1, 2, (2, 3, slots), generator=generator)
        inputs = {"image_embeddings": embeddings, "input_points": points, "input_labels": labels}
        wanted, found = model(**inputs), exported(**inputs, original_sizes=[[60, 80]] * 2)
        assert difference(found.iou_scores, wanted.iou_scores.detach()) < 1e-4
        assert difference(found.pred_masks, wanted.pred_masks.detach()) < 1e-3


def test_nothing_is_answered_with_nothing_and_one_mask_where_one_is_wanted(tiny, exported):
    with torch.inference_mode():
        embeddings = tiny.get_image_embeddings(torch.zeros(1, 3, 64, 64))
        for given in ({"input_boxes": torch.zeros(1, 0, 4)}, {"input_points": torch.full((1, 2, 1, 2), 30.0)}):
            for several in (True, False):
                inputs = {**given, "image_embeddings": embeddings, "multimask_output": several}
                wanted, found = tiny(**inputs), exported(**inputs)
                assert found.pred_masks.shape == wanted.pred_masks.shape
                torch.testing.assert_close(found.iou_scores, wanted.iou_scores, atol=1e-4, rtol=1e-3)
    assert exported.get_image_embeddings(torch.zeros(0, 3, 64, 64)).shape == (0, 16, 4, 4)


def test_halves_are_exported_as_what_the_manifest_says(tiny_processor, tmp_path):
    """As the bundled weights are stored; and each file holds its own part of the weights alone."""
    config = tiny_config()
    config.mask_decoder_config.num_hidden_layers = 1  # for the time that tracing takes
    half = make_model(config).half()
    manifest = writing.export_model(half, tiny_processor, tmp_path / "new", to="torch-export")
    assert (manifest.dtype, half.dtype) == ("float32", torch.float16)
    with pytest.raises(ValueError, match="torch has one number of threads for all, found threads=3"):
        ExportedEfficientSam(tmp_path / "new", threads=3)
    parts = {name: set(torch.export.load(tmp_path / "new" / f"{name}.pt2").state_dict) for name in manifest.graphs}
    assert all("mask_decoder" not in key for key in parts["vision_encoder"])
    assert all("vision_encoder" not in key for key in parts["mask_decoder"])


@pytest.mark.parametrize(
    "prompts",
    [
        {"points": [[24, 20]]},
        {"boxes": [[10, 8, 40, 30], [50, 28, 74, 44]]},
        {"points": [[[24, 20]] * 4, None], "boxes": [[10, 8, 40, 30], [50, 28, 74, 44]]},
        {"points": [[[24, 20]] * 6, None], "boxes": [None, [50, 28, 74, 44]]},  # padding beyond the slots
    ],
)
def test_segment_takes_a_folder_in_the_place_of_a_model(tiny, tiny_processor, exported, photo, prompts):
    wanted = segment(tiny, tiny_processor, photo, **prompts)
    found = segment(exported, tiny_processor, photo, **prompts)
    assert agreement(found.masks.float() - 0.5, wanted.masks.float() - 0.5) > 0.999
    again = segment(exported, tiny_processor, photo, **prompts, image_embeddings=found.image_embeddings)
    assert torch.equal(again.masks, found.masks)
    rounded = segment(exported, tiny_processor, photo, **prompts, image_embeddings=found.image_embeddings.half())
    assert rounded.image_embeddings.dtype == torch.float32


def test_a_folder_answers_empty_lists_with_no_objects(tiny_processor, exported, photo):
    for answer in (
        segment(exported, tiny_processor, photo, boxes=[]),
        *SegmentationStream(exported, tiny_processor)([(photo, {"boxes": []})]),
    ):
        assert answer.masks.shape == (0, 3, 48, 80)


def test_segment_everything_takes_one_too(tiny, tiny_processor, exported, photo):
    wanted = segment_everything(tiny, tiny_processor, photo, **EVERYTHING)
    found = segment_everything(exported, tiny_processor, photo, **EVERYTHING)
    assert len(found) == len(wanted) > 0
    for record, other in zip(found, wanted, strict=True):
        assert record["predicted_iou"] == pytest.approx(other["predicted_iou"], abs=1e-4)
        assert record["area"] == pytest.approx(other["area"], abs=3)


def test_both_offer_what_is_asked_of_a_network(tiny, exported, pixels):
    for network in (tiny, exported):
        assert isinstance(network, SegmentationNetwork)
        assert isinstance(network.mask_decoder, MaskDecoder)
        with torch.inference_mode():
            answer = network(pixel_values=pixels, input_boxes=torch.tensor([[[5.0, 5, 30, 30]]] * 2))
        assert isinstance(answer, SegmentationAnswer)
    cells = 16
    assert exported.mask_decoder.bytes_per_prompt(cells) > 0


def test_a_folder_cannot_be_converted_back(folder, tmp_path):
    result = run("convert", folder, tmp_path / "official.pt")
    assert result.exit_code == 2
    assert "holds an exported model, wanted the model folder" in result.output


def test_commands_take_a_folder(folder, photo, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo).save("photo.png")
    result = run("predict", "photo.png", "--box", "10,8,40,30", "--model", folder, "--output", "o.png")
    assert result.exit_code == 0, result.output
    result = run("everything", "photo.png", "--model", folder, "--points-per-side", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output
    Path("photos").mkdir()
    Image.fromarray(photo).save("photos/photo.png")
    result = run("label", "photos", "--model", folder, "--points-per-side", 2, "--output", "labels")
    assert result.exit_code == 0, result.output


def test_a_folder_is_evaluated_as_the_model_is(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(Path("pairs"), scene_files(2))
    found = {}
    for name, source in {"exported": folder, "model": folder.parent / "model"}.items():
        options = ["--images", "pairs", "--protocol", "sam", "--prompts", "1", "--output", f"{name}.json"]
        result = run("evaluate", "points", *options, "--model", source, *(["--device", "cpu"] * (name == "model")))
        assert result.exit_code == 0, result.output
        (found[name],) = json.loads(Path(f"{name}.json").read_text())["results"]
    assert found["exported"]["model"]["parameters"] == found["model"]["model"]["parameters"]
    assert found["exported"]["model"]["weights_sha256"] != found["model"]["model"]["weights_sha256"]
    scores = [found[name]["protocols"][0]["at"]["1"]["miou"] for name in found]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


@pytest.mark.parametrize(("devices", "wanted"), [("cuda:1", {"device_id": "1"}), ("cuda", {})])
def test_a_second_gpu_is_named_to_the_provider(folder, monkeypatch, devices, wanted):
    asked = {}

    def session(path, options, providers, provider_options):
        asked.update(zip(providers, provider_options, strict=True))
        return SimpleNamespace(get_providers=lambda: providers)

    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    ExportedEfficientSam(folder, devices=devices)
    assert asked == {"CUDAExecutionProvider": wanted}


def test_missing_and_altered_files_are_named(copied):
    content = (copied / "mask_decoder.onnx").read_bytes()
    (copied / "mask_decoder.onnx").write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match=r"mask_decoder.onnx: is not the file that was exported"):
        load_checkpoint(copied)
    (copied / "mask_decoder.onnx").unlink()
    with pytest.raises(ValueError, match=r"wanted the file mask_decoder.onnx, found none"):
        load_checkpoint(copied)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json"])
def test_altered_settings_are_named_as_altered_graphs_are(copied, name):
    (copied / name).write_text((copied / name).read_text() + "\n")
    with pytest.raises(ValueError, match=f"{name}: is not the file that was exported"):
        load_checkpoint(copied)


def test_other_runtimes_are_named(copied):
    import onnx

    with pytest.raises(ValueError, match=r"no provider CUDAExecutionProvider here, found .*CPUExecutionProvider"):
        load_checkpoint(copied, device="cuda")
    with pytest.raises(ValueError, match="keeps its dtype"):
        load_checkpoint(copied, dtype="float16")
    path = copied / "vision_encoder.onnx"
    graph = onnx.load(path)
    graph.opset_import[0].version = 99
    onnx.save(graph, path)
    files = {name: checksum(copied / name) for name in ("vision_encoder.onnx", "mask_decoder.onnx")}
    edit_manifest(copied, files=files, opset=99)
    with pytest.raises(ValueError, match=r"vision_encoder.onnx: made for opset 99 .*, and onnxruntime .* cannot load"):
        load_checkpoint(copied)
    edit_manifest(copied, format="tensorflow")
    with pytest.raises(ValueError, match="found format 'tensorflow', wanted one of onnx"):
        load_checkpoint(copied)
    edit_manifest(copied, layout=2)
    with pytest.raises(ValueError, match="layout 2, which a later efficientsam-hf wrote"):
        load_checkpoint(copied)
    (copied / "export.json").write_text("{")
    with pytest.raises(ValueError, match=r"export.json: wanted the page of an exported folder"):
        load_checkpoint(copied)


def test_pictures_of_another_size_are_named(exported):
    with pytest.raises(ValueError, match=r"must be \(B, 3, 64, 64\), got \(1, 3, 64, 32\)"):
        exported(pixel_values=torch.zeros(1, 3, 64, 32), input_points=torch.zeros(1, 1, 1, 2))
    with pytest.raises(ValueError, match="got neither"):
        exported(input_points=torch.zeros(1, 1, 1, 2))
    with pytest.raises(ValueError, match=r"input_boxes must be \(1, 2, 4\), got \(1, 3, 4\)"):
        exported(torch.zeros(1, 3, 64, 64), input_points=torch.zeros(1, 2, 1, 2), input_boxes=torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="got no prompt"):
        exported(pixel_values=torch.zeros(1, 3, 64, 64))


@pytest.fixture
def written_already(folder, monkeypatch):
    """Exports write the graphs of `folder` again, without tracing the model."""
    graphs = {
        name: SimpleNamespace(file=folder / graph["file"], inputs=graph["inputs"], outputs=graph["outputs"])
        for name, graph in json.loads((folder / "export.json").read_text())["graphs"].items()
    }
    monkeypatch.setattr(writing, "trace", lambda model: graphs)
    monkeypatch.setitem(writing.FORMATS, "onnx", (".onnx", lambda graph, path: shutil.copy(graph.file, path)))


def test_what_differs_is_refused_and_leaves_nothing(tiny_processor, tmp_path, written_already):
    other = make_model(tiny_config(), seed=1)
    with pytest.raises(ValueError, match="not exported: image_embeddings differ from torch's by up to"):
        writing.export_model(other, tiny_processor, tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quantize", ["dynamic", "static"])
def test_eight_bits(tiny, tiny_processor, folder, photo, tmp_path, written_already, quantize):
    new = tmp_path / "new"
    manifest = writing.export_model(tiny, tiny_processor, new, quantize=quantize, calibration=[photo] * 2)
    assert manifest.quantization == quantize
    assert manifest.check["mask_iou"] > 0.9
    assert (new / "vision_encoder.onnx").stat().st_size < 0.9 * (folder / "vision_encoder.onnx").stat().st_size
    assert (new / "mask_decoder.onnx").read_bytes() == (folder / "mask_decoder.onnx").read_bytes()
    graph = onnx.load(new / "vision_encoder.onnx").graph
    weights = [onnx.numpy_helper.to_array(part) for part in graph.initializer if part.name.endswith("_quantized")]
    matrices = [weight for weight in weights if weight.dtype == np.int8 and weight.ndim == 2]
    assert len(matrices) >= 12, "six linear layers in each of two blocks"
    # Products of more would be cut off by processors without VNNI.
    assert max(int(abs(matrix.astype(int)).max()) for matrix in matrices) <= 64
    answer = segment(ExportedEfficientSam(new, threads=1), tiny_processor, photo, points=[[24, 20]])
    assert answer.masks.shape == (1, 3, 48, 80)


def test_verdicts():
    exact = dict.fromkeys(("image_embeddings", "iou_scores", "pred_masks"), 1e-5) | {"mask_iou": 0.99}
    assert verdict(exact, "float32", None) is None
    assert "pred_masks differ" in verdict({**exact, "pred_masks": 2e-3}, "float32", None)
    assert "image_embeddings differ" in verdict({**exact, "image_embeddings": float("nan")}, "float32", None)
    far = {**exact, "pred_masks": 0.5}
    assert verdict(far, "float16", None) is None
    assert "0.940, wanted at least 0.95" in verdict({**far, "mask_iou": 0.94}, "float16", None)
    assert verdict({**far, "mask_iou": 0.91}, "float32", "dynamic") is None
    assert "wanted at least 0.9" in verdict({**far, "mask_iou": 0.5}, "float32", "static")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "caffe"], "found format 'caffe', wanted one of onnx"),
        (["--dtype", "int4"], "found dtype 'int4'"),
        (["--dtype", "bfloat16"], "wanted float32 or float16 for ONNX"),
        (["--quantize", "half"], "found quantization 'half', wanted dynamic or static"),
        (["--quantize", "static"], "wants pictures to look at (--calibration FOLDER)"),
        (["--to", "torch-export", "--quantize", "dynamic"], "is offered for onnx"),
        (["--to", "osam", "--quantize", "dynamic"], "--to osam writes float32"),
        (["--calibration", "."], "--calibration is for --quantize static alone"),
        (["--photo", "nowhere.jpg"], "nowhere.jpg: no such file"),
        (["--quantize", "static", "--pictures", "0"], "Invalid value for '--pictures'"),
    ],
)
def test_what_is_not_offered_is_said_before_the_work(tmp_path, arguments, message):
    result = run("export", "--output", tmp_path / "new", *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_missing_package_is_named(tiny, tiny_processor, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ValueError, match=r"export to OpenVINO wants openvino, found none"):
        writing.FORMATS["openvino"][1](None, tmp_path / "graph.xml")


@pytest.mark.parametrize("by_stability", [False, True])
def test_example_needs_no_torch(copied, tiny, tiny_processor, photo, tmp_path, monkeypatch, by_stability):
    import subprocess
    import sys

    import numpy as np
    from conftest import REPOSITORY
    from PIL import Image

    Image.fromarray(photo).save(tmp_path / "photo.png")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "rank_by_stability": by_stability}))
    monkeypatch.setattr(tiny.config, "rank_by_stability", by_stability)
    script = REPOSITORY / "examples" / "onnx_without_torch.py"
    arguments = [
        str(copied),
        str(tmp_path / "photo.png"),
        "--box",
        "50,28,74,44",
        "--output",
        str(tmp_path / "mask.png"),
    ]
    blocked = "import sys, runpy; sys.modules.update(torch=None, transformers=None, efficientsam_hf=None); sys.argv = "
    code = f"{blocked}{[str(script), *arguments]!r}; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.array(Image.open(tmp_path / "mask.png")) > 0
    wanted = segment(tiny, tiny_processor, photo, boxes=[50, 28, 74, 44]).masks[0, 0].numpy()
    assert (found & wanted).sum() / (found | wanted).sum() > 0.9
