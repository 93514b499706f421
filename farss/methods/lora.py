"""LoRA: one rank everywhere, random A, zero B (Hu et al., ICLR 2022); PEFT's own initialisation."""

from __future__ import annotations

from functools import partial

from farss.methods.base import Method
from farss.methods.uniform import uniform_plan

LORA = Method(
    name="lora",
    title="LoRA (Hu et al., ICLR 2022)",
    changes="one rank in every layer, starting from zero",
    plan=partial(uniform_plan, side=None),
)
