"""Names of lm_eval's tasks."""

import pytest
from taught import asking

from farss.errors import FarssError
from farss.evaluate import evaluate

pytest.importorskip("lm_eval")


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("facts.jsonl", "'facts.jsonl' is a file: write it as a question set, {name: mine, data: facts.jsonl}"),
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
