"""Faster steps: the same training, and the libraries as they were afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn
from trainings import difference, examples, options, tokenizer, weights, whole_model
from trl.kernels import chunked_logprob
from trl.trainer import utils

from farss.adapter import _Dropout, _SameDropout
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
    monkeypatch.setattr(speed, "COLUMNS", 10)  # of 64
    monkeypatch.setattr(speed, "CELLS", 30)  # three tokens
    many = trained(tmp_path / "many")
    assert difference(one, many) < 1e-6


def test_sums_of_bfloat16_are_those_of_float32() -> None:
    total, a, b = torch.randn(64, 48), torch.randn(64, 512, dtype=torch.bfloat16), torch.randn(512, 48, dtype=torch.bfloat16)
    exact = total.double() + a.double() @ b.double()
    with speed.sums_of_bfloat16():
        chunked_logprob._addmm_fp32(sums := total.clone(), a, b)
        chunked_logprob._addmm_fp32(long := total.clone(), a.float() / 3, b.float())  # is not rounded
    assert (sums - exact).abs().max() < 1e-6 * exact.abs().max()
    assert (long - total - (exact - total) / 3).abs().max() < 1e-6 * exact.abs().max()


def layer(dropout: float, others: Sequence[str] = (), **how: Any) -> tuple[Any, Any]:
    """A LoRA layer of PEFT, with more adapters beside the first: one that shares its dropout, or has none."""
    model = nn.ModuleDict({"inside": nn.Linear(12, 20)})
    options = {"r": 4, "target_modules": ["inside"], "lora_alpha": 6, "init_lora_weights": False}
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(lora_dropout=dropout, **options, **how), adapter_name="first")
    inside = adapted.base_model.model["inside"]
    for other in others:
        adapted.add_adapter(other, LoraConfig(**options | {"r": 3}))
        if other == "twin" and dropout:
            inside.lora_dropout["first"] = _Dropout(dropout)
            inside.lora_dropout["twin"] = _SameDropout(inside.lora_dropout["first"])
    adapted.base_model.set_adapter(["first", *others])
    return adapted, inside


def both_ways(inside: Any) -> list[list[torch.Tensor]]:
    """The layer's output, and the gradients of its input and its factors, as PEFT computes them and in thin products."""
    found = []
    for measure in (contextlib.nullcontext, speed.thin_products):
        torch.manual_seed(1)
        x = torch.randn(3, 5, 12, requires_grad=True)
        with speed.cheap_dropout(), measure():
            y = inside(x)
            (y.float() * torch.arange(20)).sum().backward()
        trained = [parameter for parameter in inside.parameters() if parameter.requires_grad]
        found.append([y.detach(), x.grad, *[parameter.grad.clone() for parameter in trained]])
        inside.zero_grad()
    return found


@pytest.mark.parametrize("others", [(), ("twin",), ("plain",), ("twin", "plain")])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_thin_products_are_those_of_peft(dropout: float, others: Sequence[str]) -> None:
    _, inside = layer(dropout, others)
    for theirs, ours in zip(*both_ways(inside), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_thin_products_in_16_bits_are_one_rounding_further_from_exact_ones_at_most(dropout: float) -> None:
    _, inside = layer(dropout, ("twin",))
    exact, _ = both_ways(inside)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = both_ways(inside)
    for right, was, now in zip(exact, theirs, ours, strict=True):
        assert now.dtype == was.dtype
        assert (now.float() - right).norm() <= (was.float() - right).norm() + 2**-8 * right.norm()


@pytest.mark.parametrize("how", ["dora", "hook", "off", "merged", "evaluated"])
def test_where_they_would_not_be_the_same_peft_computes(how: str) -> None:
    adapted, inside = layer(0.3, use_dora=how == "dora")
    if how == "hook":
        inside.lora_A["first"].register_forward_hook(lambda module, args, output: output * 3)
    if how == "merged":
        adapted.merge_adapter()
    if how == "evaluated":
        adapted.eval()
    x, found = torch.randn(2, 12), []
    with adapted.disable_adapter() if how == "off" else contextlib.nullcontext(), torch.no_grad():
        for measure in (contextlib.nullcontext, speed.thin_products):
            torch.manual_seed(1)
            with speed.cheap_dropout(), measure():
                found.append(inside(x))
    torch.testing.assert_close(*found, rtol=1e-5 if how == "evaluated" else 0, atol=1e-6 if how == "evaluated" else 0)


def test_what_is_changed_is_there_and_comes_back() -> None:
    """A name that a new TRL no longer has would make every step slower without a word."""

    def now() -> list[Any]:
        kernels = chunked_logprob._forward_tile, chunked_logprob._backward_tile, chunked_logprob._addmm_fp32
        products = torch.backends.mkldnn.matmul.fp32_precision
        return [products, utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE, nn.Dropout.forward, Linear.forward, *kernels]

    before = now()
    with speed.faster_steps(torch.device("cpu")):
        assert utils._use_triton(torch.device("cpu"))
        assert utils._CHUNKED_LOGPROB_CHUNK_SIZE == speed.COLUMNS
        assert all(inside is not outside for inside, outside in zip(now()[3:], before[3:], strict=True))
    assert now() == before
