"""The answer metrics of the public benchmarks, as lmms-eval (and the papers it follows) define them.

In: a model's answers as text, and reference answers. Out: floats in [0, 1]. Standard library and an edit distance only;
nothing here knows a model or a data set. How a benchmark asks its questions is no part of its metric.

| benchmark | metric |
| --- | --- |
| DocVQA, InfoVQA | `anls` |
| ChartQA | `relaxed_accuracy` |
| TextVQA | `vqa_accuracy` |
| OCRBench | `ocrbench` |
| AI2D | `multiple_choice` |
| POPE | `pope` |
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

ANLS_THRESHOLD = 0.5  # less similar than this is wrong altogether
RELATIVE_ERROR = 0.05  # that ChartQA forgives a number
AGREEING_ANNOTATORS = 3  # that make an answer fully right in VQA


def anls(prediction: str, answers: str | Sequence[str]) -> float:
    """Average normalized Levenshtein similarity of one question: the best over its reference answers.

    Distances are taken without regard to case and runs of white space, and divided by the longer of the two texts as
    they were given. A similarity below a half counts as 0.

    Raises:
      ValueError: there is no reference answer.
    """
    similarity = max(1.0 - _normalized_distance(prediction, answer) for answer in _references(answers))
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def _normalized_distance(prediction: str, answer: str) -> float:
    longer = max(len(prediction.upper()), len(answer.upper()))  # upper case can be longer: "ß" is "SS"
    left, right = (" ".join(text.lower().split()) for text in (prediction, answer))
    return Levenshtein.distance(left, right) / longer if longer else 0.0


def relaxed_accuracy(prediction: str, answer: str) -> float:
    """1 where two numbers differ by at most 5 % of the reference, or two texts are the same but for case; else 0.

    White space around either does not count.
    "12%" is the number 0.12. A reference of 0 is compared as text: there is no 5 % of it.
    """
    prediction, answer = prediction.strip(), answer.strip()
    predicted, wanted = _number(prediction), _number(answer)
    if predicted is not None and wanted:
        return float(abs(predicted - wanted) / abs(wanted) <= RELATIVE_ERROR)
    return float(prediction.lower() == answer.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Agreement with human annotators, ten in VQA and TextVQA, after both sides are normalized as EvalAI does it.

    An answer that three others gave is fully right. The mean is over leaving out each annotator in turn, so that people
    and models are scored alike; the annotators' number matters: one answer alone can never be agreed with.

    Raises:
      ValueError: there is no annotator.
      TypeError: `answers` is a single text.
    """
    if isinstance(answers, str):
        raise TypeError("vqa_accuracy takes the answers of all annotators, one text alone scores nothing")
    wanted, given = normalize_vqa(prediction), [normalize_vqa(answer) for answer in _references(answers)]
    matches = given.count(wanted)
    others = [matches - (answer == wanted) for answer in given]
    return sum(min(1.0, count / AGREEING_ANNOTATORS) for count in others) / len(given)


def ocrbench(prediction: str, answers: str | Sequence[str], *, dataset: str = "") -> float:
    """1 where the prediction contains one of the reference answers, without regard to case; else 0.

    Args:
      prediction: the model's text.
      answers: the references.
      dataset: the part of OCRBench that the question is from; formulas ("HME100k") are compared without any spaces and
        with their case.

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
    """1 where the option's letter is right, without regard to case, punctuation and outer white space; else 0.

    Of a prediction that begins with a capital letter and a full stop ("B. a tree") the letter counts, of any other the
    whole text.
    """
    letter = re.match(r"\s*([A-Z])\.", prediction)
    return float(_bare(letter[1] if letter else prediction) == _bare(answer))


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _bare(text: str) -> str:
    return text.lower().translate(_NO_PUNCTUATION).strip()


def pope(predictions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """How often a model sees what is not there: yes-or-no questions, "yes" being the positive class.

    A prediction is right only if it is the reference word itself, without regard to case and outer white space; what is
    neither yes nor no counts as wrong, and as neither.

    Returns:
      {"accuracy", "precision", "recall", "f1", "yes_ratio"}; the last is the share of the predictions that say yes.

    Raises:
      ValueError: not one prediction per answer, no answer at all, or one that is neither yes nor no.
    """
    said, wanted = ([text.strip().lower() for text in texts] for texts in (predictions, answers))
    if not wanted or len(said) != len(wanted):
        raise ValueError(
            f"pope: {len(said)} predictions for {len(wanted)} answers; expected one for each, at least one"
        )
    if unknown := set(wanted) - {"yes", "no"}:
        raise ValueError(f"pope: reference answer {sorted(unknown)[0]!r}; expected yes or no")
    pairs = list(zip(said, wanted, strict=True))
    hits, false_alarms, misses = pairs.count(("yes", "yes")), pairs.count(("yes", "no")), pairs.count(("no", "yes"))
    precision, recall = _share(hits, hits + false_alarms), _share(hits, hits + misses)
    return {
        "accuracy": _share(sum(a == b for a, b in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * precision * recall, precision + recall),
        "yes_ratio": _share(said.count("yes"), len(said)),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _references(answers: str | Sequence[str]) -> Sequence[str]:
    found = [answers] if isinstance(answers, str) else answers
    if not found:
        raise ValueError("there is no reference answer to compare with")
    return found


# --- EvalAI's normalization of short answers --------------------------------------------------------------------------

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`!')

# Each stands for itself with any one of its apostrophes forgotten.
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
} | {"somebody'd": "somebodyd"}  # the one that the original turns round


def normalize_vqa(text: str) -> str:
    """A short answer in lower case, without punctuation and articles, number words as digits, apostrophes put back."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    apart = {mark: f"{mark} " not in text and f" {mark}" not in text for mark in _PUNCTUATION}
    for mark in _PUNCTUATION:  # between two words it is their border, at the edge of one it is nothing
        text = text.replace(mark, " " if apart[mark] else "")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [_DIGITS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
