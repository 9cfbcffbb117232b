"""Damaged and hostile files: accepted and right, or refused with a message. Thousands: python tests/fuzz_files.py."""

import pytest

from tests.fuzz_files import fuzz


@pytest.mark.parametrize(("kind", "cases"), [("native", 120), ("lightning", 60), ("hf", 150)])
def test_every_case_is_accepted_or_refused(kind, cases, tmp_path):
    outcomes = fuzz(kind, seed=20, cases=cases, folder=tmp_path)
    assert outcomes["refused"] > cases / 3, outcomes
    assert outcomes["accepted"] > 0, outcomes
