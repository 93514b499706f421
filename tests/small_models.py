"""Small models and token rows built in memory. Nothing here needs a network."""

from pathlib import Path

import torch
import transformers

from farss import world
from farss.adapter import attach
from farss.batches import batches, collate
from farss.config import PlanConfig
from farss.plan import make_plan
from farss.structure import find_blocks, target_layers
from farss.survey import Site, survey

VOCABULARY = 97
MIXTURE = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
"""Of which the first block is dense, and the others have an expert that every token goes to."""

MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
EAGER = {"attn_implementation": "eager"}


def quadratic_form(change, activation, gradient):
    """`tr(G X A X^T)` of a change `X [m, n]`, with `A [n, n]` and `G [m, m]` (FARSS, eq. 6 and 29)."""
    return ((gradient @ change @ activation) * change).sum()


def small(kind: str, **options):
    """A small random model of an architecture, float64, in eval mode."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "sdpa",
        "experts_implementation": "eager",  # in float64 there is no other
    }
    special = {
        "llama": (transformers.LlamaConfig, {}),
        "llama-gqa": (transformers.LlamaConfig, {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
        "gemma3": (
            transformers.Gemma3TextConfig,
            {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        ),
        "qwen3": (transformers.Qwen3Config, {"num_key_value_heads": 2, "head_dim": 8}),
        "gpt2": (
            transformers.GPT2Config,
            {"n_embd": 32, "n_head": 4},
        ),
        "phi3": (transformers.Phi3Config, {"num_key_value_heads": 2}),
        "gpt-neox": (transformers.GPTNeoXConfig, {}),
        "deepseek-v3": (
            transformers.DeepseekV3Config,
            {**MIXTURE, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
        ),
        "zamba2": (
            transformers.Zamba2Config,
            {
                "layers_block_type": ["mamba", "hybrid"] * 2,
                "num_mem_blocks": 1,
                "adapter_rank": 2,
                "mamba_d_state": 8,
                "mamba_headdim": 16,
                "mamba_ngroups": 1,
                "n_mamba_heads": 4,
            },
        ),
        "granite-moe": (
            transformers.GraniteMoeConfig,
            {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        "mixtral": (
            transformers.MixtralConfig,
            {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        ),
        "granite-hybrid": (
            transformers.GraniteMoeHybridConfig,
            {**MAMBA, "num_local_experts": 0, "shared_intermediate_size": 48, "layer_types": ["mamba", "attention"] * 2},
        ),
        "bamba": (transformers.BambaConfig, {**MAMBA, "attn_layer_indices": [1, 3]}),
        "falcon-h1": (transformers.FalconH1Config, {**MAMBA, "mamba_d_ssm": 64, "head_dim": 8}),
        "falcon": (transformers.FalconConfig, {"multi_query": True}),
        "bloom": (transformers.BloomConfig, EAGER),
        "mpt": (transformers.MptConfig, EAGER),
        "gpt-neox-japanese": (transformers.GPTNeoXJapaneseConfig, {**EAGER, "intermediate_multiple_size": 2}),
        "mamba": (transformers.MambaConfig, {"state_size": 8, "attn_implementation": None}),
        "mamba2": (
            transformers.Mamba2Config,
            {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "attn_implementation": None},
        ),
        "falcon-mamba": (transformers.FalconMambaConfig, {"state_size": 8, "attn_implementation": None}),
        "jamba": (
            transformers.JambaConfig,
            {"num_experts": 1, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
        ),
        "nemotron-h": (
            transformers.NemotronHConfig,
            {"hybrid_override_pattern": "M-M*", "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1},
        ),
        "llama4": (
            transformers.Llama4TextConfig,
            {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "head_dim": 8},
        ),
        "phimoe": (transformers.PhimoeConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
        "gemma3n": (
            transformers.Gemma3nTextConfig,
            {
                "num_key_value_heads": 1,
                "head_dim": 8,
                "altup_num_inputs": 2,
                "laurel_rank": 4,
                "num_kv_shared_layers": 0,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": VOCABULARY,
                "activation_sparsity_pattern": [0.0] * 4,
                "intermediate_size": [64] * 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
        ),
        "recurrent-gemma": (
            transformers.RecurrentGemmaConfig,
            {"num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"], **EAGER},
        ),
        "modernbert-decoder": (transformers.ModernBertDecoderConfig, {"global_attn_every_n_layers": 2, "local_attention": 8}),
        "glm4-moe": (transformers.Glm4MoeConfig, {**MIXTURE, "head_dim": 8}),
    }
    config_class, extra = special[kind]
    values = {**common, **extra, **options}
    if kind == "gpt2":
        keep = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "attn_implementation")
        named = {"n_layer": values["num_hidden_layers"], "n_positions": values["max_position_embeddings"]}
        values = {**{key: values[key] for key in keep}, **extra, **named}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**values), dtype=torch.float64)
    with torch.no_grad():  # default initialisation is so small that every layer is nearly linear
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def save_small(kind: str, folder: Path, **options) -> Path:
    """The same in float32 with the embedded world's tokenizer, written to a folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.MODEL)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = small(kind, vocab_size=len(tokenizer), max_position_embeddings=256, **ids, **options).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


ARCHITECTURES = ("llama", "llama-gqa", "gemma3", "qwen3", "gpt2", "phi3", "gpt-neox")


def examples(count=6, length=11, seed=0):
    """Token rows of different lengths with a supervised end, as `data.Tokenized.rows` holds them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        size = length - (index * 2) % 5
        ids = torch.randint(3, VOCABULARY, (size,), generator=generator).tolist()
        rows.append({"input_ids": ids, "completion_mask": [0] * 4 + [1] * (size - 4)})
    return rows


def shapes(model):
    """The target layers of a model, and how many blocks it has, as `survey_cap` wants them."""
    return target_layers(model), len(find_blocks(model)[1])


def collated(rows, size=2, side="right"):
    parts = [collate(part, 0) for part in batches(rows, size)]
    return [padded_left(part) for part in parts] if side == "left" else parts


def padded_left(batch):
    """The same with its padding in front."""
    gaps = (batch["attention_mask"] == 0).sum(1).tolist()
    moved = {name: torch.stack([row.roll(gap) for row, gap in zip(values, gaps, strict=True)]) for name, values in batch.items()}
    return {**moved, "position_ids": (moved["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def language_loss(model, row):
    """Summed loss of one example's supervised tokens."""
    batch = collate([row], 0)
    labels = batch.pop("labels")
    logits = model(**{k: v for k, v in batch.items() if k != "position_ids"}).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")


CONFIG = PlanConfig(boundary=2, rank=8, r_min=1, r_avg=4, r_max=6, alpha=16.0)


def surveyed(kind, folder, dtype=torch.float32, **options):
    model = small(kind, **options).to(dtype)
    found = survey(Site(model, folder, 8), [collate(part, 0) for part in batches(examples(), 3)])
    return model, found, make_plan(CONFIG, found)


def logits(model):
    batch = collate(examples(), 0)
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found[batch["attention_mask"].bool()]


def trained(kind, folder, dtype=torch.float32):
    """A model after a made-up training."""
    model, found, plan = surveyed(kind, folder / "survey", dtype)
    adapted = attach(model, plan, found)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return adapted.eval(), plan


def prompts():
    batch = collate(examples(3), 0)
    return {key: batch[key] for key in ("input_ids", "attention_mask")}
