"""A pruned model, and a folder that holds it."""

import pytest

import prunewise as pw
from tests.files import pruned


@pytest.fixture(scope="module")
def example():
    return pruned()


@pytest.fixture
def saved(tmp_path, example):
    """A folder with a pruned model."""
    pw.save_pruned(tmp_path / "small", *example)
    return tmp_path / "small"
