"""For all tests: prepared data sets are kept in a folder of the test session."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _data_cache(tmp_path_factory):
    before = os.environ.get("XTUNER_LITE_DATA_CACHE")
    os.environ["XTUNER_LITE_DATA_CACHE"] = str(tmp_path_factory.mktemp("data_cache"))
    yield
    if before is None:
        del os.environ["XTUNER_LITE_DATA_CACHE"]
    else:
        os.environ["XTUNER_LITE_DATA_CACHE"] = before
