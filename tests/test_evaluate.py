"""Questions to small models that were taught a few answers: what they know must be what they score."""

import dataclasses
import importlib.util
import itertools
import json
import logging
import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from farss.artifacts import Scores, questions
from farss.config import Config, DataConfig, EvaluateConfig, QuestionSet
from farss.errors import ConfigError, DataError, FarssError, FolderError
from farss.evaluate import _training_prompt, check_reference, evaluate
from farss.tasks import prefix
from farss.tasks.grading import METRICS, contains, exact_match, final_number, normalise, number, same_mathematics
from farss.tasks.questions import draw, prompt_of, prompts_of
from farss.tasks.records import question_score
from farss.tasks.summary import read_scores, summarise
from farss.tasks.text import rows_that_fit

pytest.importorskip("lm_eval")

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


# --- scores ----------------------------------------------------------------------------------------------------------


def test_a_model_scores_what_it_knows(model, tokenizer, files, tmp_path):
    config = asking([QuestionSet("mixed", files["mixed"])], [QuestionSet("steps", files["steps"], metric="number")])
    scores = evaluate(model, tokenizer, config, tmp_path)
    assert scores.knowledge["mixed"].score == 8 / 12
    assert scores.knowledge["mixed"].questions == 12
    assert scores.task["steps"].score == 1.0
    records = questions(tmp_path / "scores", "mixed")
    assert [r["score"] for r in records] == [1.0] * 8 + [0.0] * 4
    assert records[1] == {
        "id": 1, "prompt": "Question: b?\nAnswer:", "gold": ["blue", "x"], "answer": "blue",
        "gold_loglikelihood": records[1]["gold_loglikelihood"], "score": 1.0,
    }  # fmt: skip
    assert min(r["gold_loglikelihood"] for r in records[:8]) > max(r["gold_loglikelihood"] for r in records[8:]) + 5
    assert questions(tmp_path / "scores", "steps")[3]["answer"] == "4 4\n#### 8"


def test_an_answer_in_the_training_prompt_ends_at_eos_alone(model, tokenizer, files, tmp_path):
    scores = evaluate(model, tokenizer, asking(task=[QuestionSet("steps", files["steps"])]), tmp_path)
    assert scores.task["steps"].score == 1.0
    assert scores.task["steps"].metric == "exact_match"


def test_gold_loglikelihood_is_that_of_torch(model, tokenizer, files, tmp_path):
    evaluate(model, tokenizer, asking([QuestionSet("mixed", files["mixed"], fewshot=2)]), tmp_path)
    for record in questions(tmp_path / "scores", "mixed")[::3]:
        prompt, whole = (tokenizer(text).input_ids for text in (record["prompt"], f"{record['prompt']} {record['gold'][0]}"))
        logits = model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        direct = logits.gather(1, torch.tensor(whole[len(prompt) :])[:, None]).sum().item()
        assert record["gold_loglikelihood"] == pytest.approx(direct, abs=1e-9)


def test_a_right_answer_begins_where_its_prompt_ends(model, tokenizer, files, tmp_path):
    """Training does not learn the line break at the end of a template, so it is no part of the answer."""
    config = asking(task=[QuestionSet("steps", files["steps"])])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, template="Q: {instruction}\nA:\n"))
    evaluate(model, tokenizer, config, tmp_path)
    for record in questions(tmp_path / "scores", "steps"):
        assert record["prompt"].endswith("\nA:\n")
        prompt, whole = (tokenizer(text).input_ids for text in (record["prompt"], record["prompt"] + record["gold"][0]))
        logits = model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        direct = logits.gather(1, torch.tensor(whole[len(prompt) :])[:, None]).sum().item()
        assert record["gold_loglikelihood"] == pytest.approx(direct, abs=1e-9)


def test_batches_do_not_matter(model, tokenizer, files, tmp_path):
    entry = QuestionSet("mixed", files["mixed"], fewshot=1)
    runs = []
    for size in (1, 5, 16):
        evaluate(model, tokenizer, asking([entry], batch_size=size, text=files["text"]), tmp_path / str(size))
        runs.append((questions(tmp_path / str(size) / "scores", "mixed"), json.loads((tmp_path / str(size) / "scores.json").read_text())))
    for records, scores in runs[1:]:
        assert scores["text_loss"] == pytest.approx(runs[0][1]["text_loss"], abs=1e-12)
        for found, first in zip(records, runs[0][0], strict=True):
            assert found == first | {"gold_loglikelihood": pytest.approx(first["gold_loglikelihood"], abs=1e-9)}


def test_text_loss_is_the_mean_over_tokens(model, tokenizer, files, tmp_path):
    scores = evaluate(model, tokenizer, asking(text=files["text"]), tmp_path)
    total, count = 0.0, 0
    for text in ("Question: a", "b?\nAnswer: red"):
        ids = torch.tensor(tokenizer(text).input_ids)
        total -= model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).sum().item()
        count += len(ids) - 1
    assert scores.text_loss == pytest.approx(total / count, abs=1e-9)
    assert scores.knowledge == scores.task == {}


def test_penalties_in_the_generation_settings_do_not_matter(model, tokenizer, files, tmp_path):
    config = asking([QuestionSet("known", files["known"])])
    model.generation_config.repetition_penalty, model.generation_config.do_sample = 5.0, True
    assert evaluate(model, tokenizer, config, tmp_path).knowledge["known"].score == 1.0


# --- how it is asked -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("whole_prompts")
def test_bos_stands_in_front_exactly_once(model, tokenizer, files, tmp_path):
    config = asking([QuestionSet("known", files["known"], fewshot=2)], [QuestionSet("steps", files["steps"])])
    rows = recorded(model, lambda: evaluate(model, tokenizer, config, tmp_path))
    whole = [row for batch in rows if batch.shape[1] > 1 for row in batch]
    assert len(whole) == 2 * (6 + 4)
    for row in whole:
        assert (row == 1).sum() == 1
        assert row[row != 0][0] == 1


@pytest.mark.parametrize(("opening", "count"), [("<s>", 1), ("", 0)])
@pytest.mark.usefixtures("whole_prompts")
def test_a_chat_template_decides_about_bos_itself(opening, count, model, tokenizer, files, tmp_path):
    chatty = deepcopy(tokenizer)
    chatty.chat_template = opening + "{% for m in messages %}U{{ m['content'] }}{% endfor %}A"
    config = replace(asking(task=[QuestionSet("steps", files["steps"])]), data=DataConfig(template="chat"))
    rows = recorded(model, lambda: evaluate(model, chatty, config, tmp_path))
    assert {int((row == 1).sum()) for batch in rows if batch.shape[1] > 1 for row in batch} == {count}
    with pytest.raises(ConfigError, match="cannot be shown in a chat"):
        evaluate(model, chatty, replace(config, evaluate=EvaluateConfig(task=[QuestionSet("s", files["steps"], fewshot=1)])), tmp_path)


@pytest.mark.usefixtures("whole_prompts")
def test_generation_uses_the_cache_even_after_gradient_checkpointing(model, tokenizer, files, tmp_path):
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    rows = recorded(model, lambda: evaluate(model, tokenizer, asking([QuestionSet("known", files["known"])]), tmp_path))
    assert [batch.shape[1] for batch in rows[1:4]] == [1, 1, 1]
    assert model.training
    assert all(module.training for module in model.modules())
    assert model.is_gradient_checkpointing


@pytest.mark.usefixtures("whole_prompts")
def test_a_peft_model_is_asked_without_a_merge(model, tokenizer, files, tmp_path):
    base = evaluate(model, tokenizer, asking([QuestionSet("mixed", files["mixed"])]), tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")).double()
    rows = recorded(model, lambda: evaluate(adapted, tokenizer, asking([QuestionSet("mixed", files["mixed"])]), tmp_path / "peft"))
    assert [batch.shape[1] for batch in rows[1:4]] == [1, 1, 1]
    found, expected = (questions(tmp_path / folder / "scores", "mixed") for folder in ("peft", "base"))
    assert [r["answer"] for r in found] == [r["answer"] for r in expected]
    assert base.knowledge["mixed"].score == 8 / 12
    assert any("lora" in name for name, _ in adapted.named_parameters())


def test_nothing_is_changed(model, tokenizer, files, tmp_path):
    tokenizer._tokenizer.no_padding()  # what another test padded with would be taken for its padding token
    bare = tokenizer.__class__(tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    level = logging.getLogger("lm_eval").level
    evaluate(model, bare, asking([QuestionSet("known", files["known"])]), tmp_path)
    assert bare.pad_token is None
    assert logging.getLogger("lm_eval").level == level


def test_examples_are_shown_and_never_asked():
    rows = [*KNOWN, KNOWN[0]]
    for seed in range(5):
        drawn = draw(QuestionSet("q", "q.jsonl", fewshot=3), rows, seed)
        shown = {row["question"] for row in drawn.shown}
        assert len(drawn.shown) == 3
        assert not shown & {row["question"] for row in drawn.asked}
        assert [row["id"] for row in drawn.asked] == sorted(row["id"] for row in drawn.asked)


def test_examples_may_come_from_a_file_of_their_own(model, tokenizer, files, tmp_path):
    shown = [{"question": "a?", "answers": ["red"]}, {"question": "over there?", "answers": ["here"]}]
    (tmp_path / "shown.jsonl").write_text("\n".join(map(json.dumps, shown)))
    entry = QuestionSet("known", files["known"], fewshot=2, examples=str(tmp_path / "shown.jsonl"))
    evaluate(model, tokenizer, asking([entry]), tmp_path)
    prompts = [record["prompt"] for record in questions(tmp_path / "scores", "known")]
    assert len(prompts) == len(KNOWN) - 1, "what is shown is not asked"
    assert all("Question: over there?\nAnswer: here\n\n" in prompt and "Question: a?\nAnswer: red\n\n" in prompt for prompt in prompts)
    with pytest.raises(ConfigError, match=r"shown.jsonl has 2 questions, and fewshot=3 are to be shown"):
        evaluate(model, tokenizer, asking([replace(entry, fewshot=3)]), tmp_path)


def test_the_prompt_shows_answered_examples(model, tokenizer, files, tmp_path):
    evaluate(model, tokenizer, asking([QuestionSet("known", files["known"], fewshot=2, limit=3)]), tmp_path)
    records = questions(tmp_path / "scores", "known")
    shown = {record["prompt"].rsplit("\n\n", 1)[0] for record in records}
    assert len(records) == 3
    assert len(shown) == 1
    assert shown.pop().count("Answer: ") == 2


def test_other_questions_are_asked_and_count_for_nothing(model, tokenizer, files, tmp_path):
    known, plain = QuestionSet("known", files["known"]), QuestionSet("plain", files["known"], prompt="{question}", metric="contains")
    config = replace(asking([known]), evaluate=EvaluateConfig(knowledge=[known], other=[plain], resamples=100))
    for folder in ("base", "after"):
        scores = evaluate(model, tokenizer, config, tmp_path / folder)
    assert (list(scores.knowledge), list(scores.other)) == (["known"], ["plain"])
    assert "a?" in [record["prompt"] for record in questions(tmp_path / "base" / "scores", "plain")]
    summary = summarise(tmp_path / "base", tmp_path / "after", None, config)
    assert [(line.name, line.kind) for line in summary.benchmarks] == [("known", "knowledge"), ("plain", "other")]
    assert summary.K.value == 1


def test_the_seed_chooses_the_questions():
    entry = QuestionSet("q", "q.jsonl", limit=4)
    rows = KNOWN + UNKNOWN
    assert draw(entry, rows, 1) == draw(entry, rows, 1)
    assert draw(entry, rows, 1) != draw(entry, rows, 2)
    assert {row["id"] for row in draw(entry, rows, 1).asked} < {row["id"] for row in draw(replace(entry, limit=8), rows, 1).asked}


# --- continuing ------------------------------------------------------------------------------------------------------


def test_a_killed_evaluation_continues_with_the_next_benchmark(model, tokenizer, files, tmp_path):
    config = asking([QuestionSet("known", files["known"])], [QuestionSet("steps", files["steps"])], text=files["text"])
    told = []

    def tell(name, done, total):
        told.append((name, done, total))
        if name == "steps" and killed:
            raise KeyboardInterrupt

    killed = True
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, config, tmp_path, on_progress=tell)
    assert not (tmp_path / "scores.json").exists()
    assert told[-2] == ("known", 16, 16)
    killed = False
    told.clear()
    evaluate(model, tokenizer, config, tmp_path, on_progress=tell)
    assert {name for name, *_ in told} == {"steps", "text"}
    told.clear()
    evaluate(model, tokenizer, config, tmp_path, on_progress=tell)
    assert told == []


def test_a_full_gpu_is_named_with_its_cure(model, tokenizer, files, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(LlamaForCausalLM, "forward", full)
    config = asking([QuestionSet("known", files["known"])], batch_size=6)
    cure = "set evaluate.batch_size=3, or fewer compare.jobs where they share it, and run again"
    with pytest.raises(FarssError, match=rf"memory is full with 6 prompts at a time: {cure}"):
        evaluate(model, tokenizer, config, tmp_path)


def test_other_weights_or_questions_are_asked_again(model, tokenizer, files, tmp_path):
    config = asking([QuestionSet("known", files["known"])])
    assert evaluate(model, tokenizer, config, tmp_path).knowledge["known"].score == 1.0
    told = []
    evaluate(model, tokenizer, replace(config, seed=1), tmp_path, on_progress=lambda *args: told.append(args))
    assert told
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert evaluate(model, tokenizer, config, tmp_path).knowledge["known"].score == 0.0


@pytest.mark.parametrize(("metric", "rules"), [("exact_match", {}), ("exact_match", {"grading": 3}), ("number", {"grading": 2})])
def test_answers_are_graded_again_and_not_asked_again_when_the_rules_change(metric, rules, model, tokenizer, files, tmp_path, monkeypatch):
    """By today's rules a folder is as if it had been asked today; answers of other weights are asked for all the same."""
    config = asking(task=[QuestionSet("steps", files["steps"], metric=metric)])
    monkeypatch.setattr("farss.evaluate.grading", lambda entries: rules)
    monkeypatch.setitem(METRICS, metric, lambda answer, accepted: 0.25)
    assert evaluate(model, tokenizer, config, tmp_path / "old").task["steps"].score == 0.25
    monkeypatch.undo()
    told = []
    scores = evaluate(model, tokenizer, config, tmp_path / "old", on_progress=lambda *args: told.append(args))
    assert told == []
    new = evaluate(model, tokenizer, config, tmp_path / "new")
    assert replace(scores.task["steps"], seconds=0) == replace(new.task["steps"], seconds=0)
    old_key, new_key = (json.loads((tmp_path / each / "scores" / "steps.json").read_text())["key"] for each in ("old", "new"))
    assert old_key == new_key
    assert questions(tmp_path / "old" / "scores", "steps") == questions(tmp_path / "new" / "scores", "steps")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    evaluate(model, tokenizer, config, tmp_path / "old", on_progress=lambda *args: told.append(args))
    assert told


def test_answers_are_asked_again_where_something_else_stands_before_them(model, tokenizer, files, tmp_path, monkeypatch):
    config = asking([QuestionSet("known", files["known"], prompt="Q: {question}\nA:\n")])
    monkeypatch.setattr("farss.evaluate.grading", lambda entries: {"grading": 2})
    evaluate(model, tokenizer, config, tmp_path)
    monkeypatch.undo()
    told = []
    evaluate(model, tokenizer, config, tmp_path, on_progress=lambda *args: told.append(args))
    assert told
    record = questions(tmp_path / "scores", "known")[0]
    prompt, whole = (tokenizer(text).input_ids for text in (record["prompt"], f"{record['prompt']}{record['gold'][0]}"))
    logits = model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    direct = logits.gather(1, torch.tensor(whole[len(prompt) :])[:, None]).sum().item()
    assert record["gold_loglikelihood"] == pytest.approx(direct, abs=1e-9)  # as in training: no space behind the line break


# --- tasks of the harness --------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A hub that has a few rows of everything."""
    import datasets

    rows = {
        "google-research-datasets/nq_open": [{"question": r["question"], "answer": r["answers"]} for r in KNOWN],
        "stanfordnlp/web_questions": KNOWN,
        "openai/gsm8k": [{"question": r["question"], "answer": r["answers"][0]} for r in STEPS],
        "EleutherAI/hendrycks_math": [{"problem": "1", "solution": "It is $\\boxed{2}$."}, {"problem": "2", "solution": "$\\boxed{5}$"}],
    }

    def load_dataset(path, name=None, **_):
        table = datasets.Dataset.from_list(rows[path])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), table))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_harness_tasks_by_name(hub, model, tokenizer, tmp_path):
    model.config.max_position_embeddings = 2048
    config = asking(["nq_open", "webqs"], limit=5)
    scores = evaluate(model, tokenizer, config, tmp_path)
    assert scores.knowledge["nq_open"].questions == scores.knowledge["webqs"].questions == 5
    assert scores.knowledge["webqs"].score == 1.0  # its prompt is the one that was taught
    assert "lm_eval" in scores.knowledge["webqs"].version
    records = questions(tmp_path / "scores", "webqs")
    assert all(record["answer"] == record["gold"][0] for record in records)
    assert all(math.isfinite(record["gold_loglikelihood"]) for record in records)
    assert [r["id"] for r in records] == [r["id"] for r in questions(tmp_path / "scores", "nq_open")]


def test_the_shipped_tasks_use_the_training_prompt(hub, model, tokenizer, tmp_path):
    model.config.max_position_embeddings = 2048
    scores = evaluate(model, tokenizer, asking(task=["farss_gsm8k", "farss_math"], limit=3), tmp_path)
    assert scores.task["farss_math"].questions == 3
    records = questions(tmp_path / "scores", "farss_gsm8k")
    assert records[0]["prompt"].startswith("Do ")
    assert records[0]["prompt"].endswith("\nR: Let's think step by step.")
    assert all("farss_math_" in r["id"] for r in questions(tmp_path / "scores", "farss_math"))
    assert (
        _training_prompt(DataConfig(template="{instruction}\nA:\n"), tokenizer)({"question": "2 + 2?"})
        == "2 + 2?\nA:\nLet's think step by step."
    )


@pytest.mark.parametrize(
    ("value", "score"),
    [(True, 1.0), (0.25, 0.25), ([True, False], 0.5), ((1, 1), 1.0), ((1, 0), 0.0), ("text", None), ([], None), (float("nan"), None)],
)
def test_metric_values_become_question_scores(value, score):
    assert question_score(value) == score


def test_logits_stay_below_their_bound():
    assert rows_that_fit(16, 150, 32_000) == 16
    assert rows_that_fit(16, 512, 262_144) == 2
    assert rows_that_fit(16, 100_000, 262_144) == 1


# --- grading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("2 + 2 = 4\n#### 4", "#### 4", 1), ("The answer is: 42", "#### 42", 1), ("The answer is 42.", "#### 42", 1),
        ("she has 7 left, 3 gone", "#### 3", 1), ("#### 1,234.50", "1234.5", 1), ("$18", "18.00", 1), ("-3", "3", 0),
        ("The answer is: 5 and then 6", "5", 1), ("The answer is: none, 5 apples", "5", 1), ("no idea", "5", 0), ("", "5", 0),
        ("The answer is: 1/2", "0.5", 1), ("1/0", "5", 0), ("#### \n The answer is:", "5", 0), ("0.1", ".1", 1),
        ("#### Step 2: so it is 12", "12", 1), ("#### **42** (6 times 7)", "42", 1),
        ("#### €40 for 2 people", "40", 1), ("#### -5", "-5", 1), ("it is − 7", "-7", 1), ("so\n  - 5 apples", "5", 1),
        ("20-25", "25", 1), ("1e-05", "0.00001", 1), ("#### 1.5e3", "1500", 1), ("5e", "5", 1), ("3e4x", "3", 0),
        ("-$3", "-3", 1), ("9" * 5000, "9", 0),
    ],
)  # fmt: skip
def test_numbers(answer, gold, score):
    assert number(answer, [gold]) == score


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        *(("C++", "C", 0), ("C#", "C", 0), ("x>=5", "x<=5", 0), ("a+b", "a-b", 0), ("x^2", "x2", 0), ("a*b", "ab", 0), ("A", "A+", 0)),
        *(("**Paris**", "Paris", 1), ("#1", "1", 1), ("`C++`.", "c++", 1), ("non-fiction", "nonfiction", 1), ("> Paris", "Paris", 1)),
    ],
)
def test_names_and_formulas_keep_what_they_are_made_of(answer, accepted, right):
    assert exact_match(answer, [accepted]) == right


@pytest.mark.parametrize(
    ("answer", "accepted", "exact", "within"),
    [
        *(("北京。", "北京", 1, 1), ("答案是北京。", "北京", 0, 1), ("«Madrid»", "Madrid", 1, 1), ("¿Madrid?", "madrid", 1, 1)),
        *(("Beyonce\u0301", "Beyonc\u00e9", 1, 1), ("서울입니다", "서울", 0, 1), ("Madrids", "Madrid", 0, 0)),
    ],
)
def test_other_languages(answer, accepted, exact, within):
    assert (exact_match(answer, [accepted]), contains(answer, [accepted])) == (exact, within)


def test_a_text_without_a_number_has_none():
    assert final_number("none") is None
    assert number("none", ["none"]) == 0  # never an answer compared with itself


def test_texts():
    assert normalise(" The  U.S.A., an Answer!") == "usa answer"
    assert exact_match("the Beatles.", ["Beatles"]) == 1
    assert exact_match("Beatles band", ["Beatles"]) == 0
    for answer, right in (
        (" a ", 1),
        ("A.", 1),
        ("(A)", 1),
        ("", 0),
        ("the", 0),
        ("+", 0),
        ("A cat", 0),
    ):  # nothing is left of "A", which is an article
        assert exact_match(answer, ["A"]) == contains(answer, ["A"]) == right
    assert [contains(answer, ["A"]) for answer in ("A. Paris", "It is A", "(A) Paris", "It is a cat", "B. A cat")] == [
        1,
        1,
        1,
        0,
        0,
    ]
    assert [contains(answer, ["Vitamin A"]) for answer in ("vitamin C", "Vitamin A is one", "it is vitamin A")] == [0, 1, 1]
    assert contains("It is Serie A", ["the Serie A"]) == 1
    assert contains("king of France", ["the king of the France"]) == contains("the king of the France", ["king of France"]) == 1
    assert contains("It was the Beatles band", ["beatles"]) == 1
    assert contains("beetlesque", ["beetles", "the"]) == 0


def test_numbers_are_equal_when_they_are_however_they_are_written():
    values = [-1500.5, -15, -5, -1.5, -0.5, 0.5, 1.5, 5, 15, 50, 1500, 1500.5]
    for way, other, unit in itertools.product(("{}", "{:.3f}", "{:,.2f}", "${:,}", "{:g}."), ("{}", "{:,.1f}", "**{}**"), ("", " km")):
        for one, two in itertools.product(values, values):
            answer, accepted = way.format(one) + unit, other.format(two) + unit
            assert exact_match(answer, [accepted]) == (one == two), (answer, accepted)
            assert contains(f"It is {answer}", [accepted]) == (one == two), (answer, accepted)


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        *(("15", "1.5", 0), ("5", "-5", 0), ("−5", "-5", 1), ("50", "5.0", 0), ("5", "5.0", 1), ("5.", "5", 1), ("1,000", "1000", 1)),
        *(("$5", "5", 1), ("1.5%", "15%", 0), ("5%", "5", 1), ("007", "7", 0), ("007", "007", 1), ("6.30 pm", "6:30 pm", 1)),
        *(("15 km", "1.5 km", 0), ("$843 million", "$84.3 million", 0), ("1.50 km", "1.5 km", 1), (".5", "0.5", 1), (".5", "5", 0)),
        *(("12", "1/2", 0), ("1/2", "1/2", 1), ("2025", "20-25", 0), ("1914–1918", "1914-1918", 1), ("(-3)", "-3", 1), ("-$3", "3", 0)),
        *(("1e-3", "1e3", 0), ("1E-3", "1e-3", 1)),
        *(("1.2.3", "123", 0), ("No 5", "No. 5", 1), ("well-known", "wellknown", 1), ("...5", "5", 1), ("x-5", "x5", 1)),
    ],
)
def test_numbers_in_answers_are_those_of_what_is_accepted(answer, accepted, right):
    assert exact_match(answer, [accepted]) == right


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        *(("Paris/London", "Paris", 1), ("Paris—the capital", "Paris", 1), ("from 1914–1918", "1914", 1), ("Smith's", "Smith", 1)),
        *(("Answer:Paris", "Paris", 1), ("rock'n'roll", "rock'n'roll", 1), ("1,000", "1", 0), ("1/2", "2", 0), ("6:30", "30", 0)),
        *(("non-fiction", "fiction", 0), ("1.5", "5", 0), ("it is 15", "1.5", 0), ("it is 1.50 m", "1.5", 1), ("it is 5", "-5", 0)),
        *(("the 1/2 mile", "12", 0), ("from 1914–1918", "1914-1918", 1), ("$5.", "5", 1), ("A-5", "5", 0)),
    ],
)
def test_words_may_stand_close_together(answer, accepted, right):
    assert contains(answer, [accepted]) == right


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("The answer is: \\frac{1}{2}", 1), ("So \\boxed{0.5}", 1), ("The answer is: $\\frac{2}{4}$.\nNext", 1),
        ("The answer is: 3", 0), ("", 0), ("\\frac{", 0),
    ],
)  # fmt: skip
def test_mathematics(answer, score):
    assert same_mathematics(answer, "Thus $\\boxed{\\frac{1}{2}}$.") == score
    assert same_mathematics(answer, "no result") == 0


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("siqa", "no task 'siqa': did you mean 'social_iqa'?"),
        ("triviaq", "did you mean 'triviaqa'?"),
        ("humaneval", "'humaneval' executes programs that the model writes"),
        ("mbpp_plus", "evaluate.run_generated_code=true"),
        ("nq_open", "the data of lm_eval's task 'nq_open' cannot be loaded"),
        ("a/b", "is also a file name"),
    ],
)
def test_harness_names_that_cannot_be_asked(entry, text, model, tokenizer, tmp_path):
    with pytest.raises(FarssError) as caught:
        evaluate(model, tokenizer, asking([entry]), tmp_path)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"fewshot": 8}, ConfigError, "8 questions, none is left to ask after showing fewshot=8"),
        ({"prompt": "Q: "}, ConfigError, "has no {question} in it"),
        ({"metric": "number"}, DataError, "the answer 'red' of question 1"),
        ({"max_tokens": 250}, ConfigError, "do not fit into the model's 256 tokens"),
        ({"max_tokens": 250}, ConfigError, "or leave out the question that ends in"),
        ({"answers": "replies"}, DataError, "replies"),
    ],
)
def test_question_sets_that_cannot_be_asked(options, error, text, model, tokenizer, files, tmp_path):
    with pytest.raises(error) as caught:
        evaluate(model, tokenizer, asking([QuestionSet("known", files["known"], **options)]), tmp_path)
    assert text in str(caught.value)


def test_a_right_answer_that_does_not_fit_is_not_cut(model, tokenizer, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"question": "which?", "answers": "a" * 250}))
    with pytest.raises(ConfigError, match=r"'known': a prompt of 25 tokens and its right answer of 251 do not fit .* 256 tokens.*which"):
        evaluate(model, tokenizer, asking([QuestionSet("known", str(path), max_tokens=2)]), tmp_path)


def test_without_the_harness(monkeypatch, model, tokenizer, files, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FarssError, match=r"pip install -e '.\[eval\]'"):
        evaluate(model, tokenizer, asking(["triviaqa"]), tmp_path)
    assert evaluate(model, tokenizer, asking(text=files["text"]), tmp_path).text_loss > 0  # general text alone needs none


# --- summary ---------------------------------------------------------------------------------------------------------


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


def test_summary(three, tmp_path):
    config, folder = three
    summary = summarise(folder / "base", folder / "after", folder / "full" / "scores.json", config)
    mixed, steps = summary.benchmarks
    assert summary.K.value == pytest.approx(mixed.after / mixed.before) == 6 / 8
    assert summary.K.low <= summary.K.value <= summary.K.high <= 1
    assert summary.T.value == 1.0
    assert summary.T.low == summary.T.high == 1.0  # paired: the same answers give the same ratio in every resample
    assert summary.KT.value == pytest.approx(2 * 0.75 / 1.75)
    assert summary.forgetting != 0
    assert mixed.change.value == pytest.approx(-2 / 12)
    assert mixed.gold_change.value == pytest.approx(mixed.gold_after - mixed.gold_before)
    assert (steps.full, steps.full_low, mixed.full) == (1.0, 1.0, 8 / 12)
    summary.save(tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == dataclasses.asdict(summary)


def test_summary_without_full_fine_tuning(three):
    config, folder = three
    summary = summarise(folder / "base", folder / "after", None, config)
    assert summary.K is not None
    assert summary.T is summary.KT is None
    assert summary.benchmarks[1].full is None
    assert "evaluate.full_scores" in summary.notes[0]


def test_another_reference_than_full_fine_tuning_is_named(three):
    config, folder = three
    scores = Scores.load(folder / "full" / "scores.json")
    replace(scores, meta=scores.meta | {"method": "lora"}).save(folder / "full" / "scores.json")
    summary = summarise(folder / "base", folder / "after", folder / "full", config)
    assert summary.T is not None
    assert "T is relative to the run of lora that evaluate.full_scores names, and not to full fine-tuning." in summary.notes


@pytest.mark.parametrize("knowledge", ["none", "fewer"])
def test_full_fine_tuning_decides_nothing_of_k(three, model, tokenizer, files, knowledge):
    """It may have been asked the task alone, or other questions of knowledge."""
    config, folder = three
    asked = {"none": [], "fewer": [QuestionSet("mixed", files["mixed"], limit=3)]}[knowledge]
    evaluate(model, tokenizer, asking(asked, [QuestionSet("steps", files["steps"])]), folder / knowledge)
    summary = summarise(folder / "base", folder / "after", folder / knowledge, config)
    assert summary.K == summarise(folder / "base", folder / "after", folder / "full", config).K
    assert summary.T is not None
    assert summary.benchmarks[0].full is None


def test_full_fine_tuning_that_was_asked_another_task_is_refused_at_the_start(three, tokenizer, files):
    config, folder = three
    named = replace(config.evaluate, full_scores=str(folder / "full"))
    check_reference(replace(config, evaluate=named), tokenizer)
    for task, message, options in (
        ("steps", "other questions of 'steps'", {"limit": 2}),
        ("steps", "with another prompt", {"prompt": "Q: {question}\nA:"}),
        ("steps", "other questions of 'steps'", {"fewshot": 1}),
        ("others", "was not asked the task 'others'", {}),
    ):
        asks = replace(named, task=[QuestionSet(task, files["steps"], **options)])
        with pytest.raises(FolderError, match=message):
            check_reference(replace(config, evaluate=asks), tokenizer)


def test_answers_to_other_prompts_are_not_compared(three):
    config, folder = three
    path = folder / "after" / "scores" / "mixed.jsonl"
    path.write_text("".join(json.dumps(json.loads(line) | {"prompt": "Q?"}) + "\n" for line in path.read_text().splitlines()))
    with pytest.raises(FolderError, match="answers to different questions of 'mixed': evaluate both with the same question file, prompt"):
        summarise(folder / "base", folder / "after", None, config)


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ({}, {}, ""),
        ({"fewshot": 1}, {"fewshot": 1}, ""),
        ({"fewshot": 1, "examples": "here"}, {}, r"'known' with fewshot=1, and now fewshot=0, so T would be a ratio of unlike things"),
        ({"max_tokens": 7}, {"max_tokens": 8}, r"with max_tokens=7, and now max_tokens=8"),
        ({"prompt": "{question} A:"}, {}, r"with another prompt, template or other examples than now"),
        ({"fewshot": 1, "examples": "here"}, {"fewshot": 1, "examples": "there"}, r"with another prompt"),
    ],
)
def test_full_fine_tuning_that_was_asked_otherwise_is_refused(was, now, message, model, tokenizer, files, tmp_path):
    """T is a ratio of what is alike; at the start of a run, and where a finished one is compared with it."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shown.jsonl").write_text(json.dumps({"question": f"what is {name}?", "answers": ["this"]}))
    for name, own in (("full", was), ("now", now)):
        own = own | ({"examples": str(tmp_path / own["examples"] / "shown.jsonl")} if "examples" in own else {})
        config = asking(task=[QuestionSet("known", files["known"], limit=4, **own)], full_scores=str(tmp_path / "full"), resamples=100)
        evaluate(model, tokenizer, config, tmp_path / name)
    if not message:
        check_reference(config, tokenizer)
        line = summarise(tmp_path / "now", tmp_path / "now", tmp_path / "full", config).benchmarks[0]
        assert line.full == line.after
        return
    with pytest.raises(FolderError, match=message):
        check_reference(config, tokenizer)
    if was.keys() != {"max_tokens"}:
        with pytest.raises(FolderError, match=r"different questions of 'known': evaluate both with the same question file, prompt"):
            summarise(tmp_path / "now", tmp_path / "now", tmp_path / "full", config)


def test_a_reference_that_was_asked_in_another_chat_is_refused(model, tokenizer, files, tmp_path):
    chatty = deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}U{{ m['content'] }}{% endfor %}A"
    config = replace(asking(task=[QuestionSet("steps", files["steps"])], full_scores=str(tmp_path)), data=DataConfig(template="chat"))
    evaluate(model, chatty, config, tmp_path)
    check_reference(config, chatty)
    chatty.chat_template = "System: count. " + chatty.chat_template
    with pytest.raises(FolderError, match="with another prompt, template"):
        check_reference(config, chatty)


@pytest.mark.parametrize("fewshot", [0, 2])
def test_prompts_are_known_before_they_are_asked(fewshot, model, tokenizer, files, tmp_path):
    config = asking(task=[entry := QuestionSet("known", files["known"], fewshot=fewshot, limit=3)])
    evaluate(model, tokenizer, config, tmp_path)
    drawn = draw(entry, KNOWN, config.seed)
    expected = prompts_of(drawn, prompt_of(entry, "task", DataConfig(template=TEMPLATE), tokenizer))
    assert {str(record["id"]): record["prompt"] for record in questions(tmp_path / "scores", "known")} == expected


def test_a_reference_is_a_scores_file_or_the_folder_of_one(three, tokenizer):
    config, folder = three
    for path in ("full", "full/scores.json"):
        assert read_scores(folder / path)[1] == folder / "full" / "scores"
    for path, message in (("full/scores/steps.jsonl", "holds no scores: name a scores.json"), ("elsewhere", "there is no .*scores.json")):
        with pytest.raises(FolderError, match=message):
            check_reference(replace(config, evaluate=replace(config.evaluate, full_scores=str(folder / path))), tokenizer)


@pytest.mark.parametrize("text", ["[]", '{"rows": []}', '{"knowledge": {"facts": {"K": 1}}}'])
def test_another_file_than_scores_is_refused(tmp_path, text):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(FolderError, match=r"comparison.json holds no scores: name a scores.json"):
        Scores.load(tmp_path / "comparison.json")


def test_a_base_that_knows_nothing_has_no_k(three):
    config, folder = three
    path = folder / "base" / "scores" / "mixed.jsonl"
    path.write_text("".join(json.dumps(json.loads(line) | {"score": 0.0}) + "\n" for line in path.read_text().splitlines()))
    summary = summarise(folder / "base", folder / "after", folder / "full", config)
    assert summary.K is summary.KT is None
    assert summary.T is not None
    assert "the base model scores 0 on 'mixed'" in summary.notes[0]


def test_other_questions_cannot_be_compared(three, model, tokenizer, files):
    config, folder = three
    fewer = asking([QuestionSet("mixed", files["mixed"], limit=3)], [QuestionSet("steps", files["steps"])])
    evaluate(model, tokenizer, fewer, folder / "fewer")
    with pytest.raises(FolderError, match="answers to different questions of 'mixed'"):
        summarise(folder / "base", folder / "fewer", None, config)


@pytest.mark.parametrize("room", [128, 300, 2000, 100_000])
def test_one_long_answer_makes_only_its_own_batches_small(model, tokenizer, tmp_path, monkeypatch, room):
    """Whatever the batches are: the same likelihoods, and never more logits at once than there is room for."""
    lengths = [1, 2, 2, 3, 3, 40, 5, 6, 60, 7]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps({"question": "q" * place, "answers": "a" * n}) + "\n" for place, n in enumerate(lengths, 1)))
    asks = asking([QuestionSet("known", str(path), max_tokens=2)])
    expected = [row["gold_loglikelihood"] for row in records(evaluate_once(model, tokenizer, asks, tmp_path / "whole"))]
    monkeypatch.setattr("farss.tasks.text.LOGITS", room * len(tokenizer))
    seen, call = [], model.forward

    def forward(*ids, logits_to_keep=0, **options):
        seen.extend([part.shape[0] * logits_to_keep for part in ids])  # generation names its input_ids
        return call(*ids, logits_to_keep=logits_to_keep, **options)

    monkeypatch.setattr(model, "forward", forward)
    found = [row["gold_loglikelihood"] for row in records(evaluate_once(model, tokenizer, asks, tmp_path / "small"))]
    assert found == pytest.approx(expected, rel=1e-5)
    assert max(seen) <= max(room, 61)


def evaluate_once(model, tokenizer, config, folder):
    evaluate(model, tokenizer, config, folder)
    return folder


def records(folder):
    return questions(folder / "scores", "known")


def test_only_the_answers_positions_are_scored():
    from farss.tasks.live import answer_span

    answers = {(1, 2, 3, 4, 5): 2, (1, 2, 3): 1, (7, 8, 9, 0): 1}
    assert answer_span([[5, 2, 3, 4]], {(5, 2, 3, 4): 2}) == 2
    assert answer_span([[5, 2, 3, 4], [1, 2, 3, 0]], {(5, 2, 3, 4): 1, (1, 2, 3): 1}) == 2  # one position of padding
    assert answer_span([[1, 2, 3, 4, 5]], answers) == 5 - 3 + 1  # its beginning is a row of its own: the wider span is safe
    assert answer_span([[7, 8, 9, 0]], answers) == 1
    assert answer_span([[1, 2, 3, 4, 5], [6, 6, 6, 6, 6]], answers) == 5  # unknown: everything
