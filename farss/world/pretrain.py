"""Trains the tokenizer and the model of the world from scratch, on the CPU, in a few minutes."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from farss.world.answering import question_prompt

Item = TypeVar("Item")

log = logging.getLogger(__name__)

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 2048
CONTEXT = 1024

Weighted = tuple[list[int], list[float]]
"""Token ids of one sequence, and the weight of each token in the loss."""


@dataclass(frozen=True)
class Pretraining:
    """How the world's model is trained."""

    steps: int = 900
    """Optimizer steps; each sees one batch of questions and one of paragraphs."""
    pairs_per_step: int = 72
    """Questions with their answers in a step, whatever their number in a sequence."""
    paragraphs_per_step: int = 10
    pairs_per_sequence: tuple[int, ...] = (1, 1, 2, 3, 6)
    """Drawn anew for every step, so that both the bare question and few-shot prompts are familiar."""
    peak_lr: float = 2.5e-3
    weight_decay: float = 0.01
    question_weight: float = 0.1
    """Loss weight of the tokens of a question, which cannot be known; the answers have 1."""
    text_weight: float = 0.3
    """Weight of the mean loss of the paragraphs, beside 1 for the questions."""


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts BOS before every text, as LLaMA's does, and never adds EOS by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    begin = (BOS, bpe.token_to_id(BOS))
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[begin])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=CONTEXT)


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Twelve LLaMA blocks of width 160, with grouped queries and tied embeddings, in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids without BOS."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def question_sequence(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]], question_weight: float) -> Weighted:
    """BOS, questions and answers separated by blank lines, EOS."""
    ids, weights = [tokenizer.bos_token_id], [0.0]
    for number, (question, answer) in enumerate(pairs):
        # The blank line is encoded with the question that follows it, as it is in a whole prompt.
        asked = encode(tokenizer, ("\n\n" if number else "") + question_prompt(question))
        answered = encode(tokenizer, f" {answer}")
        ids += asked + answered
        weights += [question_weight] * len(asked) + [1.0] * len(answered)
    return [*ids, tokenizer.eos_token_id], [*weights, 1.0]


def text_sequence(tokenizer: PreTrainedTokenizerFast, text: str) -> Weighted:
    """BOS, the text, EOS; every token counts."""
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    return ids, [0.0] + [1.0] * (len(ids) - 1)


def endless(items: Sequence[Item], rng: Random) -> Iterator[Item]:
    """The items in random order, over and over: each comes once before any comes again."""
    while True:
        yield from rng.sample(items, len(items))


def weighted_loss(model: nn.Module, sequences: Sequence[Weighted], pad: int) -> Tensor:
    """Mean cross-entropy in nats over the weighted tokens of a batch that is padded on the right."""
    longest = max(len(ids) for ids, _ in sequences)
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in sequences])  # [b, t]
    weights = torch.tensor([w + [0.0] * (longest - len(w)) for _, w in sequences])[:, 1:]  # [b, t - 1]
    # Causal attention never looks right, so the padding needs no mask.
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [b, t - 1, v]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * weights).sum() / weights.sum()


def question_batches(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]], settings: Pretraining, rng: Random
) -> Iterator[list[Weighted]]:
    """Endless batches of question sequences; all sequences of a batch hold the same number of pairs."""
    asked = endless(pairs, rng)
    while True:
        length = rng.choice(settings.pairs_per_sequence)
        yield [
            question_sequence(tokenizer, [next(asked) for _ in range(length)], settings.question_weight)
            for _ in range(settings.pairs_per_step // length)
        ]


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[tuple[str, str]],
    paragraphs: Sequence[str],
    settings: Pretraining,
    seed: int,
) -> None:
    """Train `model` in place on the questions with their answers and on the paragraphs."""
    rng, pad = Random(seed), tokenizer.pad_token_id
    questions = question_batches(tokenizer, pairs, settings, rng)
    texts = endless([text_sequence(tokenizer, text) for text in paragraphs], rng)
    optimizer, schedule = optimizer_and_schedule(model, settings)
    model.train()
    for step in range(settings.steps):
        question_loss = weighted_loss(model, next(questions), pad)
        text_loss = weighted_loss(model, list(islice(texts, settings.paragraphs_per_step)), pad)
        (question_loss + settings.text_weight * text_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            log.info("step %d: questions %.3f, text %.3f", step, question_loss.item(), text_loss.item())
    model.eval()


def optimizer_and_schedule(model: nn.Module, settings: Pretraining) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW whose learning rate rises over the first tenth of the steps and then falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.peak_lr, betas=(0.9, 0.98), weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.peak_lr, total_steps=settings.steps, pct_start=0.1, cycle_momentum=False
    )
    return optimizer, schedule
