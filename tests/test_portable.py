"""The exported adapter gives the trained model's logits on the untouched base, under every reader's rules."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from small_models import examples, logits, prompts, save_small, small, trained
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from farss import portable as portable_module
from farss import world
from farss.adapter import START, TRAINED, adapter_change, attach, changed_weight
from farss.artifacts import LayerPlan, Plan
from farss.batches import collate
from farss.config import ModelConfig, PlanConfig
from farss.errors import ConfigError, FarssError, FolderError, ModelError
from farss.files import read_tensors
from farss.merging import holds_layers, merge, write_model
from farss.models import base_fingerprint, load_model, local_folder, weights_fingerprint
from farss.plan import make_plan
from farss.portable import CHECKED_TOKENS, SERVED_RANKS, export, in_float32, load_adapter
from farss.precision import float32_products
from farss.survey import Site, survey


@pytest.mark.parametrize("kind", ["llama-gqa", "gemma3", "gpt2", "phi3", "gpt-neox", "deepseek-v3", "glm4-moe"])
def test_stock_peft_on_the_untouched_base(kind, tmp_path):
    adapted, plan = trained(kind, tmp_path)
    expected = logits(adapted)
    done = export(adapted, plan, tmp_path / "adapter", prompts(), base="base")
    assert torch.equal(logits(adapted), expected)  # the check left no trace
    stock = PeftModel.from_pretrained(small(kind).float(), str(tmp_path / "adapter")).eval()
    tolerance = 1e-5 * max(1.0, expected.abs().max().item())
    assert (logits(stock) - expected).abs().max() <= tolerance
    assert done.logit_difference <= tolerance
    assert (logits(small(kind).float()) - expected).abs().max() > 100 * tolerance  # training did change something


def test_the_check_is_exact_whatever_the_user_computes_with(tmp_path):
    """Attention kernels that take 16-bit numbers alone, and float32 products that are rounded."""

    def sixteen_bits(module, query, *args, **kwargs):
        assert query.dtype.itemsize == 2, "FlashAttention only supports fp16 and bf16"
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *args, **kwargs)

    AttentionInterface.register("sixteen_bits", sixteen_bits)
    adapted, plan = trained("llama", tmp_path)
    adapted.get_base_model().set_attn_implementation("sixteen_bits")
    with float32_products("medium"):
        done = export(adapted, plan, tmp_path / "adapter", prompts())
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert done.logit_difference < 1e-5
    assert adapted.get_base_model().config._attn_implementation == "sixteen_bits"


def test_stock_peft_merges_adds_and_swaps(tmp_path):
    """What people do with LoRAs: merge, add two tasks, swap one for another while serving."""
    adapted, plan = trained("llama", tmp_path)
    expected, base = logits(adapted), logits(small("llama").float())
    export(adapted, plan, tmp_path / "one", prompts())
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data *= 1.05
    other = logits(adapted)
    export(adapted, plan, tmp_path / "two", prompts())
    tolerance = 1e-5 * max(1.0, expected.abs().max().item(), other.abs().max().item())
    merged = PeftModel.from_pretrained(small("llama").float(), str(tmp_path / "one")).merge_and_unload().eval()
    assert (logits(merged) - expected).abs().max() <= tolerance
    model = PeftModel.from_pretrained(small("llama").float(), str(tmp_path / "one"), adapter_name="one").eval()
    model.load_adapter(str(tmp_path / "two"), "two")
    for name, weights, wanted in (("first", [1.0, 0.0], expected), ("second", [0.0, 1.0], other), ("none", [0.0, 0.0], base)):
        model.add_weighted_adapter(["one", "two"], weights, name, combination_type="cat")
        model.set_adapter(name)
        assert (logits(model) - wanted).abs().max() <= tolerance
    swapped = PeftModel.from_pretrained(small("llama").float(), str(tmp_path / "one")).eval()
    hotswap_adapter(swapped, str(tmp_path / "two"), "default")
    assert (logits(swapped) - other).abs().max() <= tolerance


def test_an_adapter_is_loaded_on_its_own_base_only(tmp_path):
    adapted, plan = trained("llama", tmp_path)
    expected = logits(adapted)
    export(adapted, plan, tmp_path / "adapter", prompts(), base="the base")
    loaded = load_adapter(small("llama").float(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-4)
    other = small("llama").float()
    other.model.layers[3].mlp.up_proj.weight.data += 1e-3
    with pytest.raises(FarssError, match=r"made for a base with fingerprint [0-9a-f]{16}, but this one has [0-9a-f]{16}: load 'the base'"):
        load_adapter(other, tmp_path / "adapter")
    with pytest.raises(FarssError, match=r"there is no farss\.json"):
        load_adapter(other, tmp_path)
    small("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "farss.json").write_text("{}")
    with pytest.raises(FarssError, match=r"model is a whole model: load it with AutoModelForCausalLM"):
        load_adapter(other, tmp_path / "model")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(FarssError, match=r"are not those that farss\.json there describes"):
        load_adapter(small("llama").float(), tmp_path / "adapter")


def test_an_adapter_without_its_weights_is_one_sentence(tmp_path):
    adapted, plan = trained("llama", tmp_path)
    export(adapted, plan, tmp_path / "adapter", prompts())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    assert "in layers of rank" in (tmp_path / "adapter" / "README.md").read_text()
    file.write_bytes(file.read_bytes()[:100])
    for _ in range(2):
        with pytest.raises(FarssError, match=r"adapter_model\.safetensors is missing or damaged"):
            load_adapter(small("llama").float(), tmp_path / "adapter")
        file.unlink(missing_ok=True)


def test_an_adapter_is_loaded_with_its_own_tokenizer_only(tmp_path):
    adapted, plan = trained("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(world.MODEL)
    export(adapted, plan, tmp_path / "adapter", prompts(), tokenizer=tokenizer)
    load_adapter(small("llama").float(), tmp_path / "adapter", tokenizer)
    tokenizer.add_tokens(["more"])
    with pytest.raises(FarssError, match="made for a tokenizer with fingerprint"):
        load_adapter(small("llama").float(), tmp_path / "adapter", tokenizer)


def test_the_bases_fingerprint_is_the_same_with_adapters_on_it(tmp_path):
    adapted, _ = trained("gpt2", tmp_path)
    assert base_fingerprint(adapted) == base_fingerprint(small("gpt2").float()) == weights_fingerprint(small("gpt2").float())


def test_a_loaded_adapter_can_be_trained_on(tmp_path):
    adapted, plan = trained("llama", tmp_path)
    export(adapted, plan, tmp_path / "adapter", prompts())
    loaded = load_adapter(small("llama").float(), tmp_path / "adapter", trainable=True)
    trainable = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_bfloat16_base_to_a_thousandth(tmp_path):
    adapted, plan = trained("llama", tmp_path, torch.bfloat16)
    done = export(adapted, plan, tmp_path / "adapter", prompts())
    assert done.logit_difference <= 1e-3
    assert next(adapted.get_base_model().parameters()).dtype == torch.bfloat16
    stock = PeftModel.from_pretrained(small("llama").bfloat16(), str(tmp_path / "adapter")).eval()
    assert (logits(stock.float()) - logits(adapted.float())).abs().max() <= 1e-3


def test_the_check_holds_one_block_in_float32_at_a_time(tmp_path):
    adapted, _ = trained("llama", tmp_path, torch.bfloat16)
    blocks = adapted.get_base_model().model.layers
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    expected, widened = logits(small("llama").bfloat16().float()), []

    def look(*_):
        widened.append([next(block.parameters()).dtype == torch.float32 for block in blocks])

    hooks = [block.mlp.register_forward_hook(look) for block in blocks]
    with adapted.disable_adapter(), in_float32(adapted):
        found = logits(adapted)
    for hook in hooks:
        hook.remove()
    assert widened == [[one == place for one in range(len(blocks))] for place in range(len(blocks))]
    assert torch.equal(found, expected)
    after = adapted.state_dict()
    assert all(torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items())


def test_one_rank_alpha_equal_to_it_and_no_patterns(tmp_path):
    adapted, plan = trained("llama", tmp_path)
    done = export(adapted, plan, tmp_path / "adapter", prompts())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == done.rank == 16
    assert done.rank in SERVED_RANKS
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.shape[0] for key, tensor in state.items() if "lora_A" in key} == {done.rank}
    assert {tensor.shape[1] for key, tensor in state.items() if "lora_B" in key} == {done.rank}
    assert not any(START in key or TRAINED in key for key in state)


def test_every_reader_sees_the_same_change(tmp_path):
    """PEFT and vLLM scale by one alpha / r, llama.cpp by alpha / each tensor's own rank."""
    adapted, plan = trained("llama", tmp_path)
    export(adapted, plan, tmp_path / "adapter", prompts())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in plan.layers:
        a, b = (state[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        left, right = adapter_change(adapted, name)
        for scaling in (config["lora_alpha"] / config["r"], config["lora_alpha"] / a.shape[0]):
            torch.testing.assert_close(scaling * b @ a, left @ right, rtol=1e-5, atol=1e-6)


def test_merged_model_equals_the_trained_one(tmp_path):
    import transformers

    class NoTokenizer:
        def save_pretrained(self, folder):
            return None

    for kind in ("llama", "gpt2"):
        adapted, plan = trained(kind, tmp_path / kind)
        merge(adapted, plan, NoTokenizer(), tmp_path / kind / "model", torch.float32)
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind / "model").eval()
        expected = logits(adapted)
        assert (logits(merged) - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


def test_a_tied_embedding_is_written_once(tmp_path):
    """In another precision than it was trained in, too."""
    folder = save_small("llama", tmp_path / "base", tie_word_embeddings=True)
    model = load_model(ModelConfig(str(folder)), torch.float32)
    write_model(model, [], None, tmp_path / "model", torch.bfloat16, folder)
    names = [set(read_tensors(place / "model.safetensors")) for place in (folder, tmp_path / "model")]
    assert names[0] == names[1]
    assert "lm_head.weight" not in names[1]


def test_settings_of_generation_that_transformers_would_not_write_stay_as_they_are(tmp_path):
    """Of a fully fine-tuned model; those of many models have a temperature and do not sample."""
    small("llama").float().save_pretrained(tmp_path / "base")
    settings = '{"temperature": 0.6, "top_p": 0.9}\n'
    (tmp_path / "base" / "generation_config.json").write_text(settings)
    for name in ("preprocessor_config.json", "pytorch_model.bin.index.json"):
        (tmp_path / "base" / name).write_text("{}")
    (tmp_path / "base" / "additional_chat_templates").mkdir()
    (tmp_path / "base" / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    kept = model.generation_config
    merge(model, Plan("full", {}, 4), AutoTokenizer.from_pretrained(world.MODEL), tmp_path / "whole", torch.float32, tmp_path / "base")
    assert (tmp_path / "whole" / "generation_config.json").read_text() == settings
    assert model.generation_config is kept
    assert (tmp_path / "whole" / "preprocessor_config.json").is_file()  # of a model that sees, too
    assert not (tmp_path / "whole" / "pytorch_model.bin.index.json").exists()
    assert (tmp_path / "whole" / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"


def test_the_check_needs_no_more_for_longer_prompts(tmp_path):
    batch = {"input_ids": torch.arange(3, 3 + 3 * 300).reshape(3, 300) % 90, "attention_mask": torch.ones(3, 300)}
    model = small("llama", max_position_embeddings=512).float()
    found = portable_module.logits(model, batch)
    assert found.shape == (3 * CHECKED_TOKENS, model.config.vocab_size)
    torch.testing.assert_close(found[:CHECKED_TOKENS], model(input_ids=batch["input_ids"][:1]).logits[0, :CHECKED_TOKENS])


def test_no_change_is_written_into_a_weight_that_several_layers_share(tmp_path):
    """It would change the others too."""
    adapted, plan = trained("llama", tmp_path)
    first, second = (adapted.get_submodule(f"base_model.model.model.layers.{block}.mlp.up_proj.base_layer") for block in (0, 2))
    second.weight = first.weight
    with pytest.raises(ModelError, match=r"layers.0.mlp.up_proj shares its weight with model.layers.2.mlp.up_proj, .* hand over an"):
        merge(adapted, plan, None, tmp_path / "model", torch.float32)
    assert not (tmp_path / "model").exists()


def test_only_the_files_that_are_loaded_are_merged(tmp_path):
    """Mistral's folders hold the weights once more, under names of their own."""
    source, target = tmp_path / "base", tmp_path / "merged"
    source.mkdir()
    save_file({"a.weight": torch.zeros(2, 2)}, source / "model.safetensors")
    save_file({"other": torch.zeros(2, 2)}, source / "consolidated.safetensors")
    for name in ("config.json", "params.json"):
        (source / name).write_text("{}")
    plan = Plan("lora", {"a": LayerPlan(1, 1.0, 0, (2, 2))}, 1)
    assert holds_layers(source, plan.layers)
    write_model(None, plan.layers, None, target, torch.float32, source, lambda name, weight: weight + 1)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(load_file(target / "model.safetensors")["a.weight"], torch.ones(2, 2))
    save_file({"a.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, source / "model.safetensors")
    assert not holds_layers(source, plan.layers)  # its numbers mean nothing without their scales


def test_the_files_that_transformers_loads_are_merged_whatever_index_stayed_behind(tmp_path):
    plan = Plan("lora", {"a": LayerPlan(1, 1.0, 0, (2, 2))}, 1)
    source = tmp_path / "base"
    source.mkdir()
    save_file({"a.weight": torch.zeros(2, 2)}, source / "model.safetensors")
    save_file({"a.weight": torch.full((2, 2), 5.0)}, source / "model-00001-of-00001.safetensors")
    index = source / "model.safetensors.index.json"
    for shard in ("model-00001-of-00001.safetensors", "long-gone.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a.weight": shard}}))
        write_model(None, plan.layers, None, tmp_path / shard, torch.float32, source, lambda name, weight: weight + 1)
        assert [path.name for path in (tmp_path / shard).iterdir()] == ["model.safetensors"]
        assert torch.equal(load_file(tmp_path / shard / "model.safetensors")["a.weight"], torch.ones(2, 2))


def test_no_more_than_a_shard_is_held_at_a_time(tmp_path, monkeypatch):
    model = small("llama").float()
    model.save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    limit = sum(tensor.nbytes for tensor in weights.values()) // 5
    monkeypatch.setattr("farss.merging.SHARD", limit)
    plan = Plan("lora", {"model.layers.0.mlp.up_proj": LayerPlan(1, 1.0, 0, (80, 32))}, 4)
    write_model(None, plan.layers, None, tmp_path / "merged", torch.float32, tmp_path / "base", lambda name, weight: weight + 1)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) >= 5
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= limit for file in files)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(found[name], tensor + 1) for name, tensor in weights.items())


def test_a_share_of_the_energy_is_kept_and_the_rest_is_told(tmp_path):
    adapted, plan = trained("llama", tmp_path)
    whole = export(adapted, plan, tmp_path / "whole", prompts())
    part = export(adapted, plan, tmp_path / "part", prompts(), energy=0.9)
    assert whole.lost < 1e-6 < part.lost <= 0.1**0.5
    assert part.rank <= whole.rank
    ranks = [
        sum(
            int((tensor.norm(dim=1) > 0).sum())
            for name, tensor in load_file(done.folder / "adapter_model.safetensors").items()
            if "lora_A" in name
        )
        for done in (whole, part)
    ]
    assert ranks[1] < ranks[0]


def test_merging_adds_before_it_rounds(tmp_path):
    """A change of less than the rounding of a bfloat16 weight is not rounded before it is added."""
    adapted, plan = trained("llama", tmp_path)
    name = next(iter(plan.layers))
    layer = adapted.get_submodule(f"base_model.model.{name}").base_layer
    layer.weight.data = layer.weight.data.bfloat16()
    left, right = adapter_change(adapted, name)
    expected = layer.weight.float() + (left @ right).float()
    assert torch.equal(changed_weight(adapted, name, layer.weight), expected)
    assert not torch.equal(expected.bfloat16(), layer.weight + (left @ right).bfloat16())


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": -1}, {"energy": 90}, {"energy": 0}])
def test_compressions_that_are_none_are_refused(options):
    with pytest.raises(ConfigError, match=r"export\.(rank|energy)=-?\d+: give"):
        portable_module.portable([("layer", (torch.ones(3, 2), torch.ones(2, 5)))], **options)


def test_one_layers_change_is_held_at_a_time():
    """In float64, with 7 billion weights, all of them are gigabytes."""
    alive, most = [], []

    def changes():
        for place in range(4):
            factors = torch.ones(3, 2, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64)
            alive.append([weakref.ref(factor) for factor in factors])
            yield f"layer{place}", factors
            del factors
            most.append(sum(any(ref() is not None for ref in refs) for refs in alive))

    assert len(portable_module.portable(changes()).state) == 8
    assert not any(most)  # when the next one is made


def test_a_model_of_the_hubs_cache_is_merged_file_by_file(tmp_path, monkeypatch):
    cache, revision = tmp_path / "hub", "0" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    snapshot = cache / "models--some--model" / "snapshots" / revision
    assert local_folder("some/model") == Path("some/model")  # not there yet
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(revision)
    assert local_folder("some/model") == snapshot
    assert local_folder(tmp_path) == tmp_path


def test_layers_that_are_named_alike_elsewhere_keep_their_full_names(tmp_path):
    """GPT-2 has a c_proj in its attention and in its MLP: PEFT would wrap both for the short name of one."""
    model = small("gpt2")
    found = survey(Site(model, tmp_path / "survey", 4, targets=["attn.c_proj"]), [collate(examples(), 0)])
    plan = make_plan(PlanConfig(boundary=1, rank=4, r_avg=2, r_max=4), found)
    export(attach(model, plan, found), plan, tmp_path / "adapter", prompts())
    targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert sorted(targets) == sorted(plan.layers)


def test_nothing_but_an_older_adapter_makes_way(tmp_path):
    adapted, plan = trained("llama", tmp_path)
    mine = tmp_path / "out"
    mine.mkdir()
    (mine / "checkpoint").write_text("mine")
    with pytest.raises(FolderError, match=r"out holds something other than an adapter of farss: give a new folder"):
        export(adapted, plan, mine, prompts())
    assert (mine / "checkpoint").read_text() == "mine"
    model = tmp_path / "model"  # a pruned or merged one has facts of farss beside its weights
    model.mkdir()
    for name in ("farss.json", "model.safetensors"):
        (model / name).write_text("{}")
    with pytest.raises(FolderError, match=r"model holds something other than an adapter of farss"):
        export(adapted, plan, model, prompts())
    assert {path.name for path in model.iterdir()} == {"farss.json", "model.safetensors"}
    adapter = tmp_path / "adapter"
    for _ in range(2):
        export(adapted, plan, adapter, prompts())
    (adapter / "Modelfile").write_text("mine")  # what the user puts there stays, and a form of the older adapter does not
    (adapter / "notes").mkdir()
    (adapter / "notes" / "one.txt").write_text("mine")
    (adapter / "adapter.gguf").write_text("of the older one")
    before = {path.name for path in adapter.iterdir()}
    (adapter / ".adapter.gguf.123.part").write_text("of a killed process")
    export(adapted, plan, adapter, prompts(), rank=1)
    assert {path.name for path in adapter.iterdir()} == before - {"adapter.gguf"}
    assert (adapter / "notes" / "one.txt").read_text() == "mine"


def test_compression_says_what_it_lost(tmp_path):
    adapted, plan = trained("llama", tmp_path)
    exact = export(adapted, plan, tmp_path / "exact", prompts())
    small_one = export(adapted, plan, tmp_path / "small", prompts(), rank=2)
    assert exact.lost == 0
    assert 0 < small_one.lost < 1
    assert small_one.rank == 8  # the next rank that servers accept
    assert small_one.logit_difference > exact.logit_difference


def test_an_adapter_that_would_score_wrong_is_not_kept(tmp_path, monkeypatch):
    adapted, plan = trained("llama", tmp_path)
    honest = portable_module.portable

    def wrong(*args):
        made = honest(*args)
        key = next(key for key in made.state if "lora_B" in key)
        return made._replace(state={**made.state, key: made.state[key] + 0.5})

    monkeypatch.setattr(portable_module, "portable", wrong)
    with pytest.raises(FarssError, match="logits differ by"):
        export(adapted, plan, tmp_path / "adapter", prompts())
    assert not list(tmp_path.glob("*adapter*"))


def test_step_zero_is_the_distance_from_the_base(tmp_path):
    adapted, _ = trained("llama", tmp_path)
    far = (portable_module.logits(adapted, prompts()) - portable_module.logits(small("llama"), prompts())).abs().max().item()
    assert far > 0.01
    assert portable_module.step_zero(adapted, prompts())["float32"] == pytest.approx(far, rel=1e-4)
