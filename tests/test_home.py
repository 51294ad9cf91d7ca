"""Where things are kept, by environment."""

from xtuner_lite.home import cache_dir, data_cache_dir


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XTUNER_LITE_HOME", str(tmp_path / "a"))
    assert cache_dir() == tmp_path / "a"
    monkeypatch.delenv("XTUNER_LITE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_dir() == tmp_path / "b/xtuner_lite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache/xtuner_lite"


def test_data_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XTUNER_LITE_HOME", str(tmp_path))
    monkeypatch.delenv("XTUNER_LITE_DATA_CACHE", raising=False)
    assert data_cache_dir() == tmp_path / "data"
    monkeypatch.setenv("XTUNER_LITE_DATA_CACHE", str(tmp_path / "big"))
    assert data_cache_dir() == tmp_path / "big"
