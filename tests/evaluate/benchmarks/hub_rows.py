"""Rows of every benchmark as the hub has them, drawn when a test asks for one: `docvqa(0)`, `docvqa(1)`, and so on.

Each function takes the number of a row and returns its columns, among them those that the package ignores.
`hub_tables.py` states their types and writes them into files.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

MME_CATEGORIES = ("existence", "OCR", "code_reasoning")

Row = dict[str, Any]


def drawn(text: str, size: tuple[int, int] = (64, 48)) -> Row:
    """Returns a picture of a text, as the hub stores it."""
    image = Image.new("RGB", size, tuple(np.random.default_rng(len(text)).integers(120, 256, 3).tolist()))
    ImageDraw.Draw(image).text((4, 10), text, fill="black")
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def docvqa(number: int) -> Row:
    return {
        "questionId": str(49153 + number),
        "question": f"What is the number on page {number}?",
        "question_types": ["handwritten", "form"],
        "image": drawn(f"No. {number}"),
        "docId": 14465 + number,
        "ucsf_document_id": "pybv0228",
        "ucsf_document_page_no": "81",
        "answers": [str(number), f"No. {number}"],
        "data_split": "val",
    }


def infovqa(number: int) -> Row:
    return {
        "questionId": str(98313 + number),
        "question": f"How many of {number + 5} use it?",
        "answers": [str(number)],
        "answer_type": ["single span"],
        "image": drawn(f"{number} of {number + 5}", (40, 120)),
        "image_url": "https://example.org/a.png",
        "operation/reasoning": ["counting"],
        "ocr": "[]",
        "data_split": "val",
    }


def chartqa(number: int) -> Row:
    kind = "human_test" if number % 2 == 0 else "augmented_test"
    return {"type": kind, "question": f"What is bar {number}?", "answer": str(10 * number), "image": drawn("chart")}


def textvqa(number: int) -> Row:
    return {
        "image_id": "003a8ae2ef43b901",
        "question_id": 34602 + number,
        "question": f"what is the Brand of camera {number}?",
        "question_tokens": ["what", "is"],
        "image": drawn("dakota"),
        "image_width": 1024,
        "image_height": 664,
        "flickr_original_url": "https://example.org/o.jpg",
        "flickr_300k_url": "https://example.org/s.jpg",
        "answers": ["dakota"] * 6 + ["clos culombu", "dakota digital", "the dakota", "nous les gosses"],
        "image_classes": ["Cassette deck"],
        "set_name": "val",
        "ocr_tokens": ["DAKOTA"],
    }


def ocrbench(number: int) -> Row:
    formula = number % 3 == 2
    return {
        "dataset": "HME100k" if formula else "IIIT5K",
        "question": " what is written in the image? ",
        "question_type": "Handwritten Mathematical Expression Recognition" if formula else "Regular Text Recognition",
        "answer": ["x ^ 2 + 1"] if formula else ["CENTRE", "Center"],
        "image": drawn("CENTRE"),
    }


def ai2d(number: int) -> Row:
    options = ["larva", "pupa", "egg", "adult"]
    return {"question": f"Which stage is {number}?", "options": options, "answer": str(number % 4), "image": drawn("A")}


def vstar(number: int) -> Row:
    options = "(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather" if number % 2 == 0 else "(A) left\n(B) right"
    suffix = "\nAnswer with the option's letter from the given choices directly."
    return {
        "image": drawn("glove", (128, 64)),
        "text": f"What is the material of glove {number}?\n{options}{suffix}",
        "category": "direct_attributes" if number % 2 == 0 else "relative_position",
        "label": "B",
        "question_id": str(number),
    }


def mme(number: int) -> Row:
    picture, negative = divmod(number, 2)
    category = MME_CATEGORIES[picture % len(MME_CATEGORIES)]
    thing = "sock" if negative else "dog"
    return {
        "question_id": f"{category}/{picture:04d}.jpg",
        "image": drawn(f"dog {picture}"),
        "question": f"Is there a {thing} in this image? Please answer yes or no.",
        "answer": "No" if negative else "Yes",
        "category": category,
    }


def mmstar(number: int) -> Row:
    return {
        "index": number,
        "question": f"Which option is number {number}?\nOptions: A: one, B: two, C: three, D: four",
        "image": drawn(str(number))["bytes"],
        "answer": "ABCD"[number % 4],
        "category": "math" if number % 2 else "coarse perception",
        "l2_category": ("geometry" if number % 4 == 1 else "statistical reasoning") if number % 2 else "image emotion",
        "meta_info": {"source": "MMBench", "split": "val", "image_path": "images/0.jpg"},
    }


def pope(number: int) -> Row:
    category = ("adversarial", "popular", "random")[number % 3]
    return {
        "id": str(number),
        "question_id": str(number),
        "question": f"Is there a {'snowboard' if number % 2 == 0 else 'car'} in the image?",
        "answer": "no" if number % 2 else "yes",
        "image_source": "COCO_val2014_000000310196",
        "image": drawn("snow"),
        "category": category,
    }


def gqa(number: int) -> Row:
    return {
        "id": f"2013{number:05d}",
        "imageId": f"n{number % 2}",
        "question": f"Is object {number} red?",
        "answer": "yes" if number % 2 else "no",
        "fullAnswer": "Yes, it is red.",
        "isBalanced": True,
        "types": {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"},
    }


def gqa_picture(number: int) -> Row:
    return {"id": f"n{number}", "image": drawn(f"photo {number}")}


def scienceqa(number: int) -> Row:
    return {
        "image": drawn("magnet"),
        "question": f"Which property do the {number + 2} objects share?",
        "choices": ["hard", "soft", "stretchy"][: 2 + number % 2],
        "answer": number % 2,
        "hint": "Select the better answer." if number % 2 else "",
        "task": "closed choice",
        "grade": "grade3",
        "subject": "natural science",
        "topic": "physics",
        "category": "Materials",
        "skill": "Compare properties of objects",
        "lecture": "",
        "solution": "",
    }


def realworldqa(number: int) -> Row:
    letters = (
        "\n\nA. Left\nB. Right\n\nPlease answer directly with only the letter of the correct option and nothing else."
    )
    plain = "\n\nPlease answer directly with a single word or number."
    return {
        "image": drawn("road", (120, 60)),
        "image_path": f"{number}.webp",
        "question": f"Where is car {number}?{letters if number % 2 == 0 else plain}",
        "answer": "A" if number % 2 == 0 else "Downhill",
    }


def mmbench(number: int) -> Row:
    """Two rotations of each question; the second question has two options and a hint."""
    question, rotation = divmod(number, 2)
    options, few = ["red", "green", "blue", "white"], question % 2 == 1
    if few:
        options = ["True", "False"]
    turned = options[rotation:] + options[:rotation]
    given = dict(zip("ABCD", turned + ["nan"] * (4 - len(turned)), strict=True))
    return {
        "index": 241 + question + rotation * 1_000_000,
        "question": f"Which color is square {question}?",
        "hint": "Squares have four sides." if few else "nan",
        "answer": "ABCD"[turned.index(options[0])],
        **given,
        "category": "attribute_recognition" if few else "object_localization",
        "image": drawn("square"),
        "source": "reasonita",
        "L2-category": "finegrained_perception (instance-level)",
        "comment": "nan",
        "split": "dev",
    }


def mmmu(number: int) -> Row:
    choice = number % 2 == 0
    images = {f"image_{index}": drawn(f"figure {index}") if index <= 2 else None for index in range(1, 8)}
    return {
        "id": f"validation_{'Accounting' if choice else 'Diagnostics_and_Laboratory_Medicine'}_{number}",
        "question": f"<image 1> Compute {number}." if choice else "How many cells does <image 1> show?",
        "options": "['$6', '<image 2>', '$8']" if choice else "[]",
        "explanation": "",
        **images,
        "img_type": "['Tables']",
        "answer": "B" if choice else "['24/7', '3.429']",
        "topic_difficulty": "Medium",
        "question_type": "multiple-choice" if choice else "open",
        "subfield": "Managerial Accounting",
    }


def seedbench(number: int) -> Row:
    video = number % 3 == 2
    return {
        "answer": "A",
        "choice_a": "One",
        "choice_b": "Two",
        "choice_c": "Three",
        "choice_d": "Four",
        "data_id": "1454426_2591111986",
        "data_type": "video" if video else "image",
        "question": f"How many towels are in picture {number}?",
        "question_id": str(101669 + number),
        "question_type_id": 5,
        "image": [drawn(f"frame {frame}") for frame in range(3 if video else 1)],
        "segment": [0, 4] if video else None,
    }
