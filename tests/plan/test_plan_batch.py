import pytest

from lightning_mics.errors import MiCSConfigError
from lightning_mics.plan.batch import divide_batch


def test_a_global_batch_leaves_the_choice_of_micro_batch_and_accumulation():
    assert divide_batch(8, 64, None, None) == [(1, 8), (2, 4), (4, 2), (8, 1)]


def test_what_is_given_decides():
    assert divide_batch(8, 64, 2, None) == [(2, 4)]
    assert divide_batch(8, 64, None, 2) == [(4, 2)]
    assert divide_batch(8, 64, 4, 2) == [(4, 2)]
    assert divide_batch(8, None, 3, 5) == [(3, 5)]
    assert divide_batch(8, None, 3, None) == [(3, 4)]


def test_a_contradiction_shows_the_arithmetic():
    with pytest.raises(MiCSConfigError, match=r"8 ranks x micro_batch=2 x accumulation=3 = 48.*global_batch=48"):
        divide_batch(8, 64, 2, 3)


@pytest.mark.parametrize(
    ("batch", "micro", "accumulation", "shown"),
    [
        (100, None, None, r"100 / 8 = 12.50. Try global_batch=96 or global_batch=104"),
        (4, None, None, r"4 / 8 = 0.50. Try global_batch=8"),
        (64, 3, None, r"8 ranks x micro_batch=3 = 24"),
        (64, None, 3, r"8 ranks x accumulation=3 = 24"),
    ],
)
def test_a_remainder_shows_the_arithmetic_and_what_works(batch, micro, accumulation, shown):
    with pytest.raises(MiCSConfigError, match=shown):
        divide_batch(8, batch, micro, accumulation)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "8"])
def test_numbers_are_whole_and_positive(value):
    with pytest.raises(MiCSConfigError, match="global_batch"):
        divide_batch(8, value, None, None)
