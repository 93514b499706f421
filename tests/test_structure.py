"""Where blocks, layers and weights lie in a model."""

import pytest
import torch
import transformers
from small_models import small

from farss.errors import ModelError
from farss.forward import accepts, accepts_or_hands_on, evaluating
from farss.structure import holds_packed, is_linear, is_packed, target_layers, weight_of


def test_eight_bit_floats_are_packed():
    layer = torch.nn.Linear(2, 2)
    assert not is_packed(layer)
    assert not holds_packed(layer)
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert is_packed(layer)
    assert holds_packed(layer)
    with pytest.raises(ModelError, match=r"packed weights \(torch.float8_e4m3fn"):  # their scales lie beside them
        weight_of(layer)


def test_the_output_layer_gets_contiguous_rows_while_a_model_is_evaluated():
    model, contiguous = small("gemma3").train(), []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: contiguous.append(args[0].is_contiguous()))
    ids = torch.ones(2, 5, dtype=torch.int64)
    with evaluating(model):
        assert not model.training
        inside = model(ids, logits_to_keep=2).logits
    assert model.training
    outside = model.eval()(ids, logits_to_keep=2).logits
    assert contiguous == [True, False]
    torch.testing.assert_close(inside, outside, rtol=0, atol=1e-12)


def test_an_argument_for_the_model_inside_is_handed_on_and_not_its_own():
    taken, handed_on, refused = (small(kind) for kind in ("llama", "granite-moe", "gpt2"))
    assert accepts(taken, "use_cache")
    assert not accepts(handed_on, "use_cache")
    assert accepts_or_hands_on(handed_on, "use_cache")
    refused.forward = lambda input_ids: None
    assert not accepts_or_hands_on(refused, "use_cache")


def test_a_subclass_is_linear_if_it_gives_one_output_of_its_width():
    class Router(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x), x.argmax()

    class Grouped(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.unflatten(-1, (5, -1)))

    class Narrow(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)[..., :1]

    class Written(torch.nn.Linear):
        def forward(self, x):
            return x @ self.weight.T

    linear = {kind: is_linear(kind(4, 3)) for kind in (torch.nn.Linear, Written, Router, Grouped, Narrow)}
    assert linear == {torch.nn.Linear: True, Written: True, Router: False, Grouped: False, Narrow: False}
    with torch.device("meta"):
        assert not is_linear(Router(4, 3))
    assert not is_linear(torch.nn.LayerNorm(4))


def test_a_model_on_several_devices_is_refused_and_one_on_a_single_device_is_not(tmp_path):
    small("llama").save_pretrained(tmp_path)
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *(f"model.layers.{block}" for block in range(4)))
    places = {part: "disk" if part == "model.layers.3" else "cpu" for part in parts}
    load = transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(ModelError, match=r"spread over cpu, disk \(device_map\): load it on one device, with device_map=\{'': 0\}"):
        target_layers(load(tmp_path, device_map=places, offload_folder=tmp_path / "offloaded"))
    assert target_layers(load(tmp_path, device_map={"": "cpu"})).keys() == target_layers(load(tmp_path)).keys()
