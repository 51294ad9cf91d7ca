"""Loss sums, derived by hand and against the full computation."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.tiny import tiny_batch, tiny_segments
from xtuner_lite.methods.functional import (
    chunked_head_loss,
    count_target_tokens,
    drop_unsupervised_segments,
    find_targets,
    token_cross_entropy,
)

LN2, LN3 = math.log(2), math.log(3)


def identity(hidden):
    return hidden.float()


def test_token_cross_entropy_by_hand():
    # softmax([0, ln 3]) = [1/4, 3/4]: -ln(3/4) = ln 4 - ln 3 for target 1, ln 4 for target 0
    logits = torch.tensor([[0.0, LN3], [0.0, LN3]])
    losses = token_cross_entropy(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(losses, torch.tensor([2 * LN2 - LN3, 2 * LN2]))


def test_chunked_loss_by_hand():
    # The head is the identity, so the hidden states are the logits. Losses: ln 2, ln 4 - ln 3.
    hidden = torch.tensor([[0.0, 0.0], [0.0, LN3]], requires_grad=True)
    loss, correct = chunked_head_loss(
        hidden, identity, torch.tensor([1, 1]), weights=torch.tensor([1.0, 2.0]), chunk_tokens=1
    )
    torch.testing.assert_close(loss.detach(), torch.tensor(LN2 + 2 * (2 * LN2 - LN3)))
    assert correct == 1  # argmax of the tie is class 0, of the second class 1
    loss.backward()
    # softmax - one-hot, times the weight: [1/2, -1/2] and 2 * [1/4, -1/4]
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.5, -0.5], [0.5, -0.5]]))


@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 100])
@pytest.mark.parametrize("trains_head", [True, False])
def test_chunked_equals_full(chunk_tokens, trains_head):
    torch.manual_seed(0)
    hidden = torch.randn(7, 8, requires_grad=True)
    head = torch.nn.Linear(8, 11).requires_grad_(trains_head)
    targets, weights = torch.randint(0, 11, (7,)), torch.rand(7)
    full = (cross_entropy(head(hidden), targets, reduction="none") * weights).sum()
    (full * 0.5).backward()
    expected = [p.grad.clone() for p in (hidden, *head.parameters()) if p.requires_grad]
    hidden.grad = None
    head.zero_grad()
    parameters = [p for p in head.parameters() if p.requires_grad]
    loss, _ = chunked_head_loss(
        hidden, head, targets, head_parameters=parameters, weights=weights,
        chunk_tokens=chunk_tokens,
    )  # fmt: skip
    torch.testing.assert_close(loss, full)
    (loss * 0.5).backward()
    for parameter, gradient in zip([hidden, *parameters], expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_full_logits_never_exist():
    seen = []

    def head(hidden):
        seen.append(len(hidden))
        return hidden.float()

    hidden = torch.randn(10, 4, requires_grad=True)
    chunked_head_loss(hidden, head, torch.zeros(10, dtype=torch.int64), chunk_tokens=4)
    assert seen == [4, 4, 2]


def test_without_grad_nothing_is_kept():
    hidden = torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        loss, _ = chunked_head_loss(hidden, identity, torch.tensor([0, 1, 2]))
    assert loss.grad_fn is None


def test_bf16_head_sums_gradients_in_float32():
    """600 chunks of gradient 1/512 to a bf16 weight: in bf16 the sum would stall at 0.5."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    hidden = torch.full((600, 1), 1 / 512)

    def head(chunk):
        return chunk * weight.float()

    loss, _ = chunked_head_loss(
        hidden, head, torch.zeros(600, dtype=torch.int64), head_parameters=[weight],
        token_loss=lambda logits, targets: logits[:, 0], chunk_tokens=1,
    )  # fmt: skip
    loss.backward()
    assert weight.grad.item() == pytest.approx(600 / 512, rel=0.01)


def test_mismatched_lengths_are_refused():
    with pytest.raises(ValueError, match="2 hidden states and 1 targets"):
        chunked_head_loss(torch.zeros(2, 3), identity, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        chunked_head_loss(
            torch.zeros(1, 3), identity, torch.zeros(1, dtype=torch.int64), chunk_tokens=0
        )


def test_find_targets_and_count_by_hand():
    labels = torch.tensor([[-100, 5, -100, 7], [8, -100, 9, -100]])
    # Row 1 starts with a label (8), which no position of its row predicts.
    at, targets, weights = find_targets(labels, torch.arange(8.0).reshape(2, 4))
    assert at.tolist() == [0, 2, 5]
    assert targets.tolist() == [5, 7, 9]
    assert weights.tolist() == [1.0, 3.0, 6.0]
    assert count_target_tokens({"labels": labels}) == 3
    weighted = {"labels": labels, "loss_weights": torch.arange(8.0).reshape(2, 4)}
    assert count_target_tokens(weighted) == 10.0
    assert labels[1, 0] == 8  # the batch itself is left alone


def test_unsupervised_segments_are_dropped():
    batch = tiny_batch([tiny_segments(3, 4), tiny_segments(2, seed=1)], num_prompt=2)
    batch["loss_weights"] = torch.ones(2, 7)
    # Row 0: 3 tokens (1 label), 4 tokens (2 labels). Row 1: 2 tokens (no label), 5 of padding.
    row = drop_unsupervised_segments(batch)
    assert row["cu_seqlens"].tolist() == [0, 3, 7]
    assert row["input_ids"].tolist() == batch["input_ids"][:1].tolist()
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert row["loss_weights"].shape == (1, 7)


def test_a_batch_without_labels_keeps_one_segment():
    batch = tiny_batch([tiny_segments(2, 2)], num_prompt=2)
    assert drop_unsupervised_segments(batch)["cu_seqlens"].tolist() == [0, 2]
