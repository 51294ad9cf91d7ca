"""New tokens get rows that train, are saved, and are found again by plain peft."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoHaConfig, LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import tiny_batch, tiny_llama, tiny_tokenizer
from xtuner_lite.methods.sft import SupervisedFinetune
from xtuner_lite.models.adapters import add_adapter
from xtuner_lite.models.loading import load_causal_lm, load_tokenizer
from xtuner_lite.models.new_tokens import fit_embeddings, new_token_ids

TOKENS = ["<act>", "<place>"]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


@pytest.fixture(params=[0, 8], ids=["no spare rows", "spare rows"])
def base(request, tied, tmp_path):
    """A model with exactly as many rows as tokens, or a few more."""
    tokenizer = tiny_tokenizer()
    rows = len(tokenizer) + request.param
    tiny_llama(tie_word_embeddings=tied, vocab_size=rows).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained_one_step(base, **options):
    tokenizer = load_tokenizer(base, new_tokens=TOKENS)
    method = SupervisedFinetune(load_causal_lm(base), tokenizer=tokenizer, **options)
    ids = tokenizer("Go to <place> and <act> now")["input_ids"]
    assert set(new_token_ids(tokenizer)) < set(ids)
    method(tiny_batch([[ids, [*ids, *ids]]])).loss_sum.backward()
    torch.optim.SGD(method.trainable_parameters().values(), lr=0.05).step()
    return method.eval(), tokenizer, torch.tensor([ids])


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_with_new_tokens_opens_in_plain_peft(base, tied, tmp_path):
    method, tokenizer, ids = trained_one_step(base, lora=LoraConfig(r=2))
    rows = {n: p for n, p in method.trainable_parameters().items() if "lora_" not in n}
    assert [tuple(p.shape) for p in rows.values()] == [(2, 32)] * (1 if tied else 2)
    assert all(p.grad is not None for p in rows.values())
    method.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = method.llm(ids).logits
        plain = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))(ids).logits
        ours = load_causal_lm(base, adapter=tmp_path / "adapter")(ids).logits
    num_tokens = len(tokenizer)  # peft cuts spare rows off
    torch.testing.assert_close(plain[..., :num_tokens], expected[..., :num_tokens])
    torch.testing.assert_close(ours, expected)
    reopened = AutoTokenizer.from_pretrained(str(tmp_path / "adapter"))
    assert reopened("<act>")["input_ids"] == tokenizer("<act>")["input_ids"]
    assert reopened.decode(reopened("<act>")["input_ids"], skip_special_tokens=True) == "<act>"


@pytest.mark.filterwarnings("ignore")
def test_training_goes_on_from_such_an_adapter(base, tmp_path):
    method, _, ids = trained_one_step(base, lora=LoraConfig(r=2))
    method.save_pretrained(tmp_path / "adapter")
    tokenizer = load_tokenizer(base, new_tokens=TOKENS)
    again = SupervisedFinetune(load_causal_lm(base), tokenizer=tokenizer, lora=LoraConfig(r=2))
    again.load_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(again.eval().llm(ids).logits, method.llm(ids).logits)


def test_all_weights_trained_with_new_tokens(base, tmp_path):
    method, tokenizer, ids = trained_one_step(base)
    method.save_pretrained(tmp_path / "model")
    saved = AutoModelForCausalLM.from_pretrained(str(tmp_path / "model"))
    assert saved.config.vocab_size >= len(tokenizer)
    torch.testing.assert_close(saved(ids).logits, method.llm(ids).logits)


def test_a_new_row_begins_as_the_mean_of_its_pieces(base):
    tokenizer = load_tokenizer(base, new_tokens=["<act>"])
    model = load_causal_lm(base)
    old = model.get_input_embeddings().weight.detach().clone()
    pieces = tiny_tokenizer()("<act>")["input_ids"]
    fit_embeddings(model, tokenizer)
    new = model.get_input_embeddings().weight
    torch.testing.assert_close(new[len(tokenizer) - 1], old[pieces].mean(0))
    assert torch.equal(new[: len(old) - 8], old[: len(old) - 8])
    assert len(new) == max(len(old), len(tokenizer))


def test_whole_embeddings_may_be_trained_instead(base, tied):
    tokenizer = load_tokenizer(base, new_tokens=TOKENS)
    names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    method = SupervisedFinetune(
        load_causal_lm(base), tokenizer=tokenizer, lora=LoraConfig(r=2, modules_to_save=names)
    )
    assert not any("trainable_tokens" in name for name in method.trainable_parameters())


def test_mistakes_are_told(base):
    with pytest.raises(ValueError, match="'<|im_end|>' is in the vocabulary already"):
        load_tokenizer(base, new_tokens=["<|im_end|>"])
    with pytest.raises(ValueError, match="' ' is empty"):
        load_tokenizer(base, new_tokens=[" "])
    with pytest.raises(ValueError, match="LoHaConfig cannot train.*modules_to_save=.'embed_tokens"):
        add_adapter(tiny_llama(), LoHaConfig(r=2), new_token_ids=[3])
