import pytest
import torch
from torch import nn

from xtuner_lite.engine.checkpoint import CheckpointError
from xtuner_lite.engine.optim import OptimWrapper
from xtuner_lite.engine.pieces import (
    Piece,
    PieceReader,
    copy_to_cpu,
    load_optimizer_pieces,
    load_parameter_groups,
    optimizer_pieces,
    parameter_groups,
    write_pieces,
)


def net():
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))


def built(module, kind="AdamW"):
    wrapper = OptimWrapper(dict(type=kind, lr=0.1))
    return wrapper.build(module)


def step(module, optimizer):
    (module(torch.ones(2, 3)) ** 2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adafactor", "RMSprop"])
def test_a_state_written_and_read_continues_bit_for_bit(tmp_path, kind):
    torch.manual_seed(0)
    first, second = net(), net()
    optimizer, again = built(first, kind), built(second, kind)
    step(first, optimizer)
    write_pieces(tmp_path, 0, copy_to_cpu(optimizer_pieces(optimizer)))
    load_parameter_groups(again, parameter_groups(optimizer))
    load_optimizer_pieces(again, PieceReader(tmp_path))
    for _ in range(3):
        step(first, optimizer), step(second, again)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def cut(values, *bounds):
    return [
        Piece("w", (4, 2), begin, end, {"weight": values[begin:end], "m": -values[begin:end]},
              {"step": torch.tensor(3.0)})
        for begin, end in bounds
    ]  # fmt: skip


def test_any_range_is_read_across_the_pieces_of_ranks(tmp_path):
    values = torch.arange(8.0)
    for rank, piece in enumerate(cut(values, (0, 3), (3, 4), (4, 8))):
        write_pieces(tmp_path, rank, [piece])
    reader = PieceReader(tmp_path)
    for start, stop in ((0, 8), (2, 5), (3, 3), (4, 8), (7, 8)):
        piece = reader.piece("w", (4, 2), start, stop)
        assert torch.equal(piece.tensors["weight"], values[start:stop])
        assert torch.equal(piece.tensors["m"], -values[start:stop])
        assert piece.scalars["step"].dtype == torch.float32
        assert piece.scalars["step"] == 3


def test_a_lost_piece_another_shape_and_another_name_are_told(tmp_path):
    first, _, last = cut(torch.arange(8.0), (0, 3), (3, 4), (4, 8))
    write_pieces(tmp_path, 0, [first, last])
    reader = PieceReader(tmp_path)
    with pytest.raises(CheckpointError, match="elements 3 to 8 of weight w are missing"):
        reader.piece("w", (4, 2), 1, 8)
    with pytest.raises(CheckpointError, match=r"weight w has shape \(4, 2\), the model needs"):
        reader.piece("w", (2, 4), 0, 8)
    with pytest.raises(CheckpointError, match="weight v is missing"):
        reader.piece("v", (4, 2), 0, 8)


def test_state_in_blocks_is_not_cut(tmp_path):
    piece = cut(torch.arange(8.0), (0, 8))[0]
    piece.opaque = {"absmax": torch.ones(2)}
    write_pieces(tmp_path, 0, [piece])
    reader = PieceReader(tmp_path)
    assert torch.equal(reader.piece("w", (4, 2), 0, 8).opaque["absmax"], torch.ones(2))
    with pytest.raises(CheckpointError, match="kept in blocks and cannot be cut"):
        reader.piece("w", (4, 2), 0, 4)


def test_groups_of_another_model_are_refused():
    with pytest.raises(CheckpointError, match="the saved optimizer has 1 parameter groups"):
        load_parameter_groups(built(nn.Linear(1, 1)), parameter_groups(built(net())))
