"""Artifacts that several files of tests read."""

import functools

import pytest

from tests.runtime.talk import CASES, make


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """`case(name)`: the model, the artifact and the rotations of one of `CASES`, made once."""

    @functools.cache
    def get(name):
        return make(tmp_path_factory.mktemp("case"), *CASES[name], outliers=0.03)

    return get
