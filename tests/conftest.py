"""What several modules of tests start from."""

import pytest

from tests.small import save_small


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Return the folder of a small encoder, random, with as many blocks as the packaged one."""
    return save_small(tmp_path_factory.mktemp("encoder"))
