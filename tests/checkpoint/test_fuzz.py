"""Damaged and hostile files: accepted and right, or refused with a message. Thousands: python tests/fuzz_files.py."""

import pytest

from tests.fuzz_files import KINDS, fuzz


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_case_is_accepted_or_refused(kind, tmp_path):
    outcomes = fuzz(kind, seed=20, cases=120, folder=tmp_path)
    assert outcomes["refused"] > 40, outcomes
    assert outcomes["accepted"] > 0, outcomes
