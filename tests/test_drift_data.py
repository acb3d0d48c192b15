"""Training data: which rows are usable, what the model sees of them, and what it learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from chat_families import CHAT_FAMILIES
from chat_models import build_chat
from PIL import Image

from ipmerge_core.errors import RunError
from ipmerge_core.finetuning import conversations
from ipmerge_core.finetuning.conversations import (
    MOST_TURNS,
    Turn,
    load_conversations,
    read_row,
)
from ipmerge_core.finetuning.dataset import Datasets
from ipmerge_core.finetuning.examples import (
    CLOSE,
    IGNORED,
    OPEN,
    Encoder,
    Unusable,
    collate,
    show_masked,
)
from ipmerge_core.inference.encoding import ModelProcessor
from ipmerge_core.inference.prompts import Message

DEMO = Path(__file__).parents[1] / "assets" / "demo"
PICTURE = Image.effect_noise((60, 40), 80).convert("RGB")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(ModelProcessor(DEMO / "mllm", takes_images=True))


def conversation(*texts: str, system: str = ""):
    roles = ("user", "assistant") * len(texts)
    turns = [*([{"role": "system", "content": system}] if system else [])]
    turns += [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    found = read_row({"messages": turns, "image": PICTURE})
    assert not isinstance(found, str), found
    return found


def learned(example) -> torch.Tensor:
    return example.inputs["input_ids"][example.labels != IGNORED]


# --- rows ---


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {
            "conversations": [
                {"from": "human", "value": "<image>\nQ"},
                {"from": "gpt", "value": "A"},
            ]
        },
        {"question": "Q", "answer": "A"},
        {"problem": " Q ", "solution": "A", "images": ["b.png"], "image": None},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
            ]
        },
    ],
)
def test_every_form_of_a_row_gives_the_same_conversation(row):
    found = read_row({"image": "a.png", **row} if "images" not in row else row)
    assert found.turns == (Turn("user", "Q"), Turn("assistant", "A"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "Q", "answer": "A"}, "no image"),
        ({"question": "Q", "answer": "A", "image": ""}, "no image"),
        ({"question": "Q", "answer": "A", "image": 7}, "no image"),
        ({"question": "Q", "answer": " ", "image": "a.png"}, "no answer"),
        ({"question": "Q", "image": "a.png"}, "no answer"),
        ({"question": "<image>", "answer": "A", "image": "a.png"}, "no question"),
        ({"messages": [{"role": "user", "content": "Q"}], "image": "a.png"}, "no answer"),
        ({"question": "Q", "answer": "A", "image": ["a.png", "b.png"]}, "several images"),
        ({"messages": [], "image": "a.png"}, "no question"),
        ({"messages": ["text"], "image": "a.png"}, "no question"),
        ({"messages": [{"role": "tool", "content": "x"}], "image": "a.png"}, "no question"),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q"},
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "A"},
                ],
                "image": "a.png",
            },
            "roles do not alternate",
        ),
    ],
)
def test_unusable_rows_have_a_reason(row, reason):
    assert read_row(row) == reason


def test_a_file_is_read_row_by_row_and_unusable_rows_are_counted(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "question": "Q", "answer": "A"},
        {"question": "Q", "answer": "A"},
        {"image": "lost.png", "question": "Q", "answer": "A"},
        {"image": "a.png", "question": "Q2", "answer": "A"},
        {"question": "Q", "answer": "A"},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    found = load_conversations(path)
    assert [each.turns[0].text for each in found.conversations] == ["Q", "Q2"]
    assert found.skipped == {"no image": 2, "the image file is missing": 1}
    assert found.describe().startswith("2 conversations, 3 rows skipped (2 no image")
    assert found.conversations[0].image.size == PICTURE.size
    assert load_conversations(path, 2).skipped == {"no image": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no usable conversation"),
        ("[1]\n", "Line 1 .*not an object"),
        ('{"image": \n', "Line 1 .*not valid JSON"),
        ('{"a": ' + "[" * 50_000 + "]" * 50_000 + "}", "nested too deeply"),
        ('{"question": "Q", "answer": "A"}', "no usable conversation; rows skipped: 1 no image"),
    ],
)
def test_invalid_files_are_refused_with_their_line(text, message, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    with pytest.raises(RunError, match=message):
        load_conversations(path)


@pytest.mark.parametrize(
    "image",
    [
        "x" * 5000,
        "x/" * 3000,
        "data:image/png;base64," + "A" * 500,
        "a\0.png",
        "\ud800.png",
        ".",
        "..",
    ],
    ids=["long name", "long path", "data", "null", "surrogate", "folder", "parent"],
)
def test_an_image_name_that_no_file_can_have_is_a_missing_image(image, tmp_path):
    row = {"image": image, "question": "Q", "answer": "A"}
    assert read_row(row, tmp_path) == "the image file is missing"


@pytest.mark.parametrize("role", ["question", "answer", "system"])
def test_texts_with_lone_surrogates_are_skipped_and_counted(role, tmp_path):
    PICTURE.save(tmp_path / "a.png")
    texts = {"system": "S", "question": "Q", "answer": "A"} | {role: "a \ud83d b"}
    roles = dict(zip(texts, ("system", "user", "assistant"), strict=True))
    bad = [{"role": roles[name], "content": text} for name, text in texts.items()]
    rows = [
        {"image": "a.png", "messages": bad},
        {"image": "a.png", "question": "Q \U0001f600", "answer": "A"},
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_conversations(tmp_path / "train.jsonl")
    assert found.skipped == {"text that is not valid Unicode": 1}
    assert len(found.conversations) == 1


def test_the_number_of_turns_is_bounded():
    def turns(n: int) -> dict[str, object]:
        roles = ["user", "assistant"] * (n // 2)
        return {"messages": [{"role": r, "content": "x"} for r in roles], "image": "a.png"}

    assert not isinstance(read_row(turns(MOST_TURNS)), str)
    assert read_row(turns(MOST_TURNS + 2)) == f"more than {MOST_TURNS} turns"


def test_files_of_other_programs_are_read(tmp_path):
    """With a byte order mark, line ends of Windows, NaN in other columns, and a key twice."""
    PICTURE.save(tmp_path / "a.png")
    row = '{"image": "a.png", "question": "Q", "answer": "A", "score": NaN, "score": 1e999}'
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n{row}\r\n".encode())
    assert len(load_conversations(tmp_path / "train.jsonl").conversations) == 2


def test_rows_of_a_dataset_are_read_with_checked_images(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    modes = ("RGB", "L", "RGBA")
    rows = {
        "images": [[Image.new(mode, (40, 30))] for mode in modes] + [[Image.new("L", (2, 3000))]],
        "question": ["Q"] * 4,
        "answer": ["A"] * 4,
    }
    images = datasets.List(datasets.Image())
    found = datasets.Dataset.from_dict(rows).cast_column("images", images)
    (tmp_path / "set").mkdir()
    found.to_parquet(tmp_path / "set" / "train.parquet")
    conversations = load_conversations(f"datasets:{tmp_path / 'set'}:train").conversations
    assert [each.image.mode for each in conversations[:3]] == ["RGB"] * 3
    with pytest.raises(RunError, match="pixels"):
        _ = conversations[3].image
    assert len(load_conversations(f"datasets:{tmp_path / 'set'}:train", 2).conversations) == 2
    with pytest.raises(RunError, match="Cannot read the dataset ''"):
        load_conversations("datasets:")


def test_the_fingerprint_is_of_the_content_and_not_of_where_it_is(tmp_path):
    def prints(folder: str, answer: str, size: int = 8) -> str:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        Image.new("RGB", (size, size)).save(place / "a.png")
        row = {"image": "a.png", "question": "Q", "answer": answer}
        (place / "train.jsonl").write_text(json.dumps(row))
        return load_conversations(place / "train.jsonl").fingerprint

    assert prints("one", "A") == prints("two", "A")
    assert len({prints("one", "A"), prints("one", "B"), prints("one", "A", 99)}) == 3
    demo = [load_conversations("demo", n).fingerprint for n in (4, 4, 5)]
    assert demo[0] == demo[1] != demo[2]


def test_more_rows_than_memory_is_meant_for_are_refused_unless_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(conversations, "MOST_ROWS", 2)
    PICTURE.save(tmp_path / "a.png")
    row = json.dumps({"image": "a.png", "question": "Q", "answer": "A"})
    (tmp_path / "train.jsonl").write_text("\n".join([row] * 3))
    with pytest.raises(RunError, match="more than 2 rows"):
        load_conversations(tmp_path / "train.jsonl")
    assert len(load_conversations(tmp_path / "train.jsonl", 2).conversations) == 2


def test_what_a_terminal_obeys_and_brackets_of_the_data_are_shown_as_text(encoder):
    found = encoder.encode(conversation(f"a {CLOSE} \x1b[31m", f"b {OPEN}\u202e c"))
    shown = show_masked(found, encoder.processor)
    assert (shown.count(OPEN), shown.count(CLOSE)) == (1, 1)
    assert "\x1b" not in shown
    assert "\u202e" not in shown


@pytest.mark.parametrize("limit", [0, -1, 10**9, 1.5, "3", True, float("nan")])
def test_a_limit_is_a_number_of_rows(limit):
    with pytest.raises(RunError, match="limit of .* rows; expected 1 to"):
        load_conversations("demo", limit)


def test_missing_files_unknown_tasks_and_limits_are_refused(tmp_path):
    for source, limit, message in (
        (tmp_path / "none.jsonl", None, "Expected a jsonl file"),
        ("demo:mul,poetry", None, "Unknown demo task 'poetry'"),
        ("demo", 0, "limit of 0"),
    ):
        with pytest.raises(RunError, match=message):
            load_conversations(source, limit)


def test_the_demo_answers_with_its_chain_of_thought():
    found = load_conversations("demo:perimeter,shape", 4).conversations
    assert len(found) == 4
    assert [each.turns[1].text.count("=") for each in found] == [2, 0, 2, 0]
    assert all(each.image.size == (128, 128) for each in found)


# --- what is seen and learned ---


def test_the_prompt_is_that_of_the_chat_and_only_the_answer_is_learned(encoder):
    found = encoder.encode(conversation("What is it?", "6*4=24."))
    prompt = encoder.processor.encode([Message("user", "What is it?", (PICTURE,))])
    n = prompt["input_ids"].shape[1]
    assert torch.equal(found.inputs["input_ids"][:, :n], prompt["input_ids"])
    assert torch.equal(found.inputs["pixel_values"], prompt["pixel_values"])
    assert (found.labels[:, :n] == IGNORED).all()
    tokenizer = encoder.processor.tokenizer
    assert tokenizer.decode(learned(found)) == " 6*4=24.</s>"
    assert found.n_answer == len(learned(found))
    assert found.inputs["attention_mask"].shape == found.labels.shape


def test_the_masked_text_shows_what_is_learned_and_counts_image_tokens(encoder):
    found = encoder.encode(conversation("What is it?", "6*4=24."))
    shown = show_masked(found, encoder.processor)
    expected = f"<s>USER: <image> x 16\nWhat is it? ASSISTANT:{OPEN} 6*4=24.</s>{CLOSE}"
    assert shown == expected


def test_all_answers_of_a_longer_conversation_are_learned(encoder):
    found = encoder.encode(conversation("One?", "1.", "Two?", "2.", system="Be short."))
    shown = show_masked(found, encoder.processor)
    assert shown.count(OPEN) == 2
    assert f"{OPEN} 1.</s>{CLOSE}" in shown
    assert f"{OPEN} 2.</s>{CLOSE}" in shown


def test_control_tokens_in_texts_are_characters_in_the_prompt_and_in_the_answer(encoder):
    found = encoder.encode(conversation("Is it <pad>?", "No, </s> it is <image>."))
    ids = found.inputs["input_ids"]
    tokenizer = encoder.processor.tokenizer
    image, end, pad = tokenizer.convert_tokens_to_ids(["<image>", "</s>", "<pad>"])
    assert int((ids == image).sum()) == 16
    assert int((ids == end).sum()) == 1
    assert int((ids == pad).sum()) == 0
    assert tokenizer.decode(learned(found)) == " No, </s> it is <image>.</s>"


def test_kept_tokens_are_tokens_in_the_answer_only(tmp_path):
    family = CHAT_FAMILIES["Qwen2.5-VL"]
    processor = ModelProcessor(build_chat(family, tmp_path / "m"), takes_images=True)
    processor.tokenizer.add_tokens(["<think>", "</think>"])
    encoder = Encoder(processor, kept=("<think>", "</think>"))
    think, end = processor.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    found = encoder.encode(conversation("What is <think>?", "<think>6*4</think>24"))
    ids = found.inputs["input_ids"][0].tolist()
    assert (ids.count(think), ids.count(end)) == (1, 1)
    assert think in learned(found).tolist()


def test_long_conversations_are_unusable_and_large_images_are_scaled(encoder):
    short = Encoder(encoder.processor, longest=20)
    with pytest.raises(Unusable, match="longer than 20 tokens"):
        short.encode(conversation("What is it?", "6*4=24."))
    from ipmerge_core.finetuning.examples import scaled_down

    scaled = scaled_down(Image.new("RGB", (2000, 1000)), 262_144)
    assert scaled.size[0] * scaled.size[1] <= 262_144
    assert scaled.size[0] / scaled.size[1] == pytest.approx(2, rel=0.01)
    assert scaled_down(PICTURE, 262_144) is PICTURE


def test_a_damaged_image_is_skipped_and_counted(encoder, tmp_path):
    PICTURE.save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = [{"image": f"{n}.png", "question": "Q", "answer": "A"} for n in ("good", "bad")]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = Datasets(load_conversations(tmp_path / "train.jsonl"), encoder, 0.0, 0)
    list(data.iter_encode())
    assert len(data.train) == 1
    assert data.skipped == {"the image cannot be read": 1}


def test_a_batch_is_padded_on_the_right_and_padding_is_not_learned(encoder):
    examples = [encoder.encode(conversation("Q?", answer)) for answer in ("1.", "1 2 3 4 5.")]
    batch = collate(examples, pad=0)
    short, long = (example.length for example in examples)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, long)
    assert (batch["labels"][0, short:] == IGNORED).all()
    assert (batch["attention_mask"][0, short:] == 0).all()
    assert (batch["input_ids"][0, short:] == 0).all()
    assert batch["pixel_values"].shape[0] == 2


def test_images_of_other_numbers_of_tiles_are_padded(encoder):
    examples = [encoder.encode(conversation("Q?", "1.")) for _ in range(2)]
    for example, tiles in zip(examples, (2, 3), strict=True):
        example.inputs["pixel_values"] = torch.ones(1, tiles, 3, 4, 4)
    batch = collate(examples, pad=0)
    assert batch["pixel_values"].shape == (2, 3, 3, 4, 4)
    assert batch["pixel_values"][0].sum() == 2 * 3 * 16


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # transformers' own
@pytest.mark.parametrize("name", sorted(CHAT_FAMILIES))
def test_every_family_encodes_the_prompt_of_its_chat(name, tmp_path):
    family = CHAT_FAMILIES[name]
    processor = ModelProcessor(build_chat(family, tmp_path / "model"), takes_images=True)
    found = Encoder(processor).encode(conversation("What is it?", "A cat."))
    prompt = processor.encode([Message("user", "What is it?", (PICTURE,))])["input_ids"]
    assert torch.equal(found.inputs["input_ids"][:, : prompt.shape[1]], prompt)
    text = processor.tokenizer.decode(learned(found))
    assert text.strip() == "A cat.</s>"
    batch = collate([found, found], pad=0)
    assert batch["input_ids"].shape[0] == 2


def test_rows_are_held_out_by_seed_and_skipped_ones_counted(encoder):
    rows = load_conversations("demo", 20)
    held = []
    for seed in (0, 0, 1):
        data = Datasets(rows, encoder, 0.2, seed)
        assert [each.done for each in data.iter_encode()][-1] == 20
        assert (len(data.train), len(data.held_out)) == (16, 4)
        held.append([each.turns for each in data.held_out.conversations])
    assert held[0] == held[1] != held[2]
    short = Datasets(rows, Encoder(encoder.processor, longest=36), 0.0, 0)
    list(short.iter_encode())
    assert 0 < len(short.train) < 20
    assert short.skipped["longer than 36 tokens"] == 20 - len(short.train)
    none = Datasets(rows, Encoder(encoder.processor, longest=16), 0.0, 0)
    with pytest.raises(RunError, match="20 rows skipped"):
        list(none.iter_encode())
