"""Pieces of work on several threads: the results, the order and the number of torch's threads of one thread."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, get_ident

import pytest
import torch

from efficientsam_hf.cpu_threads import map_on_threads


@pytest.fixture
def four_threads(set_threads):
    set_threads(4)


def test_results_come_in_order(four_threads):
    with map_on_threads(2) as mapped:
        assert list(mapped(lambda piece: piece * 2, range(100))) == list(range(0, 200, 2))


def test_pieces_are_done_at_one_time(four_threads):
    """Each waits until the other has begun."""
    both = Barrier(2, timeout=30)
    with map_on_threads(2) as mapped:
        idents = list(mapped(lambda _: (both.wait(), get_ident())[1], range(2)))
    assert len(set(idents)) == 2


@pytest.mark.parametrize(("most", "each"), [(1, 4), (2, 2), (3, 1), (4, 1), (9, 1)])
def test_torch_threads_are_divided_among_the_pieces_alone(four_threads, most, each):
    product = torch.ones(400, 400)
    with map_on_threads(most) as mapped:
        assert set(mapped(lambda _: (product @ product, torch.get_num_threads())[1], range(8))) == {each}
        assert torch.get_num_threads() == 4
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == 4
    assert torch.get_num_threads() == 4


def test_one_thread_is_the_plain_map(four_threads):
    torch.set_num_threads(1)
    with map_on_threads(4) as mapped:
        assert mapped is map


def test_a_second_caller_has_the_plain_map(four_threads):
    with map_on_threads(2), map_on_threads(2) as mapped:
        assert mapped is map
    with map_on_threads(2) as mapped:
        assert mapped is not map


@pytest.mark.parametrize("in_work", [True, False])
def test_an_error_gives_the_threads_back_and_drops_what_waits(four_threads, in_work):
    done = []

    def work(piece):
        done.append(piece)
        if in_work and piece == 3:
            raise ArithmeticError("three")
        return piece

    def take():
        with map_on_threads(2) as mapped:
            for piece in mapped(work, range(1000)):
                if piece == 3:
                    raise ArithmeticError("three")

    with pytest.raises(ArithmeticError, match="three"):
        take()
    assert torch.get_num_threads() == 4
    assert len(done) < 20
    with map_on_threads(2) as mapped:
        assert mapped is not map


def test_few_results_wait_to_be_taken(four_threads):
    begun = []
    with map_on_threads(2) as mapped:
        for taken, _ in enumerate(mapped(begun.append, range(50)), start=1):
            assert len(begun) <= taken + 4


def test_threads_compute_as_the_one_that_asks(four_threads):
    weight = torch.ones(2, 2, requires_grad=True)

    def product(piece):
        return weight @ piece

    with torch.autocast("cpu", torch.bfloat16), map_on_threads(2) as mapped:
        answers = list(mapped(product, [torch.ones(2, 2)] * 4))
    assert all(answer.dtype == torch.bfloat16 and answer.is_inference() for answer in answers)
    with map_on_threads(2) as mapped:
        assert next(mapped(product, [torch.ones(2, 2)])).dtype == torch.float32
