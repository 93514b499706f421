"""`prepare` and `export` around somebody else's loop."""

import dataclasses
import gc
import itertools
import json
from unittest import mock

import numpy
import pandas
import pytest
import torch
import transformers
from peft import PeftModel
from small_models import small
from transformers import AutoTokenizer

import farss
from farss import world
from farss.artifacts import Survey
from farss.batches import plain_rows

PLAN = farss.PlanConfig(boundary=1, rank=8, r_avg=4, r_max=6)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(world.MODEL)


@pytest.fixture
def rows():
    return [json.loads(line) for line in world.TASK_TRAIN.read_text().splitlines()[:24]]


def base(tokenizer):
    return small("llama-gqa", vocab_size=len(tokenizer), max_position_embeddings=256).float()


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


def own_loop(model, batch, steps=3):
    optimiser = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("method", ["farss", "farss-plus", "lora", "corda-kpm"])
def test_prepare_train_export_load(tokenizer, rows, tmp_path, method):
    calibration = farss.CalibrationConfig(examples=8)
    model = farss.prepare(base(tokenizer), tokenizer, rows, method=method, plan=PLAN, calibration=calibration)
    batch = tokenizer("Name the seal for this letter: Good day.", return_tensors="pt")
    before = logits(base(tokenizer), batch)
    assert (logits(model, batch) - before).abs().max() <= 1e-5 * max(1.0, before.abs().max().item())
    own_loop(model, batch)
    trained = logits(model, batch)
    done = farss.export(model, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(base(tokenizer), str(done.folder))
    assert (logits(stock, batch) - trained).abs().max() <= 1e-5 * max(1.0, trained.abs().max().item())
    assert (trained - before).abs().max() > 0.01
    assert "model = PeftModel.from_pretrained(model, 'adapter')" in (done.folder / "README.md").read_text()


def test_a_file_a_list_and_a_dataset_give_the_same(tokenizer, tmp_path):
    import datasets
    import pandas

    rows = [json.loads(line) for line in world.TASK_TRAIN.read_text().splitlines()]
    calibration = farss.CalibrationConfig(examples=4)
    first, *others = [
        farss.prepare(base(tokenizer), tokenizer, data, plan=PLAN, calibration=calibration).farss.plan
        for data in (str(world.TASK_TRAIN), world.TASK_TRAIN, rows, datasets.Dataset.from_list(rows), pandas.DataFrame(rows))
    ]
    assert all(plan == first for plan in others)


def test_the_model_keeps_its_survey(tokenizer, rows, tmp_path):
    model = farss.prepare(
        base(tokenizer), tokenizer, rows, plan=PLAN, calibration=farss.CalibrationConfig(examples=4), folder=tmp_path / "survey"
    )
    assert (tmp_path / "survey" / "survey.json").is_file()
    assert model.farss.survey.examples == 4


def test_what_the_model_wrote_is_written_once(tokenizer, rows, tmp_path, monkeypatch):
    """A start is prepared again to resume a training, perhaps on another device, where it might write something else."""
    options = {"plan": PLAN, "calibration": farss.CalibrationConfig(examples=4), "method": "farss-plus", "folder": tmp_path / "survey"}
    first = farss.prepare(base(tokenizer), tokenizer, rows, **options).farss.survey
    monkeypatch.setattr("farss.library.own_text", lambda *_: pytest.fail("written again"))
    assert farss.prepare(base(tokenizer), tokenizer, rows, **options).farss.survey == first


def test_a_survey_without_a_folder_goes_with_the_model(tokenizer, rows):
    model = farss.prepare(base(tokenizer), tokenizer, rows, plan=PLAN, calibration=farss.CalibrationConfig(examples=4))
    folder = model.farss.survey.folder
    assert folder.is_dir()
    del model
    gc.collect()
    assert not folder.exists()


def test_rounded_weights_cannot_be_a_residual(tokenizer, rows):
    with pytest.raises(farss.FarssError, match=r"base='residual' rounds the weights without their start to bfloat16"):
        farss.prepare(base(tokenizer).bfloat16(), tokenizer, rows, plan=PLAN, base="residual")


def test_readings_never_count_padding(tokenizer, rows, tmp_path):
    def moments(padding):
        calibration = farss.CalibrationConfig(examples=4, padding=padding)
        options = {"plan": PLAN, "calibration": calibration, "method": "lora-null", "knowledge": [row["output"] for row in rows[:4]]}
        found = farss.prepare(base(tokenizer), tokenizer, rows, folder=tmp_path / padding, **options).farss.survey
        return found.directions(next(iter(found.layers))).lam

    assert torch.equal(moments("ignore"), moments("count"))


def test_knowledge_is_given_as_texts_or_named(tokenizer, rows, tmp_path):
    (tmp_path / "knowledge.jsonl").write_text("\n".join(json.dumps({"text": row["output"]}) for row in rows[:4]))
    named = farss.CalibrationConfig(examples=4, knowledge=tmp_path / "knowledge.jsonl")  # a path, or its text
    plan = dataclasses.replace(PLAN, method="farss-plus")
    texts = [row["output"] for row in rows[:4]]
    given = {"calibration": farss.CalibrationConfig(examples=4), "method": "farss-plus", "plan": PLAN, "knowledge": texts}
    columns = {"name": "mine", "data": str(tmp_path / "asked.jsonl"), "question": "instruction", "answers": "output"}
    (tmp_path / "asked.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:9]))
    asked = given | {"knowledge": farss.QuestionSet(**columns)}
    meant = {"calibration": farss.CalibrationConfig(examples=4, knowledge=farss.QuestionSet(**columns)), "plan": plan}
    for place, options in (("given", given), ("named", {"calibration": named, "plan": plan}), ("asked", asked), ("meant", meant)):
        farss.prepare(base(tokenizer), tokenizer, rows, folder=tmp_path / place, **options)
        assert not [*(tmp_path / place).glob("own-text*")]
    more = given | {"knowledge": [row["output"] for row in rows]}  # of which as many are drawn as are looked at
    with mock.patch("farss.library.plain_rows", wraps=plain_rows) as drawn:
        farss.prepare(base(tokenizer), tokenizer, rows, folder=tmp_path / "more", **more)
    assert [len(call.args[0]) for call in drawn.call_args_list] == [4]
    for pair in (("given", "named"), ("asked", "meant")):
        first, second = (Survey.load(tmp_path / place) for place in pair)
        for name in first.layers:
            torch.testing.assert_close(first.directions(name).lam, second.directions(name).lam)


@pytest.mark.parametrize(
    ("knowledge", "message"),
    [
        ("general.jsonl", r"knowledge='general.jsonl' is one text: give a list of texts, or name a file"),
        ([], r"knowledge holds no text"),
        (["Seals bark.", "  "], r"row 2 has nothing in column 'knowledge'"),
    ],
)
def test_knowledge_that_holds_no_texts_is_refused(tokenizer, rows, tmp_path, knowledge, message):
    with pytest.raises(farss.FarssError, match=message):
        farss.prepare(base(tokenizer), tokenizer, rows, method="farss-plus", plan=PLAN, knowledge=knowledge, folder=tmp_path / "survey")
    assert not (tmp_path / "survey").exists()


def test_a_base_that_was_trained_too_is_not_handed_over_as_an_adapter(tokenizer, rows, tmp_path):
    """The check would compare with the base as it lies in memory, and pass."""
    model = farss.prepare(base(tokenizer), tokenizer, rows, method="lora", plan=PLAN)
    model.get_base_model().lm_head.weight.requires_grad_(True)
    own_loop(model, tokenizer("Name the seal for this letter: Good day.", return_tensors="pt"))
    with pytest.raises(farss.FarssError, match=r"lm_head\.weight was trained beside the adapter"):
        farss.export(model, tmp_path / "adapter")
    model.get_base_model().lm_head.weight.requires_grad_(False)
    with pytest.raises(farss.FarssError, match=r"weights of the base model changed since farss\.prepare"):
        farss.export(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("what", ["shared", "packed"])
def test_a_residual_that_cannot_be_is_refused_before_the_survey(tokenizer, rows, tmp_path, what):
    model = base(tokenizer)
    first, second = (block.mlp.up_proj for block in model.model.layers[:2])
    if what == "shared":
        second.weight = first.weight
    else:
        first.weight = torch.nn.Parameter(torch.zeros(first.weight.shape, dtype=torch.int8), requires_grad=False)
    message = {"shared": "share", "packed": "quantised: set base=untouched"}[what]
    with pytest.raises(farss.FarssError, match=message):
        farss.prepare(model, tokenizer, rows, plan=PLAN, base="residual", folder=tmp_path / "survey")
    assert not (tmp_path / "survey").exists()
    assert not hasattr(model, "peft_config")


def test_weights_from_which_nothing_could_be_exported_are_refused_before_training(tokenizer, rows):
    model = base(tokenizer)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(farss.FarssError, match=r"packed weights \(torch.int8"):
        farss.prepare(model, tokenizer, rows, method="lora", plan=PLAN)


def test_what_cannot_be_prepared_or_exported(tokenizer, rows, tmp_path):
    with pytest.raises(farss.FarssError, match="trains the model itself"):
        farss.prepare(base(tokenizer), tokenizer, rows, method="full")
    with pytest.raises(farss.FarssError, match="did you mean 'farss'"):
        farss.prepare(base(tokenizer), tokenizer, rows, method="fars")
    with pytest.raises(farss.FarssError, match="no rows"):
        farss.prepare(base(tokenizer), tokenizer, [], plan=PLAN)
    with pytest.raises(farss.FarssError, match=r"was not made by farss\.prepare"):
        farss.export(base(tokenizer), tmp_path / "adapter")


def test_a_second_task_on_top_of_a_first(tokenizer, rows, tmp_path):
    """Merge the first, prepare the result; both adapters together on the original base are the second trained model."""
    settings = {"plan": PLAN, "calibration": farss.CalibrationConfig(examples=8), "dropout": 0.0}
    batch = tokenizer("Name the seal for this letter: Good day.", return_tensors="pt")
    model = farss.prepare(base(tokenizer), tokenizer, rows[:12], **settings)
    own_loop(model, batch)
    farss.export(model, tmp_path / "first")
    one = PeftModel.from_pretrained(base(tokenizer), str(tmp_path / "first")).merge_and_unload()
    two = farss.prepare(one, tokenizer, rows[12:], **settings)
    own_loop(two, tokenizer("Another task altogether.", return_tensors="pt"))
    farss.export(two, tmp_path / "second")
    expected = logits(two, batch)
    both = PeftModel.from_pretrained(base(tokenizer), str(tmp_path / "first"), adapter_name="first")
    both.load_adapter(str(tmp_path / "second"), adapter_name="second")
    alone = logits(both, batch)
    both.base_model.set_adapter(["first", "second"])
    assert (logits(both, batch) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (alone - expected).abs().max() > 0.01
    with pytest.raises(farss.FarssError, match="was made for a base with fingerprint"):
        farss.load_adapter(base(tokenizer), tmp_path / "second")  # it is the second half of something


def test_a_training_that_was_spread_over_processes_is_exported_from_its_checkpoint(tokenizer, rows, tmp_path):
    def prepared():
        calibration = farss.CalibrationConfig(examples=8)
        return farss.prepare(base(tokenizer), tokenizer, rows, plan=PLAN, calibration=calibration, folder=tmp_path / "survey")

    model, batch = prepared(), tokenizer("Name the seal for this letter: Good day.", return_tensors="pt")
    own_loop(model, batch)
    model.save_pretrained(str(tmp_path / "saved"))
    expected = logits(model, batch)
    parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    parameter.full_tensor = None  # as of torch's DTensor, of which every process holds a part
    with pytest.raises(farss.FarssError, match=r"is spread over the processes .*checkpoint="):
        farss.export(model, tmp_path / "adapter")
    with pytest.raises(farss.FarssError, match=r"is no checkpoint of a model from farss\.prepare"):
        farss.export(prepared(), tmp_path / "adapter", checkpoint=tmp_path)
    for options in ({"plan": PLAN}, {"plan": dataclasses.replace(PLAN, rank=4, r_avg=2, r_max=3)}):  # of other examples, of another rank
        other = farss.prepare(base(tokenizer), tokenizer, rows[4:8], calibration=farss.CalibrationConfig(examples=4), **options)
        with pytest.raises(farss.FarssError, match="was trained from another start than this model has"):
            farss.export(other, tmp_path / "adapter", checkpoint=tmp_path / "saved")
    done = farss.export(prepared(), tmp_path / "adapter", checkpoint=tmp_path / "saved")
    stock = PeftModel.from_pretrained(base(tokenizer), str(done.folder))
    assert (logits(stock, batch) - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


def test_the_users_random_numbers_go_on(tokenizer, rows):
    torch.manual_seed(1)
    expected = torch.rand(3)
    for method in ("lora", "farss-plus"):
        model = base(tokenizer)
        torch.manual_seed(1)
        farss.prepare(model, tokenizer, rows, method=method, plan=PLAN, calibration=farss.CalibrationConfig(examples=4))
        assert torch.equal(torch.rand(3), expected)


def test_an_encoder_is_refused(tokenizer, rows):
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = transformers.RobertaForCausalLM(transformers.RobertaConfig(vocab_size=len(tokenizer), **sizes, max_position_embeddings=258))
    with pytest.raises(farss.FarssError, match="reads ahead"):
        farss.prepare(encoder, tokenizer, rows, plan=PLAN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "my-model"}, "model is a str: load it first"),
        ({"tokenizer": None}, "tokenizer is a NoneType"),
        ({"tokenizer": lambda text: text}, "tokenizer is a function: load the model's"),
        ({"targets": "q_proj"}, r"targets='q_proj' is a text: give a list, such as \['q_proj'\]"),
        ({"base": "Residual"}, "base='Residual': did you mean 'residual'"),
        ({"plan": farss.PlanConfig(shallow_directions="lowest")}, "plan.shallow_directions='lowest': did you mean 'least'"),
        ({"calibration": farss.CalibrationConfig(fisher="Sampled")}, "calibration.fisher='Sampled': did you mean 'sampled'"),
        ({"plan": {"rank": 8}}, r"plan is a dict: give a farss\.PlanConfig"),
        ({"dropout": 1.5}, r"dropout=1\.5: give 0 or more, below 1"),
        ({"dropout": None}, r"dropout=None: give 0 or more"),
        ({"dataset": {"train": [], "test": []}}, "dataset is a dict of train, test: give the rows of one of them"),
        ({"dataset": ["a prompt"]}, "row 1 is a str, not a dictionary of its columns: give a list of rows"),
    ],
)
def test_what_is_no_model_no_tokenizer_no_rows_or_no_options_is_named(tokenizer, rows, changes, message):
    given = {"model": base(tokenizer), "tokenizer": tokenizer, "dataset": rows, "plan": PLAN} | changes
    with pytest.raises(farss.FarssError, match=message):
        farss.prepare(**given)


def test_a_tokenizer_without_an_end_is_named(tokenizer, rows):
    model, tokenizer.eos_token = base(tokenizer), None
    with pytest.raises(farss.FarssError, match="the tokenizer has no end-of-sequence token"):
        farss.prepare(model, tokenizer, rows, plan=PLAN)


def test_two_adapters_on_one_base_would_mix(tokenizer, rows, tmp_path):
    farss.export(farss.prepare(base(tokenizer), tokenizer, rows, method="lora", plan=PLAN), tmp_path / "adapter")
    model = base(tokenizer)
    adapted = farss.load_adapter(model, tmp_path / "adapter")
    for taken in (adapted, model):
        with pytest.raises(farss.FarssError, match="this model has an adapter already, and two would mix"):
            farss.load_adapter(taken, tmp_path / "adapter")
    assert farss.load_adapter(adapted.unload(), tmp_path / "adapter")
    assert farss.load_adapter(torch.compile(base(tokenizer)), tmp_path / "adapter")


def test_the_first_process_alone_writes_when_all_have_parted(tokenizer, rows, tmp_path):
    model = farss.prepare(base(tokenizer), tokenizer, rows, method="lora", plan=PLAN)
    model.farss = model.farss._replace(rank=1)  # of a group that a trainer has ended since
    assert farss.export(model, tmp_path / "adapter") is None
    assert not (tmp_path / "adapter").exists()


def test_chats_of_pandas_are_lists(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    table = pandas.DataFrame({"messages": [numpy.array(chat, dtype=object)] * 4})
    model = farss.prepare(base(tokenizer), tokenizer, table, method="lora", plan=PLAN, data=farss.DataConfig(template="chat"))
    assert model.farss.prompt["system"] == "Be kind."  # which the adapter's card tells


def test_an_adapter_that_is_not_there(tokenizer, tmp_path):
    with pytest.raises(farss.FarssError, match="there is no folder"):
        farss.load_adapter(base(tokenizer), tmp_path / "nowhere")
    with pytest.raises(farss.FarssError, match="model is a str"):
        farss.load_adapter("my-model", tmp_path)


def test_a_stream_is_not_read_to_its_end(tokenizer, rows):
    taken = []
    stream = (taken.append(number) or rows[number % len(rows)] for number in itertools.count())
    calibration = farss.CalibrationConfig(examples=2)
    assert farss.prepare(base(tokenizer), tokenizer, stream, method="lora", plan=PLAN, calibration=calibration)
    assert len(taken) < 1000


def test_of_a_long_table_no_more_is_read_than_is_looked_at(tokenizer, rows):
    """Whether or not `data.limit` wants fewer."""

    class Table:
        read = 0

        def __len__(self):
            return 10_000

        def __getitem__(self, place):
            Table.read += 1
            return rows[place % len(rows)]

    for limit in (None, 8):
        Table.read = 0
        data, calibration = farss.DataConfig(limit=limit), farss.CalibrationConfig(examples=2)
        assert farss.prepare(base(tokenizer), tokenizer, Table(), method="lora", plan=PLAN, data=data, calibration=calibration)
        assert Table.read == (limit or 32)


def test_the_layers_of_a_compiled_model_keep_their_names(tokenizer, rows):
    adapted = farss.prepare(torch.compile(base(tokenizer)), tokenizer, rows, method="lora", plan=PLAN)
    assert not [name for name in adapted.farss.plan.layers if "_orig_mod" in name]
