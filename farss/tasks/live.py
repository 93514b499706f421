"""The model as lm_eval sees it: alive, in place, asked greedily, reporting its progress."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from farss.errors import ConfigError, FarssError, ModelError
from farss.forward import accepts, attribute, end_tokens, evaluating, without_cache
from farss.memory import give_back_if_scarce
from farss.models import hushed
from farss.precision import float32_products
from farss.processes import environment
from farss.tasks.likelihood import rows_that_fit
from farss.tasks.prefix import Prefix, shared_prefix

PromptProgress = Callable[[str, int, int], None]
"""Called with (benchmark, prompts done, prompts in all)."""


def require_harness() -> None:
    """Check that lm_eval is there.

    Raises:
        FarssError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise FarssError("evaluation needs lm-evaluation-harness: pip install -e '.[eval]'")


@contextlib.contextmanager
def asking(model: Any, run_generated_code: bool = False) -> Iterator[None]:
    """Evaluation mode, no gradients, no checkpointing, quiet libraries; everything is as before afterwards."""
    # Checkpointed layers drop the key-value cache, which makes generation many times slower.
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    # lm_eval's metric `code_eval` reads its permission from there
    allowed = environment("HF_ALLOW_CODE_EVAL", "1") if run_generated_code else contextlib.nullcontext()
    with contextlib.ExitStack() as stack:
        for module in checkpointed:
            stack.enter_context(attribute(module, "gradient_checkpointing", False))
        with evaluating(model), torch.no_grad(), _tensor_cores(model), _quiet(), allowed:
            yield


@contextlib.contextmanager
def _tensor_cores(model: Any) -> Iterator[None]:
    """On a GPU let the float32 adapters of a 16-bit model multiply in TF32, which is more exact than what they are given: in full float32
    they take as long as the model itself."""
    if model.device.type != "cuda" or model.dtype.itemsize > 2:
        yield
        return
    with float32_products("high"):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm_eval's and transformers' notices and the harness's own progress bars."""
    harness_log = logging.getLogger("lm_eval")
    level = harness_log.level
    harness_log.setLevel(logging.ERROR)
    try:
        with hushed(), _no_bar():
            yield
    finally:
        harness_log.setLevel(level)


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """The harness's bar over building prompts has no switch of its own. General text alone needs no harness."""
    if importlib.util.find_spec("lm_eval") is None:
        yield
        return
    import lm_eval.api.task as harness_task

    with attribute(harness_task, "tqdm", lambda iterable, **_: iterable):
        yield


def prompt_tokenizer(tokenizer: Any) -> Any:
    """A copy that may be changed (lm_eval sets its padding), which does not end prompts with an end-of-sequence token.

    Raises:
        ModelError: the tokenizer has no end-of-sequence token, or insists on putting it behind prompts.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-sequence token, so answers would never end: set its eos_token")
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer("a").input_ids[-1] == tokenizer.eos_token_id:
        tokenizer.add_eos_token = False
    if tokenizer("a").input_ids[-1] == tokenizer.eos_token_id:
        raise ModelError("the tokenizer ends every text with its end-of-sequence token: load it with add_eos_token=False")
    return tokenizer


def answer_span(rows: list[list[int]], answers: dict[tuple[int, ...], int]) -> int:
    """How many positions from the end of a right-padded batch hold all of its answers' log-likelihoods.

    Args:
        rows: [b][t] token ids, padded with anything.
        answers: length of the answer at the end of each unpadded row.

    A row whose padding happens to spell another row's tokens may match twice; the wider span is taken.
    """
    width, span = len(rows[0]), 0
    known = [length for length in {len(row) for row in answers} if length <= width]
    for row in rows:
        lengths = [length for length in known if tuple(row[:length]) in answers]
        if not lengths:  # cut by the harness: all of its positions
            return width
        span = max(span, *(width - length + answers[tuple(row[:length])] for length in lengths))
    return min(span, width)


Base: Any = object


class LiveModel(Base):
    """What we add to lm_eval's `HFLM`: progress, plain greedy decoding, and care for memory and context."""

    title, done, total = "", 0, 0
    on_progress: PromptProgress | None = None
    greedy: dict[str, Any]
    answers: dict[tuple[int, ...], int]
    """Length of the answer at the end of each row of tokens that is being scored."""
    rows: int
    """Prompts per forward pass."""
    prefix: Prefix | None = None
    """What all prompts begin with."""
    whole = False
    """Whether a prompt may not be cut, as HFLM cuts those of some tasks."""

    def start(self, title: str, complete: bool = False) -> None:
        """Begin a benchmark. `complete`: its prompts have their special tokens already (a chat template writes them)."""
        self.title, self.done, self.total = title, 0, 0
        self.add_bos_token = False if complete else None  # unset, the tokenizer's own rule holds, as in training

    def advance(self, rows: int) -> None:
        """Report that so many more prompts are done."""
        give_back_if_scarce(self.model.device)
        self.done = min(self.done + rows, self.total)
        if self.on_progress:
            self.on_progress(self.title, self.done, self.total)

    def room(self, prompt: list[int], options: dict[str, Any]) -> int:
        """Tokens of a prompt and the longest answer to it.

        Raises:
            ConfigError: they are more than the model's context; HFLM would cut them from the left, and the BOS token with it.
        """
        from lm_eval.models.utils import normalize_gen_kwargs

        used, wanted = len(prompt), int(normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"])
        if used + wanted > self.max_length:
            raise ConfigError(
                f"{self.title!r}: a prompt of {used} tokens and an answer of up to {wanted} do not fit into the model's "
                f"{self.max_length} tokens: choose a smaller fewshot or max_tokens, or leave out the question that ends in "
                f"{self._end(prompt)}"
            )
        return used + wanted

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Answers to prompts."""
        self.done, self.total = 0, len(requests)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        room = max(self.room(prompt, request.args[1]) for prompt, request in zip(prompts, requests, strict=True))
        self.prefix = shared_prefix(self.model, prompts, room)
        answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        return answers

    def _end(self, tokens: list[int]) -> str:
        return repr(self.tok_decode(tokens[-24:]))

    def gold(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Log-likelihoods of right answers, to whole prompts.

        Raises:
            ConfigError: prompt and answer are longer than the model's context; HFLM would cut them from the left.
        """
        self.whole = True
        try:
            return self.loglikelihood(requests)
        finally:
            self.whole = False

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of a prompt and an answer. A right answer begins where its prompt ends, as in training, which does not learn the line
        break at the end of a template; HFLM would count that to the answer."""
        if not self.whole:
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return pair
        prompt, both = self.tok_encode(context), self.tok_encode(context + continuation)
        kept = both[: len(prompt)] == prompt
        return prompt, both[len(prompt) :] if kept else self.tok_encode(continuation, add_special_tokens=False)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihoods of answers to prompts, and whether each is the greedy answer."""
        self.done, self.total = 0, len(requests)  # anew: these take a fraction of the time of answers
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        self.advance(self.total - self.done)  # requests with the same prompt share a row
        return found

    def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        lengths = [len(prompt) + len(answer) for _, prompt, answer in requests]
        longest = max(lengths)
        if self.whole and longest - 1 > self.max_length:
            _, prompt, answer = requests[lengths.index(longest)]
            raise ConfigError(
                f"{self.title!r}: a prompt of {len(prompt)} tokens and its right answer of {len(answer)} do not fit into the model's "
                f"{self.max_length} tokens: leave out the question that ends in {self._end(prompt)}"
            )
        self.answers = {}
        for _, prompt, answer in requests:
            row = tuple((prompt + answer)[:-1])
            self.answers[row] = max(len(answer), self.answers.get(row, 0))
        self.prefix = shared_prefix(self.model, [prompt for _, prompt, _ in requests], longest)
        found: dict[int, tuple[float, bool]] = {}
        for places in self._alike(requests):
            part = [requests[place] for place in places]
            self.batch_size_per_gpu = self._rows_that_fit(part)
            found |= dict(zip(places, super()._loglikelihood_tokens(part, **options), strict=True))
        self.batch_size_per_gpu = self.rows
        return [found[place] for place in range(len(requests))]

    def _alike(self, requests: list[Any]) -> list[list[int]]:
        """Places of requests whose answers are about as long, so that one long answer does not make all batches small. Of several answers
        to one prompt, which share a row, each is with the others."""
        longest: dict[tuple[int, ...], int] = {}
        for _, prompt, answer in requests:
            longest[tuple(prompt)] = max(len(answer), longest.get(tuple(prompt), 0))
        groups: dict[int, list[int]] = {}
        for place, (_, prompt, _) in enumerate(requests):
            groups.setdefault(longest[tuple(prompt)].bit_length(), []).append(place)
        return [groups[size] for size in sorted(groups, reverse=True)]

    def _rows_that_fit(self, requests: list[Any]) -> int:
        """Rows whose logits fit: of the answers' positions, and of the padding behind the shortest row of a batch."""
        # the longest first, and one row for answers that differ in their last token alone, as HFLM makes its batches
        rows = {tuple((prompt + answer)[:-1]): (len(prompt) + len(answer), len(answer)) for _, prompt, answer in requests}
        sizes, vocabulary = sorted(rows.values(), reverse=True), self.model.config.get_text_config().vocab_size
        for count in range(self.rows, 1, -1):
            batches = [sizes[first : first + count] for first in range(0, len(sizes), count)]
            kept = max(max(answer for _, answer in batch) + batch[0][0] - batch[-1][0] for batch in batches)
            kept = kept if accepts(self.model, "logits_to_keep") else sizes[0][0]
            if rows_that_fit(count, kept, vocabulary) == count:
                return count
        return 1

    def _model_call(self, inps: Any, *rest: Any, **_: Any) -> Any:
        options = without_cache(self.model)
        if accepts(self.model, "logits_to_keep"):
            # HFLM counts from the end where it is given fewer logits than tokens
            span, known = answer_span(inps.tolist(), self.answers), self.prefix
            if known is not None and known.begins(inps) and span <= inps.shape[1] - len(known.ids):
                inps, options = inps[:, len(known.ids) :], {"cache": known.spread(inps.shape[0])}
            options["logits_to_keep"] = span
        logits = self.model(inps, **options).logits
        self.advance(inps.shape[0])
        return logits

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        # or the model's own `max_new_tokens`, where it has one, would go before
        options |= {"max_new_tokens": max_length - context.shape[1], "min_new_tokens": None, "min_length": 0}
        known = self.prefix and self.prefix.to_front(context, options["attention_mask"])
        if self.prefix and known:
            context, mask = known
            options |= {"attention_mask": mask, "cache": self.prefix.spread(context.shape[0])}
        tokens = super()._model_generate(context, max_length, stop, **{**options, **self.greedy})
        self.advance(context.shape[0])
        return tokens


def live_model(model: Any, tokenizer: Any, batch_size: int, on_progress: PromptProgress | None) -> Any:
    """lm_eval's `HFLM` around a live model, which stays on its device.

    Args:
        tokenizer: from `prompt_tokenizer`. Its own rule puts the beginning-of-sequence token in front, exactly once, as in training.
    """
    from lm_eval.models.huggingface import HFLM

    # Log-probabilities of a 16-bit model are summed in float32; a float64 model keeps its precision.
    precision = None if model.dtype == torch.float64 else "float32"
    kind = type("Live", (LiveModel, HFLM), {})
    with _quiet():
        live = kind(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, softmax_dtype=precision)
    live.rows, live.on_progress, live.greedy = batch_size, on_progress, greedy_options(model, tokenizer)
    return live


def greedy_options(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Plain greedy decoding, whatever the model's own generation settings say (penalties change greedy answers too).

    Without an end-of-sequence id, text behind the end of a finished answer would be counted as part of it: HFLM
    removes special tokens before it looks for them.
    """
    return {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "eos_token_id": end_tokens(model, tokenizer),
    }
