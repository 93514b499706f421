"""The loss of general text, and how much is scored at once."""

import pytest
import torch
from taught import asking

from farss.evaluate import evaluate
from farss.tasks import likelihood
from farss.tasks.likelihood import rows_that_fit

pytest.importorskip("lm_eval")


@pytest.mark.parametrize("at_once", [1, 300, 2**21])
def test_text_loss_is_the_mean_over_tokens(at_once, model, tokenizer, files, tmp_path, monkeypatch):
    monkeypatch.setattr(likelihood, "CACHED", at_once)
    scores = evaluate(model, tokenizer, asking(text=files["text"]), tmp_path)
    total, count = 0.0, 0
    for text in ("Question: a", "b?\nAnswer: red"):
        ids = torch.tensor(tokenizer(text).input_ids)
        total -= model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).sum().item()
        count += len(ids) - 1
    assert scores.text_loss == pytest.approx(total / count, abs=1e-9)
    assert scores.knowledge == scores.task == {}


def test_logits_stay_below_their_bound():
    assert rows_that_fit(16, 150, 32_000) == 16
    assert rows_that_fit(16, 512, 262_144) == 2
    assert rows_that_fit(16, 100_000, 262_144) == 1
