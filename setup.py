"""Installs xtuner_lite; the configs/ folder is installed as the package xtuner_lite.configs."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "xtuner_lite/version.py").read_text())[1]
CONFIG_PACKAGES = ["xtuner_lite.configs"] + [
    f"xtuner_lite.configs.{name}"
    for name in find_namespace_packages("configs")
    if "__pycache__" not in name
]
EXTRAS = {
    "demo": [
        "gguf>=0.17",  # reads the demo's language model
        "onnx>=1.16",  # reads the vision tower of the demo with images
        "scikit-learn>=1.5",  # its handwritten digits
    ],
    "qlora": ["bitsandbytes>=0.48"],
    "deepspeed": ["deepspeed>=0.18"],
    "serve": ["fastapi>=0.162", "uvicorn>=0.30"],
    "tensorboard": ["tensorboard>=2.18"],
    "wandb": ["wandb>=0.19"],
    "mlflow": ["mlflow>=3"],
    "swanlab": ["swanlab>=0.6"],
    "modelscope": ["modelscope>=1.25"],
    "web": ["gradio>=6.27,<7"],
}
EXTRAS["dev"] = [
    "pytest>=8",
    "ruff>=0.9",
    "codespell>=2.3",
    "pre-commit>=4",
    *EXTRAS["demo"],
    *EXTRAS["qlora"],
    *EXTRAS["deepspeed"],
    *EXTRAS["serve"],
    "openai>=3",  # its client speaks to the server in the tests
    *EXTRAS["tensorboard"],
    *EXTRAS["web"],
    "selenium>=4.30",  # the tests of the page that click in a browser
]

setup(
    name="xtuner_lite",
    version=VERSION,
    description="Fine-tune language and vision-language models from Python config files",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["xtuner_lite", "xtuner_lite.*"]), *CONFIG_PACKAGES],
    package_dir={"xtuner_lite.configs": "configs"},
    package_data={"": ["*.jinja", "*.json", "*.html"]},
    install_requires=[
        "mmengine>=0.10.7",
        "torch>=2.10",
        "transformers>=5.3,<6",
        "peft>=0.18",
        "datasets>=4",
        "accelerate>=1.10",
        "safetensors>=0.5",
        "tokenizers>=0.22",
        "sentencepiece>=0.2",
        "pillow>=12.3",
        "rich>=13",
        "matplotlib>=3.8",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["xtuner-lite=xtuner_lite.cli.main:console_main"]},
)
