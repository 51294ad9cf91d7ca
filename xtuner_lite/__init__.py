"""xtuner_lite: fine-tune language and vision-language models from Python config files."""

from xtuner_lite.version import __version__

__all__ = ["__version__"]
