"""Greedy answers of a causal language model to many prompts: the check of the build and of the tests."""

from collections.abc import Sequence
from typing import Any

import torch

ANSWER_TOKENS = 8
"""Room for the longest answer of the world (a full name) and its end."""

BATCH = 128


def question_prompt(question: str) -> str:
    """The plain format in which the facts were learned; the answer follows after one space."""
    return f"Question: {question}\nAnswer:"


def few_shot_prompt(question: str, shots: Sequence[tuple[str, str]]) -> str:
    """Solved questions, separated by blank lines, before the open one."""
    solved = "".join(f"{question_prompt(q)} {a}\n\n" for q, a in shots)
    return solved + question_prompt(question)


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
) -> list[str]:
    """What the model writes after each prompt, up to the first newline or EOS, stripped."""
    answers: list[str] = []
    for start in range(0, len(prompts), BATCH):
        batch = tokenizer(list(prompts[start : start + BATCH]), return_tensors="pt", padding=True, padding_side="left")
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )  # [b, prompt + ANSWER_TOKENS]
        texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.split("\n")[0].strip() for text in texts]
    return answers


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """The share of answers that equal the expected ones, in 0..1."""
    return sum(a == e for a, e in zip(answers, expected, strict=True)) / len(expected)
