import pytest

from kvcalib.errors import InputError
from kvcalib.evaluation.contender import Unquantized
from kvcalib.evaluation.failures import Failures, reason
from tests.evaluation.contenders import Custom


def test_errors_are_taken_down_and_the_contender_is_out():
    failures, one, other = Failures(), Custom("one"), Custom("other")
    with failures.of(one):
        raise InputError("the field\n is 3, expected 4")
    with failures.of(other):
        pass
    assert failures == {"one": "the field is 3, expected 4"}
    assert failures.standing([one, other]) == [other]


def test_the_unquantized_models_error_is_raised():
    failures = Failures()
    with pytest.raises(ValueError, match="mine"), failures.of(Unquantized()):
        raise ValueError("mine")
    assert not failures


def test_interruptions_are_not_taken_down():
    with pytest.raises(KeyboardInterrupt), Failures().of(Custom("one")):
        raise KeyboardInterrupt


def test_what_users_are_not_meant_to_see_says_where_it_came_from():
    try:
        {}["missing"]
    except KeyError as error:
        said = reason(error)
    assert said.startswith("KeyError: 'missing' (test_failures.py:")
