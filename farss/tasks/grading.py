"""Is the answer right? Pure functions on texts; the task files beside this one refer to them by name."""

from __future__ import annotations

import os
import re
import string
import threading
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

GRADING = 11
"""Goes up when answers are graded by other rules: those of a run folder are then graded again (of lm_eval's tasks, asked for again), so
that none that were graded by the old rules stand beside the new."""
STEPS = " Let's think step by step."
"""What the authors put behind the training prompt for GSM8K and MATH."""

_OF_NUMBERS = r"(?<=\d)[^,]\d|(?<![\w-])-\$?\.?\d|(?<![^\s$-])\.\d|(?<=\d[eE])-\d"
"""Punctuation that is no decoration: "1/2", "3.5", "1914-1918", "-5", ".5" and "1e-3"; not "1,000"."""
_OF_NAMES = r"(?<=\b[^\W\d])(\+|#(?!#))|(?<=\w)\+[\w+]|(?<=\w\+)\+|(?<=\w)[<>=][\w=]|(?<=\w[<>=])=\w|(?<=\w)[*^]\w"
"""The same of names and formulas: "C++", "C#", "A+", "x>=5" and "x^2"; not "#1", "**Paris**" or "Paris###"."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_LEADING = re.compile(r"\b(a|an|the)\b(?=\s+\w)")
_DASHES = str.maketrans(dict.fromkeys("‐‑‒–—―−", "-"))
_FOREIGN = "".join(char for char in map(chr, range(0x80, 0x10000)) if unicodedata.category(char).startswith("P"))
"""Punctuation beyond ASCII: “ ” « » ¿ 。 and so on."""
_PUNCTUATION = re.compile(rf"(?!{_OF_NUMBERS}|{_OF_NAMES})[{re.escape(string.punctuation)}´{re.escape(_FOREIGN)}]")
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")
"""Scripts that put no space between words (Thai, Lao, Burmese, Khmer, Japanese, Chinese), or endings behind them (Korean)."""
_NO_DIGIT = r"(?<!\d)", r"(?!\d)"
"""What stands beside a number that is whole: "5年" is not in "15年"."""
_DECIMAL = re.compile(r"(?<![.\d])(\d*)\.(\d+)(?![.\d])")
_SAID = r"[Tt]he (?:final )?answer is:?"
_MARK = re.compile(rf"####(?!\s*[A-Za-z]{{2,}})|{_SAID}")
_NUMBER_MARK = re.compile(rf"####(?=\W*\d)|{_SAID}")
"""What stands before an answer that is a formula, or a number; "#### Step 2" is a heading."""
_LISTED = re.compile(r"^\s*[-+−]\s+", re.MULTILINE)
_NUMBER = re.compile(
    r"(?:(?<![\w)])(?<!\d\s)[-+−]\s?)?\$?\s?"
    r"(?:\d+\s+\d+/\d+|\d{1,3}(?:[\u00a0\u2009\u202f]\d{3})+|(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}\b|\s?/\s?\d+)?)"
)
"""Also a mixed one, "3 1/2". The dash of "20-25" and "20 - 25" is no sign."""
_MIXED = re.compile(r"(?<![\d.,])(\d+)\s+(\d+)/(\d+)")
_FRAC = re.compile(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_CALCULATED = re.compile(r"<<[^<>\n]*>>")
"""GSM8K's annotation of a step: "4 + 5 = <<4+5=9>>9"."""
_LEFT_SIDE = re.compile(r"\s*(?:[\d\s.,+\-−*/×x÷()$]*\d[\s)]*=)+(?=\s*[-+−]?\s*\$?\s*[.\d])")
"""Of an equation between numbers."""
_INSIDE = re.compile(r"(?:\\[dt]?frac\s*\{|\\sqrt\s*(?:\[\d*\]\s*)?\{?|\^\s*\{?|_\s*\{?)\s*$")
_GOES_ON = re.compile(
    r"[^\S\n]*(?:\^|\*\s*\$?\d|×|·|÷|\\times|\\cdot|\\sqrt|\\pi|\\frac|[x+−–/-]\s*\$?\s*\d|:\d|(?:(?<=\b\d)|(?<=\b\d\d)|(?<=\b\d{3}))[^\S\n]\d{3}\b)"
)
"""Before and behind a number that is a part of something else: of "2^3", "4 + 5", "6:30" or "1 000"."""
_BEFORE = re.compile(
    r"^(?:(?:an?|the|about|approximately|roughly|around|nearly|exactly|only|just|simply|therefore|thus|hence|so|then|now|there|that|this"
    r"|it|is|are|was|be|will|would|equals?|equal|to|x|y|n|value|number|answer|result|solution|probability|area|volume|length|width"
    r"|height|distance|angle|ratio|total|sum|product|we|you|they|he|she|has|have|had|gets?|finds?|needs?|takes?|which|gives?)\s+)++"
    r"(?=[-\d\\$(.])",
    re.IGNORECASE,
)
"""Words before an answer that mean nothing: "about 5". All others may: "less than 5", "sum of 5", "two times 5"."""
_BEHIND = re.compile(r"(?<=[\d})$])\s++(?:\(?[A-Za-z]{2,}+[\s.,)]*+)++$")
"""Words behind one, such as "5 dollars", which math-verify would read as products of letters."""
_MEANT = re.compile(
    r"\b(?:pi|squared|cubed|factorial|mod|repeating|recurring|below|half|halves|thirds?|quarters?|fourths?|fifths?"
    r"|sixths?|sevenths?|eighths?|ninths?|tenths?|hundredths?|dozen|gross|hundred|thousand|[bmtr]+illion)\b",
    re.IGNORECASE,
)
"""Of these the ones that are a part of the result: "5 pi" and "5 thousand" are not 5; "5 more" is."""
_BASE = re.compile(r"\d_\{?(\d+)\}?\W*$")
"""The base of a number, which math-verify passes over: 101_2 is not 101_3."""
_TIME = re.compile(r"(?<![\d:])(\d{1,2}):(\d{2})(?![\d:])")
_APART = re.compile(r"(?<!\d)[/,;:–—()\[\]]|[/,;:–—()\[\]](?!\d)|(?<=\d)[-–](?=\d)|['’]s\b")
"""What parts words, though no space stands there: "Paris/London", "1914-1918", "Smith's"; not "1,000", "1/2" or "non-fiction"."""


def without_thoughts(answer: str) -> str:
    """What a model answers when it has thought; nothing where it did not come to an end."""
    _, end, said = answer.rpartition("</think>")
    if end:
        return said.strip()
    return "" if answer.lstrip().startswith("<think>") else answer


def normalise(text: str, as_number: bool = False) -> str:
    """Lower case, without punctuation, articles and extra white space (the rule of NQ-open and of lm_eval; but see `_plain`)."""
    return " ".join(_ARTICLES.sub(" ", _plain(text.lower(), as_number)).split())


def final_number(text: str) -> Fraction | None:
    """The number behind the last `####` or `The answer is:`, else the last number in the text; None without one, and where a formula or a
    time of day stands behind the mark."""
    text = _FRAC.sub(r" \1/\2", _CALCULATED.sub("", _LISTED.sub("", text)))
    answer = _marked(_NUMBER_MARK, text)
    if answer is None:
        numbers = _NUMBER.findall(text)
        return _value(numbers[-1]) if numbers else None
    left = _LEFT_SIDE.match(answer)
    right = _alone(answer[left.end() :]) if left else None
    return _alone(answer) if right is None else right


def _marked(mark: re.Pattern[str], text: str) -> str | None:
    """What stands behind the last mark behind which there is anything: a model that repeats itself is stopped anywhere. None: no mark."""
    behind = mark.split(text)[1:]
    return next((part for part in reversed(behind) if re.search(r"\w", part)), behind[-1] if behind else None)


def _alone(answer: str) -> Fraction | None:
    """The first number in an answer, unless it is a part of something else."""
    found = _NUMBER.search(answer)
    if not found or _INSIDE.search(answer[: found.start()]) or _GOES_ON.match(answer, found.end()):
        return None
    return _value(found.group())


def _value(number: str) -> Fraction | None:
    whole, _, fraction = number.rpartition(" ") if re.search(r"\d\s+\d+/", number) else ("", "", number)
    numerator, _, denominator = _bare(fraction).partition("/")
    try:
        value, before = Fraction(numerator) / Fraction(denominator or 1), Fraction(_bare(whole) or 0)
        return before - value if whole.lstrip().startswith(("-", "−")) else before + value
    except (ZeroDivisionError, ValueError):  # thousands of digits, as a model writes that repeats itself
        return None


def _bare(number: str) -> str:
    return re.sub(r"[\s,$+]", "", number).replace("−", "-")


def exact_match(answer: str, answers: Sequence[str]) -> float:
    """1 when the normalised answer is one of the accepted ones."""
    said = [_words(answer, as_number) for as_number in (False, True)]
    return float(any(_words(each, as_number) == said[as_number] for each in answers for as_number in _readings(each)))


def contains(answer: str, answers: Sequence[str]) -> float:
    """1 when the normalised answer holds one of the accepted ones as whole words, in its own spelling or with the parts of words apart."""
    return max(exact_match(answer, answers), float(any(_holds(answer, accepted) for accepted in answers)))


def _holds(answer: str, accepted: str) -> bool:
    """Articles count at the end of what is accepted ("Vitamin A") and where it is nothing else: "A", as a choice, is in "A: cats" and
    not in "A cat"."""
    if not normalise(accepted):
        choice = re.escape(_plain(accepted).strip())
        return bool(choice and re.search(rf"(?<!\w){choice}(?=\s*(?:[{re.escape(string.punctuation)}]|$))", answer, re.MULTILINE))
    for as_number in _readings(accepted):
        bare = _LEADING.sub(" ", _plain(accepted.lower(), as_number))
        found = [_plain(text, as_number) for text in (answer.lower(), _APART.sub(" ", answer.lower()))]
        if any(_within(bare, text) or _within(bare, _ARTICLES.sub(" ", text)) for text in found):
            return True
    return False


def _within(part: str, whole: str) -> bool:
    part, whole = (" ".join(text.split()) for text in (part, whole))
    if not _UNSPACED.search(part):
        return bool(part) and f" {part} " in f" {whole} "
    ends = (edge if part[place].isdigit() else "" for edge, place in zip(_NO_DIGIT, (0, -1), strict=True))
    return re.search(re.escape(part).join(ends), whole) is not None


def _readings(accepted: str) -> tuple[bool, ...]:
    """Whether decimals are compared as texts ("Python 3.10" is not "Python 3.1"), and, where a number comes first, as numbers too."""
    return (False, True) if re.match(r"\W*\d", accepted) else (False,)


def _plain(text: str, as_number: bool = False) -> str:
    """Without punctuation; numbers and names keep what they are made of, so that "1.5" is not "15", nor "C++" "C".

    Args:
        as_number: "5.0" is 5, and "5:30" not 5.3; without it "6:30" is "6.30".
    """
    text = unicodedata.normalize("NFC", text).translate(_DASHES)  # an accent may be a character of its own
    text = text if as_number else _TIME.sub(r"\1.\2", text)
    text = _PUNCTUATION.sub("", re.sub(r"(?<=\d):(?=\d)", "∶", text))  # 4:3 is a ratio, and not 4.3
    return _DECIMAL.sub(_shortest if as_number else _whole, text)


def _whole(decimal: re.Match[str]) -> str:
    return f"{decimal[1] or '0'}.{decimal[2]}"


def _shortest(decimal: re.Match[str]) -> str:
    fraction = decimal[2].rstrip("0")
    return (decimal[1] or "0") + (f".{fraction}" if fraction else "")


def _words(text: str, as_number: bool = False) -> str:
    """The normalised text; where nothing is left of it, with its articles ("A." as a choice), or as it is ("+")."""
    return normalise(text, as_number) or " ".join(_plain(text.lower(), as_number).split()) or " ".join(text.lower().split())


def number(answer: str, answers: Sequence[str]) -> float:
    """1 when the answer's final number equals that of an accepted answer."""
    value = final_number(answer)
    return float(value is not None and value in {final_number(accepted) for accepted in answers})


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "number": number,
}
"""Metrics of question sets by their name in the configuration: `(answer, accepted answers) -> 0 or 1`."""


# --- the shipped task files ------------------------------------------------------------------------------------------


def gsm8k_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one GSM8K answer by its final number."""
    return {"exact_match": number(without_thoughts(results[0]), [doc["answer"]])}


def math_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one MATH answer by mathematical equality with the solution's boxed result."""
    return {"exact_match": same_mathematics(without_thoughts(results[0]), doc["solution"])}


def same_mathematics(answer: str, solution: str) -> float:
    """1 when math-verify reads both results and finds them equal; 0 when it cannot read one of them.

    The authors' grader compares an answer with itself when it meets an exception, which counts wrong answers as right.
    """
    from math_verify import parse, verify

    # math-verify interrupts itself by an alarm signal, which only the main thread can receive, and not on Windows.
    interruptible = os.name == "posix" and threading.current_thread() is threading.main_thread()
    seconds = 5 if interruptible else None
    marked = _marked(_MARK, answer)
    final = answer if marked is None else _first_line(marked.strip())
    if marked is not None and "\\boxed" not in final:  # all of it is the answer; without a mark math-verify looks for one in the text
        final = f"${_MIXED.sub(_mixed, _undressed(_without_words(_undressed(final))))}$"
    gold = parse(solution, parsing_timeout=seconds)
    found = parse(final, parsing_timeout=seconds)
    if not gold or not found:
        return 0.0
    bases = {base[1] for read in (gold, found) if (base := _BASE.search(str(read[-1])))}
    return float(len(bases) < 2 and verify(gold, found, timeout_seconds=seconds))


def _first_line(text: str) -> str:
    """Up to the first line break that is not inside a formula of several lines."""
    lines = text.split("\n")
    for count in range(1, len(lines) + 1):
        head = "\n".join(lines[:count])
        opened = head.count("\\begin") - head.count("\\end"), len(re.findall(r"(?<!\\)\\\[", head)) - head.count("\\]")
        if max(opened) <= 0 and head.count("$$") % 2 == 0:
            return head.replace("\n", " ")
    return lines[0]


def _undressed(formula: str) -> str:
    """Without what marks it as a formula, and the full stop behind it; the point of ".5" stays."""
    bare = re.sub(r"^[\s$]*+(?:\\\[|\\\()?", "", formula).rstrip(" \t\n$.")
    return bare.removesuffix("\\]").removesuffix("\\)").strip()


def _without_words(formula: str) -> str:
    """Without words around it that mean nothing."""
    formula = _BEFORE.sub("", formula)
    behind = _BEHIND.search(formula)
    return formula if behind is None or _MEANT.search(behind.group()) else formula[: behind.start()]


def _mixed(number: re.Match[str]) -> str:
    return rf"{number[1]}\frac{{{number[2]}}}{{{number[3]}}}"
