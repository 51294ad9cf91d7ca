"""A DINOv2 vision tower out of an ONNX graph: written as an ordinary Hugging Face folder.

The graph was exported from transformers' own ``Dinov2Model``, so its named tensors already have the
published names. Two kinds have lost theirs and are found by their place in the graph: the linear
layers' weights, which are the transposed right-hand sides of MatMul nodes, and the position table,
which is folded into two constants (the CLS token's row and the grid's rows).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

#: What a Dinov2Model's image processor does; as published with facebook/dinov2-small.
PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,  # bicubic
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

#: Width of one attention head in every published DINOv2; the graph does not tell it plainly.
_HEAD_WIDTH = 64

_PATCHES = "embeddings.patch_embeddings.projection.weight"
_POSITIONS = "embeddings.position_embeddings"


def convert_onnx_dinov2(
    onnx_file: Path, folder: Path, *, name: str, prefix: str = "backbone."
) -> None:
    """Writes the tower of an ONNX graph as a folder that ``AutoModel.from_pretrained`` reads.

    Args:
        onnx_file: a graph exported from a model that holds a Dinov2Model.
        folder: made here: config.json, model.safetensors (float32), preprocessor_config.json.
        name: what the model calls itself in its config.
        prefix: how the names of the tower's tensors begin in the graph.

    Raises:
        ImportError: the onnx package is missing.
        ValueError: the graph holds no DINOv2 tower under this prefix, or not all of it.
    """
    from safetensors.numpy import save_file

    tensors = read_dinov2_tensors(onnx_file, prefix=prefix)
    config = _config_of(tensors) | {"_name_or_path": name}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(
        json.dumps(PREPROCESSOR, indent=2) + "\n", encoding="utf-8"
    )
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    _check_that_it_loads(folder, onnx_file.name)


def read_dinov2_tensors(onnx_file: Path, *, prefix: str = "backbone.") -> dict[str, np.ndarray]:
    """All tensors of the tower, by the names of published DINOv2 checkpoints.

    Args:
        onnx_file: see :func:`convert_onnx_dinov2`.
        prefix: see :func:`convert_onnx_dinov2`; not part of the names returned.

    Raises:
        ImportError: the onnx package is missing.
        ValueError: a weight or the position table cannot be found.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError(
            f"reading {onnx_file.name} needs the onnx package: pip install onnx"
        ) from error
    import numpy as np

    graph = onnx.load(str(onnx_file)).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}

    def array(constant: str) -> np.ndarray:
        return np.ascontiguousarray(numpy_helper.to_array(constants[constant]))

    found = {
        constant.removeprefix(prefix): array(constant)
        for constant in constants
        if constant.startswith(prefix)
    }
    for bias, weight in _matmul_weights(graph, constants).items():
        if bias.startswith(prefix):
            layer = bias.removeprefix(prefix).removesuffix(".bias")
            # A linear layer keeps its weight as [outputs, inputs].
            found[f"{layer}.weight"] = np.ascontiguousarray(array(weight).T)
    if _PATCHES not in found:
        raise ValueError(
            f"{onnx_file.name} has no tensor {prefix + _PATCHES!r}: it holds no DINOv2 tower named "
            f"{prefix!r}; give the prefix its tensors have"
        )
    rows = _position_rows(graph, constants, width=found[_PATCHES].shape[0], prefix=prefix)
    found[_POSITIONS] = np.concatenate([array(row) for row in rows], axis=1)
    return found


def _matmul_weights(graph: Any, constants: dict[str, Any]) -> dict[str, str]:
    """Bias -> weight of each linear layer: the constant a MatMul's result meets in an Add."""
    weight_of = {
        node.output[0]: node.input[1]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in constants
    }
    pairs = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, product in (tuple(node.input), tuple(node.input)[::-1]):
            if product in weight_of and bias in constants:
                pairs[bias] = weight_of[product]
    return pairs


def _position_rows(
    graph: Any, constants: dict[str, Any], *, width: int, prefix: str
) -> tuple[str, str]:
    """Names of the constants [1, 1, width] and [1, grid * grid, width] of the position table.

    Both feed the graph without a name of the model's: the one a Concat, the other the Reshape in
    front of the table's interpolation.
    """
    used_by: dict[str, set[str]] = {}
    for node in graph.node:
        for given in node.input:
            used_by.setdefault(given, set()).add(node.op_type)
    cls, grid = [], []
    for constant, tensor in constants.items():
        shape = tuple(tensor.dims)
        if constant.startswith(prefix) or len(shape) != 3 or shape[::2] != (1, width):
            continue
        if shape[1] == 1 and "Concat" in used_by.get(constant, ()):
            cls.append(constant)
        if shape[1] > 1 and "Reshape" in used_by.get(constant, ()):
            grid.append(constant)
    if len(cls) != 1 or len(grid) != 1 or math.isqrt(n := constants[grid[0]].dims[1]) ** 2 != n:
        raise ValueError(
            f"the graph holds {len(cls)} constants [1, 1, {width}] and {len(grid)} constants "
            f"[1, n, {width}] that could be the position table; exactly one of each is needed (n a "
            "square number): this graph was exported in another way and cannot be read"
        )
    return cls[0], grid[0]


def _config_of(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """The Dinov2Config that the shapes of the tensors tell."""
    width, channels, patch, _ = tensors[_PATCHES].shape
    grid = math.isqrt(tensors[_POSITIONS].shape[1] - 1)
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")}
    hidden = tensors["encoder.layer.0.mlp.fc1.weight"].shape[0]
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // _HEAD_WIDTH,
        "mlp_ratio": hidden // width,
        "image_size": grid * patch,
        "patch_size": patch,
        "num_channels": channels,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "use_mask_token": False,  # only for pre-training; an exported graph has none
        "dtype": "float32",
    }


def _check_that_it_loads(folder: Path, source: str) -> None:
    """Loads the folder once: a tensor without a place, or a place without a tensor, is an error."""
    from transformers import Dinov2Model

    from xtuner_lite.models.modes import without_progress_bars

    with without_progress_bars():
        _, info = Dinov2Model.from_pretrained(str(folder), output_loading_info=True)
    wrong = {
        kind: sorted(map(str, info[kind]))
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(kind)
    }
    if wrong:
        raise ValueError(
            f"the tensors of {source} do not make a whole Dinov2Model: {wrong}; the graph was "
            "exported in another way and cannot be read"
        )
