"""The exported processor gives the token ids and pixels of our preprocessing, for questions and conversations."""

import ast
import base64
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jinja2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from visor_jax import testing
from visor_jax.data import chat_template
from visor_jax.data.chat import encode_conversation
from visor_jax.data.sample import Turn
from visor_jax.export import folder_files
from visor_jax.export.torch_model import VisorProcessor, template_visor
from visor_jax.generate.request import prompt_of
from visor_jax.loading import Visor

TOKENIZER = testing.almanac_tokenizer()
ORIENTATION = 0x0112  # of EXIF


@pytest.fixture(scope="module", params=[None, 'Say "yes".'], ids=["no system turn", "system turn"])
def pair(request, tmp_path_factory):
    """A folder's processor and chat template, and the architecture and system text of its model."""
    folder, arch = tmp_path_factory.mktemp("folder"), testing.tiny_architecture()
    files = folder_files.describe(Visor({}, arch, TOKENIZER, [], system=request.param), stage="full", dtype="float32")
    for name, value in files.json_files.items():
        folder_files.write_json(folder / name, value)
    for name, text in files.text_files.items():
        (folder / name).write_text(text, encoding="utf-8")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        files.text_files["chat_template.jinja"]
    )
    return SimpleNamespace(
        processor=VisorProcessor.from_pretrained(folder), arch=arch, system=request.param, template=template
    )


@st.composite
def pictures(draw) -> Image.Image:
    """Pictures of any size, mode and orientation, opened from a file."""
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    mode = draw(st.sampled_from(["RGB", "RGBA", "LA", "L", "P", "PA", "1", "I;16", "I"]))
    rgb = Image.fromarray(testing.random_picture(height, width, draw(st.integers(0, 9))))
    if mode in ("I;16", "I"):
        deep = np.asarray(rgb.convert("L")).astype(np.uint16) * 257
        picture = Image.fromarray(deep) if mode == "I;16" else Image.fromarray(deep).convert("I")
    else:
        picture = rgb.convert("LA").convert("PA") if mode == "PA" else rgb.convert(mode)
    if "A" in mode:
        alpha = np.random.default_rng(height).integers(0, 256, (height, width), np.uint8)
        picture.putalpha(Image.fromarray(alpha)) if mode != "PA" else None
    exif = Image.Exif()
    exif[ORIENTATION] = draw(st.integers(1, 8))
    file = io.BytesIO()
    if mode in ("PA", "I"):  # PNG files cannot have these modes
        picture.info["exif"] = exif.tobytes()
        return picture
    picture.save(file, "PNG", exif=exif, **({"transparency": 3} if mode == "P" and draw(st.booleans()) else {}))
    return Image.open(io.BytesIO(file.getvalue()))


PIECES = ["A", "b", "?", " ", "\n", "\t", "\r", "\xa0", "é", "<|im_end|>", "<|im_start|>user\n"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


def normalized(tiles: np.ndarray, arch) -> np.ndarray:
    mean, std = (np.array(values, np.float32) for values in (arch.anyres.image_mean, arch.anyres.image_std))
    return ((tiles.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)


def assert_same(pair, images, inputs, example) -> None:
    """Asserts that the model inputs of one prompt have the tokens and pixels of an `Example`."""
    ids = inputs["input_ids"][0].numpy()
    is_image = ids == pair.processor.image_token_id
    np.testing.assert_array_equal(ids[~is_image], example.text_tokens)
    np.testing.assert_array_equal(np.flatnonzero(is_image), example.visual_positions)
    if len(example.tiles):
        counts = [len(cut) for cut in pair.processor.tiles(images)]
        tiles = [cut[:count] for cut, count in zip(inputs["pixel_values"].numpy(), counts, strict=True)]
        np.testing.assert_allclose(np.concatenate(tiles), normalized(example.tiles, pair.arch), atol=1e-6)


@settings(max_examples=60)
@given(st.lists(pictures(), max_size=3), TEXTS, st.booleans(), TEXTS)
def test_questions_are_encoded_like_ours(pair, images, before, marked, after):
    """With EXIF orientation, any mode, white space, and any number of pictures."""
    question = (
        before + "<image>" * (len(images) if marked else 0) + after + ("" if (before + after).strip() else "What?")
    )
    example = prompt_of(images, question, TOKENIZER, pair.arch, pair.system)
    assert_same(pair, images, pair.processor(images, question), example)
    content = [*({"type": "image", "image": one} for one in images), {"type": "text", "text": question}]
    message = {"role": "user", "content": content}
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    assert_same(pair, images, pair.processor.apply_chat_template([message], **options), example)


@st.composite
def conversations(draw):
    """Lists of turns: (question, number of pictures, answer)."""
    plain = st.lists(st.sampled_from(PIECES[:9]), max_size=6).map("".join)
    turns = draw(
        st.lists(st.tuples(plain, st.integers(0, 2), plain.map(lambda text: f"{text}x")), min_size=1, max_size=4)
    )
    return turns


@settings(max_examples=60)
@given(conversations())
def test_conversations_are_encoded_as_in_training(pair, turns):
    """Messages, the rendered template and our encoding agree, and the assistant mask equals the training targets."""
    messages, expected, count = [], [], sum(number for _, number, _ in turns)
    for question, number, answer in turns:
        content = [*({"type": "image"} for _ in range(number)), {"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        expected.append(Turn("<image>\n" * number + question, answer))
    if count == 0:  # a picture without a place belongs to the first question
        count, messages[0]["content"] = 1, [{"type": "image"}, *messages[0]["content"]]
    images = [Image.new("RGB", (9, 9 + index)) for index in range(count)]
    ours = encode_conversation(TOKENIZER, expected, system=pair.system, num_images=count)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    actual = pair.processor.apply_chat_template(messages, images=images, **options)
    ids, is_answer = (actual[name][0].tolist() for name in ("input_ids", "assistant_masks"))
    lengths = [pair.processor.num_visual_tokens((one.height, one.width), count) for one in images]
    assert one_placeholder(ids, lengths, pair.processor.image_token_id) == ours.token_ids
    assert sum(is_answer) == sum(ours.target_mask)
    *earlier, latest = [(turn.question, turn.answer) for turn in expected]
    if latest[0].replace("<image>", "").strip():  # a follow-up question, as `answer(..., history=...)` reads it
        example = prompt_of(images, latest[0], TOKENIZER, pair.arch, pair.system, earlier)
        prompt_options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        assert_same(
            pair, images, pair.processor.apply_chat_template(messages[:-1], images=images, **prompt_options), example
        )
    rendered = pair.processor.apply_chat_template(messages)
    assert pair.template.render(messages=messages, add_generation_prompt=False) == rendered
    assert pair.processor(images, text=rendered)["input_ids"][0].tolist() == ids
    open_end = pair.processor.apply_chat_template(messages, images=images, tokenize=True, continue_final_message=True)
    tail = [pair.processor.end_token_id, *pair.processor.chat.encode("\n")]
    assert open_end[0].tolist() + tail == ids


def one_placeholder(ids: list[int], lengths: list[int], placeholder: int) -> list[int]:
    """Returns token ids with each picture's run of placeholders reduced to one."""
    lengths, actual = list(lengths), []
    while ids:
        actual.append(ids[0])
        ids = ids[lengths.pop(0) if ids[0] == placeholder else 1 :]
    return actual


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("question", ["Which?", " Which? ", "\nWhich?\r\n"])
def test_template_places_pictures_one_per_line(pair, count, question):
    content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": question}]
    rendered = pair.template.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
    expected = "<image>\n" * count + (question.strip() if count == 1 else question)
    assert rendered.endswith(f"<|im_start|>user\n{expected}<|im_end|>\n<|im_start|>assistant\n")
    assert rendered.startswith("<|im_start|>system\n") == (pair.system is not None)


def test_a_rotated_photo_is_counted_upright(pair):
    photo, exif = Image.new("RGB", (60, 20)), Image.Exif()
    exif[ORIENTATION] = 6
    file = io.BytesIO()
    photo.save(file, "JPEG", exif=exif)
    inputs = pair.processor(Image.open(file), "Which?")
    assert inputs["image_sizes"].tolist() == [[60, 20]]
    expected = pair.processor.num_visual_tokens((60, 20))
    assert int((inputs["input_ids"] == pair.processor.image_token_id).sum()) == expected


def test_malformed_exif_does_not_reject_the_picture(pair):
    photo, file = Image.new("RGB", (60, 20)), io.BytesIO()
    photo.save(file, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert pair.processor(Image.open(file), "Which?")["image_sizes"].tolist() == [[20, 60]]


def test_pictures_may_be_paths_text_and_arrays(pair, tmp_path):
    array = testing.random_picture(9, 14)
    Image.fromarray(array).save(tmp_path / "a.png")
    text = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    url = f"data:image/png;base64,{text}"
    expected = pair.processor(Image.fromarray(array), "Which?")
    for source in (array, str(tmp_path / "a.png"), tmp_path / "a.png", url, text):
        assert torch.equal(pair.processor(source, "Which?")["pixel_values"], expected["pixel_values"])
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "image_url", "image_url": url}]
    parts += [{"type": "image", "base64": text}, {"type": "image", "path": str(tmp_path / "a.png")}]
    for part in parts:
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "Which?"}]}]
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        actual = pair.processor.apply_chat_template(messages, **options)
        assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_rendered_prompts_share_a_list_of_pictures(pair):
    """Evaluation harnesses pass texts with all pictures in one list, or one list per text."""
    images = [Image.fromarray(testing.random_picture(9, 9 + index, index)) for index in range(3)]
    texts = ["<|im_start|>user\n" + "<image>\n" * count + "What?<|im_end|>\n" for count in (1, 0, 2)]
    flat = pair.processor(text=texts, images=images, videos=[], audios=[], padding=True, return_tensors="pt")
    nested = pair.processor(text=texts, images=[images[:1], [], images[1:]])
    assert all(torch.equal(flat[name], value) for name, value in nested.items())
    assert flat["batch_num_images"].tolist() == [1, 2]
    assert flat.to(dtype=torch.float64)["pixel_values"].dtype == torch.float64
    right = pair.processor(text=texts, images=images, padding_side="right", return_tensors="np")
    assert right["attention_mask"][1, 0] == 1 and right["attention_mask"][1, -1] == 0


def turn_of(role: str, content) -> dict:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(images=[]), "either question="),
        (lambda p: p([], "A", text="B"), "either question="),
        (lambda p: p(Image.new("RGB", (3, 3)), text="no marker"), "0 <image> markers, 1 pictures"),
        (lambda p: p([Image.new("RGB", (3, 3))], text=["a", "b"]), "1 pictures for 0"),
        (lambda p: p([[], [], []], text=["a", "b"]), "lists for 3 prompts; text has 2"),
        (lambda p: p([], text="a", truncation=True), "truncation"),
        (lambda p: p([], text="a", videos=[1]), "videos"),
        (lambda p: p([], text="a", return_tensors="tf"), "return_tensors"),
        (lambda p: p([], text="a", padding="max_length", max_length=0), "max_length: 0"),
        (lambda p: p([], text="a", pading=True), "pading"),
        (lambda p: p.apply_chat_template([turn_of("user", [{"type": "image"}])], tokenize=True), "0 pictures for 1"),
        (lambda p: p.apply_chat_template([turn_of("user", [{"type": "video"}])], tokenize=True), "'video'"),
        (lambda p: p.apply_chat_template([turn_of("user", "A")], tokenize=True, images=["a.png"]), "1 pictures for 0"),
        (lambda p: p.apply_chat_template([turn_of("assistant", "<image>")], tokenize=True, images=["a"]), "a"),
    ],
)  # fmt: skip
def test_invalid_calls_are_refused(pair, call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(pair.processor)


def test_save_writes_the_files_that_were_read(pair, tmp_path):
    pair.processor.save_pretrained(tmp_path)
    again = VisorProcessor.from_pretrained(tmp_path)
    image = Image.fromarray(testing.random_picture(9, 14))
    first, second = (processor(image, "Which?") for processor in (pair.processor, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    (tmp_path / "config.json").write_text(json.dumps({"of": "a model that was trained further"}))
    pair.processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"of": "a model that was trained further"}


def test_batches_of_conversations(pair):
    one = [turn_of("user", [{"type": "image", "image": Image.new("RGB", (9, 9))}])]
    two = [turn_of("system", "Be brief."), turn_of("user", "Which?")]
    texts = pair.processor.apply_chat_template([one, two], add_generation_prompt=True)
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    inputs = pair.processor.apply_chat_template([one, two], **options)
    expected = pair.processor(text=texts, images=[[Image.new("RGB", (9, 9))], []])
    assert all(torch.equal(inputs[name], value) for name, value in expected.items())
    assert texts[1].startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_only_one_file_states_the_chat_template():
    """Encoders and templates use the same parts, which a folder contains as template_visor.py."""
    assert all(getattr(template_visor, name) is getattr(chat_template, name) for name in template_visor.__all__)
    literals = re.compile(r"<\|(im_start|im_end|endoftext)\|>|\bassistant\\n")
    package = Path(chat_template.__file__).parents[1]
    holders = {
        str(path.relative_to(package)) for path in package.rglob("*.py") if literals.search(code_of(path.read_text()))
    }
    assert holders == {"data/chat_template.py"}


def code_of(source: str) -> str:
    """Returns a module's source without docstrings and comments."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(tree)
