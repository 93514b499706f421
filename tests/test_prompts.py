"""What stands around an instruction."""

from farss.prompts import prompt_text


def test_the_alpaca_prompt_is_the_papers() -> None:
    assert prompt_text("alpaca", "Add {1}.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nAdd {1}.\n\n### Response:"
    )
