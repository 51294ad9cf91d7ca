"""An export against what it was made from: logits, greedy tokens, rendered template, stop ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xtuner_lite.export.publish import ExportError
from xtuner_lite.structures import Message
from xtuner_lite.templates import ChatTemplate, RowRefused, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What is asked of both sides. Short: each prompt is one row of a forward pass.
PROMPTS = ("Who are you?", "What is the capital of France?", "请介绍一下你自己。", "1 + 1 =")

#: Largest difference of any logit that rounding the weights may cause, in standard deviations of
#: the logits. float32: the order of sums. bf16 keeps 8 bits of a weight: 0.07 measured on the demo
#: model and its adapter, times three; fp16 keeps 11, an eighth of that. A layer merged wrongly is
#: off by 1 and more.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 2.5e-2, torch.bfloat16: 0.2}

Forward = Callable[[Tensor], Tensor]
"""int64 [B, T] token ids -> float [B, T, V] logits."""


@dataclass(frozen=True)
class Answers:
    """What a model said to the prompts.

    Args:
        prompts: token ids, one list per prompt.
        tokens: the greedy tokens that follow, the same number for each prompt.
        logits: float32 [T_i - 1, V] for each prompt with its tokens, of every position but the
            last one.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: list[Tensor]


@dataclass
class Comparison:
    """How far an export is from its source."""

    num_prompts: int
    num_new_tokens: int
    max_logit_difference: float
    logit_std: float
    tolerance: float
    """Of max_logit_difference / logit_std."""
    tokens_equal: bool
    near_ties: list[str] = field(default_factory=list)
    """Where another token came first, but by less than the tolerance."""
    problems: list[str] = field(default_factory=list)
    """Why the export may not be published; empty when it may."""

    def to_dict(self) -> dict[str, Any]:
        """For the receipt."""
        return asdict(self)

    def check(self) -> None:
        """Raises ExportError where the export is beyond its tolerance."""
        if self.problems:
            raise ExportError(
                "the export does not answer like its source, so nothing was published: "
                + "; ".join(self.problems)
            )


def prompt_ids(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> list[list[int]]:
    """Token ids of PROMPTS, through the chat template where there is one.

    Without a tokenizer: fixed ids of the vocabulary.
    """
    if tokenizer is None:
        return [[(7919 * (i + 1) * (j + 3)) % vocab_size for j in range(8)] for i in range(4)]
    ids = []
    for text in PROMPTS:
        row = []
        if getattr(tokenizer, "chat_template", None):
            try:
                row = ChatTemplate(tokenizer).prompt_ids([{"role": "user", "content": text}])
            except RowRefused:
                row = []
        row = row or list(tokenizer(text)["input_ids"])
        ids.append([i for i in row if i < vocab_size] or [0])
    return ids


@torch.no_grad()
def greedy_answers(forward: Forward, prompts: list[list[int]], num_new_tokens: int) -> Answers:
    """The tokens a model would greedily add, past any stop token, and all its logits.

    With a CachedForward each prompt is read once. Any other forward sees all rows again for each
    token; they are filled up on the right, where a causal model does not look.
    """
    if isinstance(forward, CachedForward):
        pairs = [forward.continued(prompt, num_new_tokens) for prompt in prompts]
        return Answers(prompts, [tokens for tokens, _ in pairs], [logits for _, logits in pairs])
    rows = [list(prompt) for prompt in prompts]
    found: list[Tensor] = []
    for _ in range(num_new_tokens):
        found = _run(forward, rows)
        for row, logits in zip(rows, found):
            row.append(int(logits[-1].argmax()))
    tokens = [row[len(prompt) :] for row, prompt in zip(rows, prompts)]
    return Answers(prompts, tokens, found)


class CachedForward:
    """A loaded model's forward pass, with neither mask nor padding, and its cache.

    Args:
        model: a causal language model, or one with an adapter on it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next(p.device for p in model.parameters())

    def __call__(self, ids: Tensor) -> Tensor:
        """float [B, T, V] of int64 [B, T]."""
        return self.model(input_ids=ids.to(self.device), use_cache=False).logits

    def continued(
        self, prompt: list[int], num_new_tokens: int, forced: list[int] | None = None
    ) -> tuple[list[int], Tensor]:
        """(greedy tokens, float32 [len(prompt) + num_new_tokens - 1, V] logits).

        With ``forced``, those tokens follow the prompt whatever the model says.
        """
        ids, cache, tokens, found = prompt, None, [], []
        for index in range(num_new_tokens):
            out = self.model(
                input_ids=torch.tensor([ids], device=self.device),
                past_key_values=cache,
                use_cache=True,
            )
            found.append(out.logits[0].float().cpu())
            tokens.append(int(found[-1][-1].argmax()))
            ids = [tokens[-1] if forced is None else forced[index]]
            cache = out.past_key_values
        return tokens, torch.cat(found)


@torch.no_grad()
def compare(reference: Answers, forward: Forward, tolerance: float) -> Comparison:
    """The export's logits on the same prompts and tokens.

    Its greedy tokens are the same exactly when its likeliest token is the reference's at each
    place, because each is the beginning of the next.
    """
    rows = [[*p, *t][:-1] for p, t in zip(reference.prompts, reference.tokens)]
    if isinstance(forward, CachedForward):
        answers = zip(reference.prompts, reference.tokens)
        found = [forward.continued(p, len(t), forced=t)[1] for p, t in answers]
    else:
        found = _run(forward, rows)
    problems, near_ties, equal = [], [], True
    widest = min(found[0].shape[-1], reference.logits[0].shape[-1])  # a padded vocabulary
    pairs = [(a[:, :widest], b[:, :widest]) for a, b in zip(reference.logits, found)]
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    std = float(torch.cat([a for a, _ in pairs]).std())
    relative = difference / max(std, 1e-12)
    if not relative <= tolerance:  # also NaN
        problems.append(
            f"logits differ by up to {difference:.4g} ({relative:.3g} of their standard "
            f"deviation, {tolerance:g} is allowed)"
        )
    for number, (prompt, tokens) in enumerate(zip(reference.prompts, reference.tokens)):
        mine, theirs = pairs[number]
        for index, token in enumerate(tokens):
            at = len(prompt) - 1 + index
            other = int(theirs[at].argmax())
            if other == token:
                continue
            equal = False
            margin = float(mine[at, token] - mine[at, other])
            place = f"prompt {number + 1}, token {index + 1}: {other} instead of {token}"
            if margin <= tolerance * std:
                near_ties.append(f"{place} (ahead by {margin:.3g} in the source)")
            else:
                problems.append(f"greedy tokens differ at {place}")
    return Comparison(
        len(rows), len(reference.tokens[0]), difference, std, tolerance, equal, near_ties, problems
    )  # fmt: skip


def _run(forward: Forward, rows: list[list[int]]) -> list[Tensor]:
    """float32 [T_i, V] of each row."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    logits = forward(ids)
    return [logits[i, : len(row)].float().cpu() for i, row in enumerate(rows)]


_CONVERSATIONS: tuple[Sequence[Message], ...] = (
    [{"role": "user", "content": "Who are you?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好 <b> {x}\n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ],
)


def check_tokenizer(
    trained: PreTrainedTokenizerBase, exported: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Compares ids, rendered templates and stop ids; returns what a receipt says of them.

    Raises:
        ExportError: one of them differs.
    """
    problems = []
    texts = [*PROMPTS, "  two  spaces\n\n\ttab 12345 naïve 日本語 🙂 don't <|im_end|>"]
    for text in texts:
        if list(trained(text)["input_ids"]) != list(exported(text)["input_ids"]):
            problems.append(f"{text!r} has other token ids")
    has_template = bool(getattr(trained, "chat_template", None))
    num_rendered = 0
    if has_template:
        for messages in _CONVERSATIONS:
            mine, theirs = (_render(t, messages) for t in (trained, exported))
            num_rendered += mine is not None
            if mine != theirs:
                problems.append(f"the chat template renders {messages!r} differently")
    elif getattr(exported, "chat_template", None):
        problems.append("it has a chat template, the source has none")
    stops = stop_token_ids(trained)
    if stops != stop_token_ids(exported):
        problems.append(f"it stops at {stop_token_ids(exported)}, the source at {stops}")
    if problems:
        raise ExportError(
            f"the tokenizer that was exported is not the one trained: {'; '.join(problems)}"
        )
    return {"texts": len(texts), "rendered": num_rendered, "stop_token_ids": stops}


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str | None:
    try:
        return ChatTemplate(tokenizer).render_prompt(messages)
    except RowRefused:  # a template without system prompts, say
        return None


def check_stops(folder: Any, stops: list[int]) -> None:
    """The generation config of an exported folder stops at each of ``stops``.

    Raises:
        ExportError: it does not.
    """
    from transformers import GenerationConfig

    own = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    own = [own] if isinstance(own, int) else list(own or [])
    if missing := [i for i in stops if i not in own]:
        raise ExportError(
            f"generation_config.json of the export stops at {own}, and not at {missing}, where "
            "the template ends a turn"
        )
