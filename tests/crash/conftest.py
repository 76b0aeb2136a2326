"""One process to fork from, and one road, for all tests of crashes."""

from __future__ import annotations

import sys

import pytest

from tests.crash.road import Road
from tests.crash.stem import Stem


@pytest.fixture(scope="session")
def road(tmp_path_factory):
    if not sys.platform.startswith("linux"):
        pytest.skip("forks, pidfds and mounts as Linux has them")
    stem = Stem()
    yield Road(tmp_path_factory.mktemp("road"), stem)
    stem.close()
