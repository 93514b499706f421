"""Text that a model writes by itself."""

import torch
from small_models import small

from farss.batches import unlearnt
from farss.survey import own_text, writing


class Words:
    """A tokenizer, as far as it is asked."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0


def test_own_text_is_the_models_own_and_the_same_every_time():
    model = small("llama")
    one, two, other = (own_text(model, Words(), 40, 12, seed) for seed in (0, 0, 1))
    assert one == two
    assert one != other
    model.generation_config.repetition_penalty = 50.0  # of answers in a chat, and not of what the model knows
    assert own_text(model, Words(), 40, 12, 0) == one
    assert len(one) == 40
    assert all(text[0] == 1 and 2 <= len(text) <= 12 and 2 not in text[2:] for text in one)
    state = torch.random.get_rng_state()
    assert own_text(model.train(), Words(), 40, 12, 0) == one
    assert model.training  # whose mode and random numbers are the caller's
    assert torch.equal(torch.random.get_rng_state(), state)
    rows = unlearnt(one)
    assert all(len(row["input_ids"]) == len(row["completion_mask"]) and not any(row["completion_mask"]) for row in rows)


def test_own_text_begins_and_ends_with_the_models_own_tokens():
    """Qwen's tokenizer has no beginning of a text, and names the end of a chat's turn alone."""

    class Chatty:
        bos_token_id, eos_token_id, pad_token_id = None, 2, 0

    model = small("llama")
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = 5, [2, *range(20, 60)]
    texts = own_text(model, Chatty(), 20, 12, 0)
    assert {text[0] for text in texts} == {5}
    assert not [text for text in texts if any(token in model.generation_config.eos_token_id for token in text[2:])]
    model.generation_config.bos_token_id, model.config.bos_token_id = None, 6
    assert own_text(model, Chatty(), 1, 4, 0)[0][0] == 6
    model.config.bos_token_id = None
    assert own_text(model, Chatty(), 1, 4, 0)[0][0] == 2


def test_tokens_are_drawn_with_their_probabilities(monkeypatch):
    torch.manual_seed(0)
    likely = torch.tensor([0.0, 0.5, 1e-4, 0.0, 0.2, 0.25, 0.0499, 0.0])
    drawn = writing._drawn(likely.expand(100_000, -1), num_samples=1)
    assert drawn.shape == (100_000, 1)
    shares = drawn.flatten().bincount(minlength=len(likely)) / len(drawn)
    assert not shares[likely == 0].any()
    assert ((shares - likely).abs() <= 5 * (likely * (1 - likely) / len(drawn)).sqrt()).all()

    tokens = []
    monkeypatch.setattr(writing, "_drawn", lambda p, num_samples: tokens.append(len(p)) or torch.full((len(p), 1), 7))
    before = torch.multinomial

    assert own_text(small("llama"), Words(), 3, 5, 0) == [[1, 7, 7, 7, 7]] * 3  # by those alone
    assert tokens == [3] * 4
    assert torch.multinomial is before
