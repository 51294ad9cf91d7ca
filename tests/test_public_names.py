"""The names users import from the top."""

import xtuner_lite


def test_every_public_name_resolves():
    assert len(xtuner_lite.__all__) == 13
    for name in xtuner_lite.__all__:
        assert getattr(xtuner_lite, name) is not None
    assert set(xtuner_lite.__all__) <= set(dir(xtuner_lite))
