"""The answer metrics of public benchmarks, as lmms-eval (and the papers it follows) define them.

Each takes a model's answers and reference answers as text and returns floats in [0, 1]. They depend on no model or data
set, only on the standard library and an edit distance. A benchmark's question format is not part of its metric; that,
and the metrics of other benchmarks, are in `visor_jax.evaluate.benchmarks`.

| benchmark | metric |
| --- | --- |
| DocVQA, InfoVQA | `anls` |
| ChartQA | `relaxed_accuracy` |
| TextVQA | `vqa_accuracy` |
| OCRBench | `ocrbench` |
| AI2D | `multiple_choice` |
| POPE | `pope` |
| GQA | `exact_match` |
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

ANLS_THRESHOLD = 0.5  # a lower similarity scores 0
RELATIVE_ERROR = 0.05  # that ChartQA tolerates in a number
AGREEING_ANNOTATORS = 3  # that make an answer fully correct in VQA


def anls(prediction: str, answers: str | Sequence[str]) -> float:
    """Returns the normalized Levenshtein similarity (ANLS) of one question: the best over its reference answers.

    Distances ignore case and runs of white space, and are divided by the length of the longer original text, of the
    prediction without outer white space. A similarity below 0.5 counts as 0.

    Raises:
      ValueError: there is no reference answer.
    """
    prediction = prediction.strip()  # or blanks alone would be near every short answer
    similarity = max(1.0 - _normalized_distance(prediction, answer) for answer in _references(answers))
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def _normalized_distance(prediction: str, answer: str) -> float:
    longer = max(len(prediction.upper()), len(answer.upper()))  # upper case can be longer: "ß" is "SS"
    left, right = (" ".join(text.lower().split()) for text in (prediction, answer))
    return Levenshtein.distance(left, right) / longer if longer else 0.0


def relaxed_accuracy(prediction: str, answer: str) -> float:
    """Returns 1 if two numbers differ by at most 5 % of the reference, or two texts are equal ignoring case; else 0.

    Surrounding white space is ignored. "12%" is the number 0.12. A reference of 0 is compared as text, because 5 % of
    it is 0.
    """
    prediction, answer = prediction.strip(), answer.strip()
    predicted, reference = _number(prediction), _number(answer)
    if predicted is not None and reference:
        return float(abs(predicted - reference) / abs(reference) <= RELATIVE_ERROR)
    return float(prediction.lower() == answer.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Returns the agreement with human annotators (ten in VQA and TextVQA), after EvalAI's normalization of both sides.

    An answer that three annotators gave is fully correct. The result is the mean over leaving out each annotator in
    turn, which scores people and models alike. A single annotator always gives 0.

    Raises:
      ValueError: there is no annotator.
      TypeError: `answers` is a single text.
    """
    if isinstance(answers, str):
        raise TypeError("vqa_accuracy takes a sequence with the answers of all annotators, not one text")
    predicted, references = normalize_vqa(prediction), [normalize_vqa(answer) for answer in _references(answers)]
    matches = references.count(predicted)
    others = [matches - (reference == predicted) for reference in references]
    return sum(min(1.0, count / AGREEING_ANNOTATORS) for count in others) / len(references)


def ocrbench(prediction: str, answers: str | Sequence[str], *, dataset: str = "") -> float:
    """Returns 1 if the prediction contains one of the reference answers, ignoring case; else 0.

    Args:
      prediction: the model's text.
      answers: the references.
      dataset: the question's part of OCRBench; formulas ("HME100k") are compared without spaces and with case.

    Raises:
      ValueError: there is no reference answer.
    """
    simplify = _formula if dataset == "HME100k" else _plain_text
    text = simplify(prediction)
    return float(any(simplify(answer) in text for answer in _references(answers)))


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}


def _plain_text(text: str) -> str:
    return text.translate(_HALF_WIDTH).lower().strip().replace("\n", " ")


def multiple_choice(prediction: str, answer: str) -> float:
    """Returns 1 if the option's letter is correct, ignoring case, punctuation and outer white space; else 0.

    If a prediction begins with a capital letter and a full stop ("B. a tree"), only the letter counts; otherwise the
    whole text does.
    """
    letter = re.match(r"\s*([A-Z])\.", prediction)
    return float(_bare(letter[1] if letter else prediction) == _bare(answer))


def exact_match(prediction: str, answer: str) -> float:
    """Returns 1 if two texts are equal, ignoring case, punctuation and outer white space; else 0."""
    return float(_bare(prediction) == _bare(answer))


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _bare(text: str) -> str:
    return text.strip().lower().translate(_NO_PUNCTUATION)


def pope(predictions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Measures object hallucination with yes-or-no questions; "yes" is the positive class.

    A prediction is correct only if it equals the reference word, ignoring case and outer white space. Any text other
    than yes or no is wrong, and counts as neither class.

    Returns:
      {"accuracy", "precision", "recall", "f1", "yes_ratio"}; the last is the fraction of predictions that are yes.

    Raises:
      ValueError: the numbers of predictions and answers differ or are 0, or an answer is neither yes nor no.
    """
    predicted, references = ([text.strip().lower() for text in texts] for texts in (predictions, answers))
    if not references or len(predicted) != len(references):
        raise ValueError(
            f"pope: {len(predicted)} predictions for {len(references)} answers; expected as many, and at least one"
        )
    if unknown := set(references) - {"yes", "no"}:
        raise ValueError(f"pope: reference answer {sorted(unknown)[0]!r}; expected yes or no")
    pairs = list(zip(predicted, references, strict=True))
    hits, false_alarms, misses = pairs.count(("yes", "yes")), pairs.count(("yes", "no")), pairs.count(("no", "yes"))
    precision, recall = _share(hits, hits + false_alarms), _share(hits, hits + misses)
    return {
        "accuracy": _share(sum(a == b for a, b in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * precision * recall, precision + recall),
        "yes_ratio": _share(predicted.count("yes"), len(predicted)),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _references(answers: str | Sequence[str]) -> Sequence[str]:
    references = [answers] if isinstance(answers, str) else answers
    if not references:
        raise ValueError("no reference answer to compare with")
    return references


# --- EvalAI's normalization of short answers --------------------------------------------------------------------------

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`!')

# Each also replaces its spellings that lack one apostrophe.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, mark in enumerate(word) if mark == "'"
} | {"somebody'd": "somebodyd"}  # the original has this pair reversed


def normalize_vqa(text: str) -> str:
    """Lowers case, drops punctuation and articles, turns number words into digits, and restores apostrophes."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    separates = {mark: f"{mark} " not in text and f" {mark}" not in text for mark in _PUNCTUATION}
    for mark in _PUNCTUATION:  # becomes a space between two words, and is removed next to a space
        text = text.replace(mark, " " if separates[mark] else "")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [_DIGITS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
