"""Pictures of the training: what was logged is what is drawn."""

from farss.report.training import Log, course_figure, log_of, loss_figure

LOOKS = [
    {"step": 0, "knowledge": {"facts": -2.0}, "task": {"intents": -4.0}, "text": {"general text": -3.0}},
    {"step": 10, "knowledge": {"facts": -2.5}, "task": {"intents": -1.0}, "text": {"general text": float("nan")}},
]


def test_one_run_shows_every_set():
    (choice,) = course_figure([Log("", "", [], LOOKS)]).choices
    drawn = {trace["name"]: (trace["x"], trace["y"]) for trace in choice.data}
    assert drawn == {
        "facts (knowledge)": ([0, 10], [-2.0, -2.5]),
        "intents (task)": ([0, 10], [-4.0, -1.0]),
        "general text": ([0], [-3.0]),
    }


def test_several_runs_are_compared_set_by_set():
    logs = [Log("lora", "lora-seed0", [], LOOKS), Log("lora", "lora-seed1", [], LOOKS[:1]), Log("farss", "farss-seed0", [], [])]
    figure = course_figure(logs)
    assert [choice.label for choice in figure.choices] == ["facts (knowledge)", "intents (task)", "general text"]
    first = figure.choices[0].data
    assert [(trace["name"], trace["legendgroup"], trace["y"]) for trace in first] == [
        ("lora", "lora", [-2.0, -2.5]),
        ("lora", "lora", [-2.0]),
        ("farss", "farss", []),
    ]
    assert [trace["showlegend"] for trace in first] == [True, False, True]
    assert first[0]["line"]["color"] == first[1]["line"]["color"] != first[2]["line"]["color"]


def test_where_nobody_looked_there_is_no_picture():
    assert course_figure([log_of("", "", {"log": [{"step": 1, "loss": 1.0}]})]) is None
    assert loss_figure([log_of("", "", {})]) is None
