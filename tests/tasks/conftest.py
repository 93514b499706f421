"""What the tests of questions share."""

from taught import files, model, taught, three, tokenizer, whole_prompts

__all__ = ["files", "model", "taught", "three", "tokenizer", "whole_prompts"]
