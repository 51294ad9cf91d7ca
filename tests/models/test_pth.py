import pickle
from collections import OrderedDict

import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from xtuner_lite.models.pth import load_pth, read_pth

RAN = []


def evil(text):
    RAN.append(text)


class Evil:
    def __reduce__(self):
        return (evil, ("ran",))


def net():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def test_a_checkpoint_of_mmengine_gives_its_tensors(tmp_path):
    history = HistoryBuffer([1.0], [1])
    content = {
        "meta": {"epoch": 1, "cfg": "import os", "time": history},
        "message_hub": {"log": {"loss": history}},
        "state_dict": OrderedDict(net().state_dict()),
    }
    torch.save(content, tmp_path / "iter_1.pth")
    tensors = read_pth(tmp_path / "iter_1.pth")
    assert list(tensors) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert torch.equal(tensors["0.weight"], content["state_dict"]["0.weight"])


def test_nothing_that_a_pickle_names_is_run(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "meta": Evil()}, tmp_path / "evil.pth")
    tensors = read_pth(tmp_path / "evil.pth")
    assert torch.equal(tensors["w"], torch.ones(2))
    assert RAN == []
    with (tmp_path / "plain.pth").open("wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint of torch"):
        read_pth(tmp_path / "plain.pth")
    assert RAN == []


def test_what_does_not_fit_is_told(tmp_path):
    model = net()
    torch.save({"0.weight": torch.ones(3, 3), "extra": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"missing: 0.bias; missing: 1.bias; missing: 1.weight;"):
        load_pth(model, tmp_path / "a.pth")
    torch.save({"module." + k: v + 1 for k, v in net().state_dict().items()}, tmp_path / "b.pth")
    assert load_pth(model, tmp_path / "b.pth") == 4
    with pytest.raises(FileNotFoundError):
        read_pth(tmp_path / "none.pth")
