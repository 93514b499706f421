"""DoRA: a LoRA for the direction of every row of the weight, and its length trained apart (Liu et al., ICML 2024); PEFT's own."""

from __future__ import annotations

from functools import partial

from farss.methods.base import Method
from farss.methods.uniform import uniform_plan

DORA = Method(
    name="dora",
    title="DoRA (Liu et al., ICML 2024)",
    changes="one rank in every layer, starting from zero, and the lengths of the weights' rows",
    plan=partial(uniform_plan, side=None, beside=lambda rank, rows: rows),
    lora_options={"use_dora": True},
    plain_lora=False,
)
