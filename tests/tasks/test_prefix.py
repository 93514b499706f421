"""The examples before every question are read once: nothing else about the answers may change."""

import pytest
import torch
import transformers
from small_models import ARCHITECTURES, small

from farss import world
from farss.tasks import live, prefix

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

SHOWN = "Question: Where does Anna live?\nAnswer: in the red house\n\n" * 2
QUESTIONS = ["Where is the tower?", "Who", "Which town has a river and a bridge over it?", "When was it?", "Why?"]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(world.MODEL)


def big_enough(kind, tokenizer, **options):
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return small(kind, vocab_size=len(tokenizer), max_position_embeddings=512, **ids, **options)


def asked(model, tokenizer, shown=SHOWN):
    """Answers and log-likelihoods, and how many tokens the model read for them."""
    read = []
    hook = model.register_forward_pre_hook(
        lambda module, args, options: read.append(args[0] if args else options["input_ids"]), with_kwargs=True
    )
    one = live.live_model(model, tokenizer, 2, None)
    prompts = [f"{shown}Question: {question}\nAnswer:" for question in QUESTIONS]
    with live.asking(model):
        one.start("questions")
        options = {"until": [], "max_gen_toks": 6, "do_sample": False}
        answers = one.generate_until([Instance("generate_until", {}, (each, options), place) for place, each in enumerate(prompts)])
        found = one.loglikelihood([Instance("loglikelihood", {}, (each, " the river"), place) for place, each in enumerate(prompts)])
    hook.remove()
    return answers, [value for value, _ in found], sum(tokens.numel() for tokens in read)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_sharing_changes_nothing_but_the_work(kind, tokenizer, monkeypatch):
    model = big_enough(kind, tokenizer, **({"sliding_window": 256} if kind == "gemma3" else {}))
    answers, likelihoods, read = asked(model, tokenizer)
    monkeypatch.setattr(prefix, "WORTH", 10**6)
    alone, apart, all_of_it = asked(model, tokenizer)
    assert answers == alone
    assert likelihoods == pytest.approx(apart, rel=1e-9)
    assert read < 0.6 * all_of_it


def test_a_peft_model_shares_too(tokenizer, monkeypatch):
    import peft

    torch.manual_seed(1)
    adapted = peft.get_peft_model(big_enough("llama", tokenizer), peft.LoraConfig(r=4, init_lora_weights=False)).double().eval()
    answers, likelihoods, read = asked(adapted, tokenizer)
    monkeypatch.setattr(prefix, "WORTH", 10**6)
    alone, apart, all_of_it = asked(adapted, tokenizer)
    assert (answers, read < 0.6 * all_of_it) == (alone, True)
    assert likelihoods == pytest.approx(apart, rel=1e-9)


def test_nothing_is_shared_where_it_would_change_the_answers(tokenizer):
    """A sliding window counts slots, so padding in the middle would push the examples out of it."""
    prompts = [list(range(3, 40)), [*range(3, 39), 50]]
    model = big_enough("gemma3", tokenizer, sliding_window=32)
    assert prefix.shared_prefix(model, prompts, 37) is None
    assert prefix.shared_prefix(model, prompts, 32) is not None
    model.config.model_type = "mpt"  # it counts slots everywhere
    assert prefix.shared_prefix(model, prompts, 32) is None


def test_nothing_is_shared_where_little_is_common(tokenizer):
    model = big_enough("llama", tokenizer)
    common = list(range(3, 3 + prefix.WORTH))
    assert prefix.shared_prefix(model, [[*common, 4], [*common, 5]], 40) is not None
    assert prefix.shared_prefix(model, [[*common[:-1], 4], [*common[:-1], 5]], 40) is None
    assert prefix.shared_prefix(model, [[*common, 4]], 40) is None
    assert prefix.shared_prefix(model, [common, common], 40) is None, "each prompt keeps a token of its own"


def test_padding_moves_behind_the_prefix():
    known = prefix.Prefix(torch.tensor([7, 8, 9]), None)
    tokens = torch.tensor([[0, 0, 7, 8, 9, 4], [7, 8, 9, 1, 2, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    moved, masks = known.to_front(tokens, mask)
    assert moved.tolist() == [[7, 8, 9, 0, 0, 4], [7, 8, 9, 1, 2, 3]]
    assert masks.tolist() == [[1, 1, 1, 0, 0, 1], [1] * 6]
    assert known.to_front(torch.tensor([[0, 7, 8, 5, 9, 4]]), torch.tensor([[0, 1, 1, 1, 1, 1]])) is None
