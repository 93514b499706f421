"""A small model that was taught a few answers: what it knows must be what it scores."""

import json
from copy import deepcopy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from farss.config import Config, DataConfig, EvaluateConfig, QuestionSet
from farss.evaluate import evaluate
from farss.tasks import prefix

COLOURS = ["red", "blue", "green", "black", "white", "pink", "grey", "gold"]
KNOWN = [{"question": f"{chr(97 + i)}?", "answers": [colour, "x"]} for i, colour in enumerate(COLOURS)]
UNKNOWN = [{"question": f"{letter}?", "answers": ["QQQ"]} for letter in "wxyz"]
STEPS = [{"question": f"{n}", "answers": [f"{n} {n}\n#### {2 * n}"]} for n in range(1, 5)]
TEMPLATE = "Do {instruction}\nR:"


@pytest.fixture(scope="session")
def tokenizer():
    """One token a character; BOS in front."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    for character in ["\n", *map(chr, range(32, 127))]:
        vocabulary[character] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="session")
def taught(tokenizer):
    """Knows KNOWN in the usual prompt and STEPS in the training prompt, by heart."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    texts = [f"Question: {row['question']}\nAnswer: {row['answers'][0]}\n</s>" for row in KNOWN]
    texts += [f"{TEMPLATE.replace('{instruction}', row['question'])} {row['answers'][0]}</s>" for row in STEPS]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.eos_token_id = None  # the hardest case: nothing but the tokenizer knows how an answer ends
    return model.eval()


@pytest.fixture
def model(taught):
    """A copy in float64, so that batches cannot matter."""
    copy = LlamaForCausalLM(deepcopy(taught.config)).double()
    copy.load_state_dict(taught.state_dict())
    copy.generation_config = deepcopy(taught.generation_config)
    return copy.eval()


@pytest.fixture
def files(tmp_path):
    """The question files, by name."""
    tables = {"known": KNOWN, "mixed": KNOWN + UNKNOWN, "steps": STEPS, "text": [{"text": "Question: a"}, {"text": "b?\nAnswer: red"}]}
    for name, rows in tables.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(tmp_path / f"{name}.jsonl") for name in tables}


def asking(knowledge=(), task=(), **options):
    """A configuration with short training prompts."""
    return Config(data=DataConfig(template=TEMPLATE), evaluate=EvaluateConfig(knowledge=list(knowledge), task=list(task), **options))


def recorded(model, function):
    """Token rows that reach the model's forward while `function` runs."""
    rows = []

    def record(_, args, options):
        rows.append(options["input_ids"] if "input_ids" in options else args[0])

    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    function()
    hook.remove()
    return rows


@pytest.fixture
def whole_prompts(monkeypatch):
    """Every prompt is read from its first token on."""
    monkeypatch.setattr(prefix, "WORTH", 10**6)


@pytest.fixture
def three(model, tokenizer, files, tmp_path):
    """Folders of a base model, of one that forgot (its last layer is damped), and of full fine-tuning (here the base)."""
    config = asking([QuestionSet("mixed", files["mixed"])], [QuestionSet("steps", files["steps"])], text=files["text"], resamples=200)
    evaluate(model, tokenizer, config, tmp_path / "base")
    evaluate(model, tokenizer, config, tmp_path / "full")
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("b")] *= -0.5  # no more black and blue
    evaluate(model, tokenizer, config, tmp_path / "after")
    return config, tmp_path
