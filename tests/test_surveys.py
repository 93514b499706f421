"""What is known of a model is found again, and of no other model."""

import json

import pytest

from farss import world
from farss.configfile import override
from farss.errors import FolderError
from farss.folder import resolve
from farss.options import READING_KEYS, options_of
from farss.pipeline import Run


def test_a_survey_of_another_model_is_refused(config, model_folder, tmp_path):
    run = Run(config)
    run.claim()
    run.plan()
    file = run.path / "survey" / "survey.json"
    values = json.loads(file.read_text())
    values["meta"]["model"] = "0123456789abcdef"
    file.write_text(json.dumps(values))
    with pytest.raises(FolderError, match=r"fingerprint 0123456789abcdef, but this one has [0-9a-f]{16}"):
        Run(config).train()


def test_knowledge_may_have_columns_of_other_names(config, tmp_path):
    file = tmp_path / "webqs.jsonl"
    rows = [json.loads(line) for line in world.KNOWLEDGE.read_text().splitlines()]
    file.write_text("".join(json.dumps({"qText": row["question"], "golden": row["answers"]}) + "\n" for row in rows))
    named = f"calibration.knowledge={{name: webqs, data: {file}, question: qText, answers: golden}}"
    run, other = (Run(override(config, ["plan.method=lora-null", text])) for text in (named, f"calibration.knowledge={world.KNOWLEDGE}"))
    assert run.surveys.knowledge() == other.surveys.knowledge()
    run.claim()
    run.statistics()
    file.write_text(file.read_text()[:-1])
    assert not run.place.is_done("null-space", options_of(resolve(run.config), READING_KEYS["knowledge"]))


@pytest.mark.usefixtures("no_figures")
def test_a_finished_run_holds_to_the_knowledge_it_looked_at(config):
    config = override(config, ["plan.method=lora-null", f"calibration.knowledge={world.KNOWLEDGE}"])
    Run(config).all()
    for change in ("calibration.knowledge=null", "calibration.examples=6"):
        with pytest.raises(FolderError, match=rf"holds the step 'null-space', made with {change.partition('=')[0]}="):
            Run(override(config, [change])).claim()


def test_a_survey_of_weights_in_another_precision_is_refused_at_once(config):
    """Before the untouched model is asked anything."""
    run = Run(config)
    run.claim()
    run.survey()
    Run(override(config, ["model.dtype=float32"])).claim()  # as they are stored
    with pytest.raises(FolderError, match=r"step 'survey', made with model.dtype='auto', and now model.dtype='bfloat16'"):
        Run(override(config, ["model.dtype=bfloat16"])).claim()
