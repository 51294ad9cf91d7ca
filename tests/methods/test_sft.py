"""SFT: the loss is the model's own, however samples are packed, padded, chunked or accumulated."""

import math

import pytest
import torch
from peft import LoraConfig
from torch.nn.functional import cross_entropy

from tests.tiny import tiny_batch, tiny_llama, tiny_segments, tiny_tokenizer
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.packed_forward import packed_hidden_states
from xtuner_lite.registry import MODELS

SEGMENTS = tiny_segments(7, 5, 9)


def method(lora=None, seed=0, model=None, **options):
    torch.manual_seed(seed)  # of the adapter's weights
    lora = LoraConfig(r=4, init_lora_weights=False) if lora is True else lora
    return SupervisedFinetune(model or tiny_llama(), lora=lora, **options)


def loss_and_gradients(sft, batches):
    """Sum of the losses and name -> gradient, over all batches."""
    sft.zero_grad()
    total = 0.0
    for batch in batches:
        out = sft(batch)
        out.loss_sum.backward()
        total += out.loss_sum.item()
    return total, {name: p.grad.clone() for name, p in sft.trainable_parameters().items()}


def assert_same(ours, theirs, atol=2e-5):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, theirs[1][name], atol=atol, rtol=1e-4)


def plain_loss_and_gradients(sft, segments, num_prompt=2):
    """The same by the model's own forward and full logits, one segment at a time."""
    sft.zero_grad()
    total = 0.0
    for segment in segments:
        logits = sft.llm(input_ids=torch.tensor([segment])).logits[0]
        targets = torch.tensor(segment[num_prompt:])
        loss = cross_entropy(logits[num_prompt - 1 : -1], targets, reduction="sum")
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in sft.trainable_parameters().items()}


@pytest.mark.parametrize("lora", [None, True])
@pytest.mark.parametrize("tied", [True, False])
def test_equals_the_models_own_loss_and_gradients(lora, tied):
    sft = method(lora, model=tiny_llama(tie_word_embeddings=tied))
    ours = loss_and_gradients(sft, [tiny_batch([SEGMENTS])])
    assert_same(ours, plain_loss_and_gradients(sft, SEGMENTS))


@pytest.mark.parametrize("lora", [None, True])
def test_packed_unpacked_and_padded_agree(lora):
    sft = method(lora)
    packed = loss_and_gradients(sft, [tiny_batch([SEGMENTS])])
    unpacked = loss_and_gradients(sft, [tiny_batch([[s]]) for s in SEGMENTS])
    padded = loss_and_gradients(sft, [tiny_batch([[s] for s in SEGMENTS])])
    assert_same(packed, unpacked)
    assert_same(packed, padded)


def test_plain_sdpa_and_eager_agree_with_packed_attention():
    batches = [tiny_batch([SEGMENTS[:2], SEGMENTS[2:]])]
    packed = loss_and_gradients(method(), batches)
    for attn in ("sdpa", "eager"):
        assert_same(packed, loss_and_gradients(method(model=tiny_llama(attn=attn)), batches))


def test_accumulation_is_linear():
    """8 x 1 = 1 x 8 = 4 x 2: sums of micro-batches, so the split changes nothing."""
    sft = method(True)
    segments = tiny_segments(4, 9, 5, 7, 3, 8, 6, 11)
    whole = loss_and_gradients(sft, [tiny_batch([[s] for s in segments])])
    ones = loss_and_gradients(sft, [tiny_batch([[s]]) for s in segments])
    pairs = loss_and_gradients(
        sft, [tiny_batch([[a], [b]]) for a, b in zip(segments[::2], segments[1::2], strict=True)]
    )
    assert_same(whole, ones)
    assert_same(whole, pairs)


@pytest.mark.parametrize("lora", [None, True])
def test_activation_checkpointing_changes_nothing(lora):
    batches = [tiny_batch([SEGMENTS])]
    off = loss_and_gradients(method(lora), batches)
    on = loss_and_gradients(method(lora, activation_checkpointing=True), batches)
    assert_same(off, on, atol=0)


def test_activation_checkpointing_keeps_fewer_tensors():
    batch = tiny_batch([tiny_segments(40, 40)])

    def kept(sft):
        sizes = []
        pack, unpack = (lambda t: sizes.append(t.numel()) or t), (lambda t: t)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            packed_hidden_states(
                sft.llm, batch["input_ids"], batch["position_ids"], batch["cu_seqlens"]
            )
        return sum(sizes)

    assert kept(method(activation_checkpointing=True)) < 0.5 * kept(method())


@pytest.mark.parametrize("head", ["chunked", "model"])
@pytest.mark.parametrize("head_chunk_tokens", [1, 4, 512])
def test_every_head_gives_the_same(head, head_chunk_tokens):
    batches = [tiny_batch([SEGMENTS])]
    options = {"head": head, "head_chunk_tokens": head_chunk_tokens}
    assert_same(
        loss_and_gradients(method(**options), batches), loss_and_gradients(method(), batches)
    )


def test_loss_by_hand():
    """With the head's weight at 0 all 384 tokens are equally likely: ln 384 per target."""
    model = tiny_llama(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    out = method(model=model)(tiny_batch([tiny_segments(5, 4)]))  # 3 + 2 targets
    assert out.loss_sum.item() == pytest.approx(5 * math.log(384))
    assert out.num_units == 5


def test_loss_weights_scale_losses_and_units():
    batch = tiny_batch([SEGMENTS])
    sft = method()
    plain, halved = sft(batch), sft({**batch, "loss_weights": torch.full((1, 21), 0.5)})
    torch.testing.assert_close(halved.loss_sum, plain.loss_sum * 0.5)
    assert (plain.num_units, halved.num_units) == (15.0, 7.5)


def test_token_accuracy_counts_the_likeliest_token():
    segment = SEGMENTS[0]
    model = tiny_llama()
    predicted = model(torch.tensor([segment])).logits[0].argmax(-1).tolist()
    batch = tiny_batch([[segment]])
    batch["labels"][0, 3] = predicted[2]  # the label after position 2 is what the model says there
    metrics = method(model=model)(batch).metrics
    correct, count = metrics["token_accuracy"]
    expected = sum(
        p == t for p, t in zip(predicted[1:-1], batch["labels"][0, 2:].tolist(), strict=True)
    )
    assert (int(correct), count) == (expected, 5)
    assert correct >= 1


@pytest.mark.parametrize("lora", [None, True])
@pytest.mark.parametrize("attn", ["packed_sdpa", "sdpa"])
def test_a_batch_without_targets_gives_zero_loss_and_zero_gradients(lora, attn):
    sft = method(lora, model=tiny_llama(attn=attn))
    batch = tiny_batch([SEGMENTS])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert sft.count_units(batch) == 0
    out = sft(batch)
    assert (out.loss_sum.item(), out.num_units) == (0.0, 0.0)
    out.loss_sum.backward()
    for name, parameter in sft.trainable_parameters().items():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("lora", [None, True])
def test_bf16_autocast_is_close_and_computes_the_loss_in_float32(lora):
    sft = method(lora)
    exact = sft(tiny_batch([SEGMENTS])).loss_sum
    with torch.autocast("cpu", torch.bfloat16):
        out = sft(tiny_batch([SEGMENTS]))
    assert out.loss_sum.dtype == torch.float32
    assert out.loss_sum.item() == pytest.approx(exact.item(), rel=0.01)
    out.loss_sum.backward()
    for name, parameter in sft.trainable_parameters().items():
        assert parameter.grad.abs().sum() > 0, name


def test_the_self_check_under_autocast_cuts_no_gradient():
    """A cast cached without a graph would leave the weights without gradient in the first step."""
    with torch.autocast("cpu", torch.bfloat16):
        sft = method()
        out = sft(tiny_batch([SEGMENTS]))
    out.loss_sum.backward()
    assert all(p.grad is not None and p.grad.any() for p in sft.trainable_parameters().values())


def test_bf16_adapter_step_is_the_same_with_and_without_the_spared_casts(monkeypatch):
    from contextlib import nullcontext

    def step():
        sft = method(True, model=tiny_llama().bfloat16(), self_check=False)
        with torch.autocast("cpu", torch.bfloat16):
            return loss_and_gradients(sft, [tiny_batch([SEGMENTS])])

    spared = step()
    monkeypatch.setattr("xtuner_lite.methods.sft.without_input_casts", lambda model: nullcontext())
    loss, gradients = step()
    assert spared[0] == loss
    assert all(torch.equal(gradients[name], value) for name, value in spared[1].items())


def test_another_loss_is_a_two_line_subclass():
    class LabelSmoothing(SupervisedFinetune):
        def token_loss(self, logits, targets):
            return cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)

    sft = LabelSmoothing(tiny_llama())
    out = sft(tiny_batch([SEGMENTS[:1]]))
    logits = sft.llm(torch.tensor(SEGMENTS[:1])).logits[0, 1:-1]
    expected = cross_entropy(
        logits, torch.tensor(SEGMENTS[0][2:]), reduction="sum", label_smoothing=0.1
    )
    torch.testing.assert_close(out.loss_sum, expected)


def test_builds_from_a_config():
    sft = MODELS.build(
        {
            "type": "SupervisedFinetune",
            "llm": {"type": tiny_llama, "num_layers": 1},
            "lora": {"type": LoraConfig, "r": 2},
            "tokenizer": tiny_tokenizer(),
        }
    )
    assert sft.has_adapter
    assert len(sft.llm.get_base_model().model.layers) == 1
    assert all("lora_" in name for name in sft.trainable_parameters())
    assert all(p.dtype == torch.float32 for p in sft.trainable_parameters().values())


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="head is 'fast'; allowed: 'chunked', 'model'"):
        method(head="fast")
    with pytest.raises(ValueError, match="head_chunk_tokens is 0"):
        method(head_chunk_tokens=0)
    with pytest.raises(TypeError, match="must be a transformers model or a config with a type"):
        SupervisedFinetune({"path": "x"})
    with pytest.raises(ValueError, match="the model 100 embeddings"):
        method(model=tiny_llama(vocab_size=100), tokenizer=tiny_tokenizer())


@pytest.mark.slow  # importing the compiler takes half a minute
def test_a_compiled_decoder_gives_the_same_for_changing_segments():
    """Graph capture only (backend='eager'): segments of another batch must not be baked in."""
    plain, compiled = method(), method()
    compiled.llm.model.compile(backend="eager", dynamic=True)
    for batch in (tiny_batch([SEGMENTS]), tiny_batch([tiny_segments(4, 11, 3, 3)])):
        assert_same(loss_and_gradients(compiled, [batch]), loss_and_gradients(plain, [batch]))
