"""Faster steps: the same training, and the libraries as they were afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from trainings import difference, examples, options, tokenizer, weights, whole_model
from trl.trainer import utils

from farss.train import speed, train


def trained(folder: Path) -> dict[str, torch.Tensor]:
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights="gaussian")
    torch.manual_seed(0)
    model = get_peft_model(whole_model(), lora)
    train(model, tokenizer(), examples(), options(learning_rate=1e-3), folder)
    return weights(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_keeps_the_expectation(rate: float, dtype: torch.dtype) -> None:
    x = torch.ones(7, 30_001, dtype=dtype, requires_grad=True)  # an odd number of elements
    with speed.cheap_dropout():
        y = nn.Dropout(rate)(x)
    kept = y != 0
    error = (rate * (1 - rate) / x.numel()) ** 0.5
    assert (~kept).float().mean().item() == pytest.approx(rate, abs=5 * error)
    assert y.unique().numel() == 2
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - rate)), rtol=1e-4 if dtype == torch.float32 else 4e-3, atol=0)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())  # what was dropped has no gradient
    columns = kept.float().mean(0)
    assert 0.2 < columns.var() / (rate * (1 - rate) / 7) < 5  # rows are drawn apart


def test_dropout_is_the_seeds_and_of_training_alone() -> None:
    x, layer = torch.randn(5, 11), nn.Dropout(0.3)
    with speed.cheap_dropout():
        drawn = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            drawn.append(layer(x))
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
        assert torch.equal(layer.eval()(x), x)
        assert torch.equal(nn.Dropout(0.0)(x), x)
        assert torch.equal(nn.Dropout(1.0)(x), torch.zeros_like(x))
        assert nn.Dropout(0.5)(torch.empty(0, 3)).shape == (0, 3)


def test_small_tiles_have_the_same_loss_and_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trained(tmp_path / "one")
    monkeypatch.setattr(speed, "TILE", 10)  # of 64 columns
    many = trained(tmp_path / "many")
    assert difference(one, many) < 1e-6


def test_what_is_changed_is_there_and_comes_back() -> None:
    """A name that a new TRL no longer has would make every step slower without a word."""
    before = utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE, nn.Dropout.forward
    with speed.faster_steps(torch.device("cpu")):
        assert utils._use_triton(torch.device("cpu"))
        assert utils._CHUNKED_LOGPROB_CHUNK_SIZE == speed.TILE
        assert nn.Dropout.forward is not before[2]
    assert (utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE, nn.Dropout.forward) == before
