"""What is recorded and replayed, by a recording that needs no GPU; and a real one where there is a GPU."""

import warnings
from copy import deepcopy

import pytest
import torch

from efficientsam_hf import EfficientSamModel, record_model
from efficientsam_hf.cuda_graphs import MOST_RECORDINGS, Recorded

DEVICE = torch.device("meta")  # no CPU, as what is recorded wants it


class Calls:
    """Records as a graph does: of later calls only the numbers of the tensors are seen."""

    def __init__(self):
        self.recorded, self.replayed = [], 0

    def __call__(self, eager, arguments, inputs):
        self.recorded.append((arguments, inputs))
        answer = eager(*arguments, **inputs)

        def replay(arguments, inputs):
            self.replayed += 1
            return answer

        return replay


def double(values, times=2, **kwargs):
    return {"answer": values * times}["answer"]


@pytest.fixture
def recorded():
    return Recorded(double, Calls())


def numbers(*shape, dtype=None):
    return torch.zeros(shape, device=DEVICE, dtype=dtype)


def test_the_second_call_of_the_same_shapes_is_replayed(recorded):
    with torch.inference_mode():
        for _ in range(3):
            assert recorded(numbers(2, 3)).shape == (2, 3)
        recorded(numbers(2, 3), times=3)
        recorded(numbers(2, 4))
        recorded(numbers(2, 4, dtype=torch.float16))
        recorded(values=numbers(2, 3))
    assert len(recorded.record.recorded) == 5
    assert recorded.record.replayed == 2


def test_a_copy_records_anew():
    class Scale:
        factor = 2

        def scale(self, values):
            return values * self.factor

    one = Scale()
    one.scale = Recorded(one.scale, lambda eager, *_: lambda arguments, inputs: eager(*arguments, **inputs))
    with torch.inference_mode():
        one.scale(numbers(2))
        other = deepcopy(one)
    assert other.scale.eager.__self__ is other
    assert len(one.scale.recordings) == 1
    assert not other.scale.recordings


@pytest.mark.parametrize("around", [torch.enable_grad, lambda: torch.autocast("cuda", torch.bfloat16)])
def test_training_and_autocast_are_not_recorded(recorded, around):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch tells that there is no CUDA to autocast for
        with around():
            recorded.eager = lambda *_, **__: "eager"
            enabled = torch.is_grad_enabled() or torch.is_autocast_enabled("cuda")
            if not enabled:
                pytest.skip("no CUDA to autocast for")
            assert [recorded(numbers(2)), recorded(numbers(2))] == ["eager", "eager"]
    assert not recorded.record.recorded


@pytest.mark.parametrize("inputs", [{"values": torch.zeros(2)}, {"values": numbers(2), "extra": [1]}])
def test_what_cannot_be_replayed_stays_as_it_is(recorded, inputs):
    with torch.inference_mode():
        for _ in range(2):
            assert recorded(**inputs).shape == (2,)
    assert not recorded.record.recorded


def test_the_callers_fault_is_raised_and_not_recorded():
    def refuse(values):
        raise ValueError("never")

    recorded = Recorded(refuse, Calls())
    for _ in range(2):
        with torch.inference_mode(), pytest.raises(ValueError, match="never"):
            recorded(numbers(1))
    assert not recorded.record.recorded
    assert not recorded.failed


def test_a_failure_is_told_once(recorded):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    recorded.record = fail
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="no CUDA graph could be recorded, going on without: .* capturing$"):
            assert recorded(numbers(2)).shape == (2,)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert recorded(numbers(3)).shape == (3,)


def test_the_oldest_recordings_give_way(recorded):
    with torch.inference_mode():
        for size in range(MOST_RECORDINGS + 1):
            recorded(numbers(size))
        assert len(recorded.recordings) == MOST_RECORDINGS
        recorded(numbers(0))
        recorded(numbers(MOST_RECORDINGS))
    assert len(recorded.record.recorded) == MOST_RECORDINGS + 2
    assert recorded.record.replayed == 1


def test_answers_are_in_memory_of_their_own():
    kept = [torch.zeros(2), (torch.ones(1),)]
    recorded = Recorded(lambda values: kept, Calls())
    with torch.inference_mode():
        recorded(numbers(1))
        answer = recorded(numbers(1))
    assert torch.equal(answer[0], kept[0])
    assert answer[0].data_ptr() != kept[0].data_ptr()
    assert answer[1][0].data_ptr() != kept[1][0].data_ptr()


def test_a_model_on_a_cpu_is_refused(model):
    with pytest.raises(ValueError, match="on a CUDA device, got one on cpu"):
        record_model(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("number", range(max(1, torch.cuda.device_count())))
def test_a_recorded_model_answers_as_before(model: EfficientSamModel, number: int):
    device = torch.device("cuda", number)  # the current one is the first
    model = model.to(device)
    pixels = [torch.randn(2, 3, 64, 64, device=device) for _ in range(3)]
    boxes = torch.tensor([[[5.0, 5, 40, 50]]] * 2, device=device)
    with torch.inference_mode():
        wanted = [model(pixel_values=picture, input_boxes=boxes) for picture in pixels]
        record_model(model)
        found = [model(pixel_values=picture, input_boxes=boxes) for picture in pixels]
        embeddings = [model.get_image_embeddings(picture) for picture in pixels]
    for one, other, embedded in zip(found, wanted, embeddings, strict=True):
        assert torch.allclose(one.pred_masks, other.pred_masks, atol=1e-5)
        assert torch.allclose(embedded, other.image_embeddings, atol=1e-5)
