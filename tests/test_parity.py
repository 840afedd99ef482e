"""The authors' implementation's answers, number by number: its own weights, pictures and prompts."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from efficientsam_hf import VARIANTS, EfficientSamConfig, EfficientSamModel, EfficientSamProcessor
from efficientsam_hf.conversion import from_official

FIXTURE = Path(__file__).parent / "fixtures" / "official_micro.safetensors"
CASES = ["one_point", "two_points", "box", "box_and_point", "ragged_queries", "label_zero", "eight_points"]
MICRO = EfficientSamConfig(
    vision_config={
        "image_size": 128,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "output_channels": 32,
    },
    prompt_encoder_config={"hidden_size": 32},
    mask_decoder_config={
        "hidden_size": 32,
        "num_attention_heads": 4,
        "mlp_dim": 64,
        "upscaling_channels": [16, 8],
        "iou_head_hidden_dim": 32,
    },
)


def micro_fixture():
    tensors = load_file(FIXTURE)
    weights = {
        key.removeprefix("checkpoint."): value for key, value in tensors.items() if key.startswith("checkpoint.")
    }
    answers = {key.removeprefix("answer."): value for key, value in tensors.items() if key.startswith("answer.")}
    return MICRO, weights, answers


def golden(shared: Path, variant: str):
    """Reproducible weights of a released size, and the answers that the official code gave with them."""
    spec = importlib.util.spec_from_file_location("make_checkpoint", shared / "golden" / "make_checkpoint.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    keys = maker.json.loads((shared / "golden" / f"checkpoint_keys_{variant}.json").read_text())
    configs = {
        "micro": MICRO,
        "ti": EfficientSamConfig(vision_config=VARIANTS["tiny"]),
        "s": EfficientSamConfig(vision_config=VARIANTS["small"]),
    }
    weights = {key: maker.value(key, shape, 0) for key, shape in keys.items()}
    return configs[variant], weights, load_file(shared / "golden" / f"golden_{variant}.safetensors")


@pytest.fixture(
    scope="module",
    params=["fixture", "micro", "ti", pytest.param("s", marks=pytest.mark.slow)],
)
def official(request):
    """The model with the official weights, its processor, the answers, and the embeddings of each picture."""
    if request.param == "fixture":
        config, weights, answers = micro_fixture()
    else:
        from conftest import SHARED

        if not SHARED.is_dir():
            pytest.skip(f"needs the golden answers in {SHARED} (or EFFICIENTSAM_SHARED)")
        config, weights, answers = golden(SHARED, request.param)
    model = EfficientSamModel(config).eval()
    model.load_state_dict(from_official(weights))
    processor = EfficientSamProcessor.from_model_config(config)
    with torch.no_grad():
        embeddings = {
            name: model.get_image_embeddings(processor.image_processor(image.numpy())["pixel_values"])
            for name, image in answers.items()
            if "." not in name
        }
    return model, processor, answers, embeddings


def test_embeddings(official):
    _, _, answers, embeddings = official
    for name, found in embeddings.items():
        wanted = answers[f"{name}.embeddings"]
        # Stored in half precision the released sizes' answers are off by up to half of their last bit, 2^-11.
        tolerance = {"atol": 1e-3, "rtol": 2**-11} if wanted.dtype == torch.float16 else {"atol": 1e-4, "rtol": 0}
        assert_close(found, wanted.float(), **tolerance)


def slots(answers, name, case):
    """Points in the model's pixels, the official way: the rest after six is cut off, whatever is negative is -1."""
    height, width = answers[name].shape[:2]
    points = answers[f"{name}.{case}.points"][:, :, :6]
    return points, answers[f"{name}.{case}.labels"][:, :, :6], (height, width)


def summary(masks):
    flat = masks.flatten(-2)
    return torch.stack([flat.mean(-1), flat.std(-1), flat.amax(-1), flat.amin(-1)], dim=-1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("output", ["multi", "single"])
def test_masks_and_scores(official, case, output):
    model, _, answers, embeddings = official
    model.config.mask_decoder_config.single_mask_token = output == "single"
    side = model.config.vision_config.image_size
    for name, embedding in embeddings.items():
        points, labels, (height, width) = slots(answers, name, case)
        scaled = points * torch.tensor([side / width, side / height])
        with torch.no_grad():
            outputs = model(
                image_embeddings=embedding,
                input_points=scaled,
                input_labels=labels,
                multimask_output=output == "multi",
            )
        key = f"{name}.{case}.{output}"
        assert_close(outputs.iou_scores, answers[f"{key}.iou"], atol=1e-3, rtol=0)
        wanted = answers.get(f"{key}.low_res")
        if wanted is not None:
            assert_close(outputs.pred_masks, wanted, atol=1e-3 * float(wanted.std()), rtol=0)
        else:
            wanted = answers[f"{key}.low_res.stats"]
            assert_close(summary(outputs.pred_masks), wanted, atol=1e-3 * float(wanted[..., 1].min()), rtol=1e-3)


@pytest.mark.parametrize("case", ["one_point", "two_points", "box", "box_and_point", "ragged_queries"])
def test_from_the_photo_to_the_photo(official, case):
    """The whole way through the processor: a picture and prompts in its pixels, logits at its size."""
    model, processor, answers, embeddings = official
    model.config.mask_decoder_config.single_mask_token = False
    for name, embedding in embeddings.items():
        wanted = answers.get(f"{name}.{case}.full_res")
        if wanted is None:
            continue
        points, labels, size = slots(answers, name, case)
        boxes = None
        if case.startswith("box"):
            boxes, points, labels = points[:, :, :2].flatten(-2), points[:, :, 2:], labels[:, :, 2:]
        prompts = {"input_points": points, "input_labels": labels} if points.shape[2] else {}
        inputs = processor(original_sizes=[size], input_boxes=boxes, **prompts)
        sizes = inputs.pop("original_sizes")
        with torch.no_grad():
            masks = model(image_embeddings=embedding, **inputs).pred_masks
        logits = processor.post_process_masks(masks, sizes, binarize=False)[0]
        found = logits[:, : wanted.shape[2]]
        assert_close(found, wanted[0], atol=1e-3 * float(wanted.std()), rtol=1e-4)
