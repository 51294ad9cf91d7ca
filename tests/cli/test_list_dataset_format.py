"""xtuner-lite list-dataset-format."""

import subprocess
import sys

from xtuner_lite.cli.main import main
from xtuner_lite.registry import MAP_FNS


def test_every_format_with_its_signs_and_an_example(capsys):
    assert main(["list-dataset-format"]) == 0
    text = capsys.readouterr().out
    assert len(MAP_FNS.entries()) >= 5
    for name in MAP_FNS.entries():
        assert f"\n{name}  (" in "\n" + text
    assert "alpaca  (recognised by 'instruction' and 'output')\n    Alpaca rows: " in text
    assert '"instruction": "Translate to French."' in text


def test_a_pattern_and_a_plug_in(tmp_path, capsys):
    (tmp_path / "fmt.py").write_text(
        "from xtuner_lite.registry import MAP_FNS\n\n"
        '@MAP_FNS.register_module(name="listed_cards")\n'
        "def listed_cards(row):\n"
        '    """Cards.\n\n    Example row::\n\n        {"front": "x"}\n    """\n'
        "    return row\n"
    )
    assert main(["list-dataset-format", "listed", "--plugin", str(tmp_path / "fmt.py")]) == 0
    text = capsys.readouterr().out
    assert "listed_cards  (to be named: map_fn='listed_cards')\n    Cards.\n" in text
    assert '        {"front": "x"}\n' in text
    assert main(["list-dataset-format", "nothing_like_it"]) == 1


def test_imports_no_torch():
    code = (
        "import sys; from xtuner_lite.cli.main import main; main(['list-dataset-format'])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
