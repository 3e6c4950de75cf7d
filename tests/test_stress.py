"""A short stress run. What it is made of is tested in tests/launch/test_train.py."""

import pytest

from tests import stress


@pytest.mark.slow
@pytest.mark.parametrize("family", ["in_context", "lp_ft"])
def test_a_short_stress_run_ends_with_the_same_bits(family):
    assert stress.main(["--kills", "3", "--families", family, "--streams", "device"]) == 0
