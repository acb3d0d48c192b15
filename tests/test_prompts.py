"""Chat prompts: whatever content a template takes, the text and the image arrive as they should.

Prompts are compared token by token with those of texts written by hand.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ipmerge_core.errors import ModelLoadError, RunError
from ipmerge_core.inference.encoding import ModelProcessor
from ipmerge_core.inference.prompts import (
    LONGEST_QUESTION,
    ChatFormat,
    Message,
    check_conversation,
    check_question,
    render_chat,
)

DEMO = Path(__file__).parents[1] / "assets" / "demo"
PICTURE = Image.new("RGB", (64, 64), "white")
LINES = "{% for m in messages %}%s{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
BODY = "{{ m['role'] | upper }}: %s "


def template(content: str) -> str:
    """A template that writes `ROLE: content ` per message."""
    return LINES.replace("%s", BODY.replace("%s", content))


PARTS = (
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n"
    "{% elif p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
)
BOTH = "{% if m['content'] is string %}{{ m['content'] }}{% else %}" + PARTS + "{% endif %}"
TEMPLATES = {
    "string, printed": template("{{ m['content'] }}"),
    "string, joined": LINES.replace("%s", "{{ m['role'] | upper + ': ' + m['content'] + ' ' }}"),
    "string, joined by ~": LINES.replace(
        "%s", "{{ m['role'] | upper ~ ': ' ~ m['content'] ~ ' ' }}"
    ),
    "string, trimmed": template("{{ m['content'] | trim }}"),
    "list": template(PARTS),
    "both": template(BOTH),
    "both, the list as JSON": template(
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'] | tojson }}"
        "{% endif %}"
    ),
    "both, without images in lists": template(BOTH.replace("<image>\n", "")),
    "list, without images": template(PARTS.replace("<image>\n", "")),
    "list for users, strings for others": template(
        "{% if m['role'] == 'user' %}" + PARTS + "{% else %}{{ '' + m['content'] }}{% endif %}"
    ),
}
HISTORY = [
    Message("system", "Answer in one word."),
    Message("user", "What shape is it?"),
    Message("assistant", "A 'square'\\ish \"box\"."),
]


@pytest.fixture(scope="module")
def mllm() -> ModelProcessor:
    return ModelProcessor(DEMO / "mllm", takes_images=True)


@pytest.fixture(scope="module")
def math() -> ModelProcessor:
    return ModelProcessor(DEMO / "math", takes_images=False)


@pytest.fixture(autouse=True)
def same_template_afterwards(mllm: ModelProcessor, math: ModelProcessor):
    owners = [mllm.processor, mllm.tokenizer, math.tokenizer]
    before = [owner.chat_template for owner in owners]
    yield
    for owner, found in zip(owners, before, strict=True):
        owner.chat_template = found


def use(loaded: ModelProcessor, found: object) -> None:
    for owner in (loaded.processor, loaded.tokenizer):
        owner.chat_template = found


def tokens(
    loaded: ModelProcessor,
    question: str,
    image: Image.Image | None = None,
    before: list[Message] | tuple[()] = (),
) -> list[int]:
    return loaded.encode([*before, Message("user", question, () if image is None else (image,))])[
        "input_ids"
    ][0].tolist()


def tokens_of(loaded: ModelProcessor, text: str, *images: Image.Image) -> list[int]:
    """The tokens that a text written by hand has."""
    if loaded.takes_images:
        more = {"images": list(images)} if images else {}
        return loaded.processor(text=[text], **more)["input_ids"][0]
    return loaded.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_question_with_an_image_gets_the_same_prompt_from_every_kind_of_template(mllm, name):
    use(mllm, TEMPLATES[name])
    expected = tokens_of(mllm, "USER: <image>\nHow many sides? ASSISTANT:", PICTURE)
    assert tokens(mllm, "How many sides?", PICTURE) == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("side", ["mllm", "math"])
def test_a_question_without_an_image_never_becomes_a_repr_on_either_side(request, name, side):
    loaded = request.getfixturevalue(side)
    use(loaded, TEMPLATES[name])
    expected = tokens_of(loaded, 'USER: It\'s "2\\3"? ASSISTANT:')
    assert tokens(loaded, 'It\'s "2\\3"?', None) == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("side", ["mllm", "math"])
def test_a_system_prompt_and_earlier_turns_come_in_order(request, name, side):
    loaded = request.getfixturevalue(side)
    use(loaded, TEMPLATES[name])
    image = PICTURE if loaded.takes_images else None
    expected = tokens_of(
        loaded,
        f"SYSTEM: {HISTORY[0].text} USER: {HISTORY[1].text} ASSISTANT: {HISTORY[2].text} "
        f"USER: {'<image>' if image else ''}{chr(10) if image else ''}And now? ASSISTANT:",
        *([PICTURE] if image else []),
    )
    assert tokens(loaded, "And now?", image, HISTORY) == expected


def test_an_image_of_an_earlier_turn_stays_with_its_question(mllm):
    before = [Message("user", "What is it?", (PICTURE,)), Message("assistant", "A box.")]
    for name in TEMPLATES:
        use(mllm, TEMPLATES[name])
        expected = tokens_of(
            mllm,
            "USER: <image>\nWhat is it? ASSISTANT: A box. USER: <image>\nAnd this? ASSISTANT:",
            PICTURE,
            PICTURE,
        )
        assert tokens(mllm, "And this?", PICTURE, before) == expected, name


@pytest.mark.parametrize(
    "on_system",
    [
        "{{ raise_exception('System role not supported') }}",
        "",
        "{% set ignored = m['content'] %}",
    ],
)
def test_a_system_prompt_that_a_template_does_not_know_opens_the_first_question(mllm, on_system):
    use(
        mllm,
        LINES.replace(
            "%s",
            "{% if m['role'] == 'system' %}" + on_system + "{% else %}"
            "{{ m['role'] | upper }}: {{ m['content'] }} {% endif %}",
        ),
    )
    expected = tokens_of(mllm, "USER: Be short.\n\nWhat is it? ASSISTANT:")
    assert tokens(mllm, "What is it?", None, [Message("system", "Be short.")]) == expected


def test_the_demo_s_own_template_gives_what_transformers_gives(mllm):
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    reference = mllm.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=False,
    ).removeprefix("<s>")
    assert tokens(mllm, "What is it?", PICTURE) == tokens_of(mllm, reference, PICTURE)


# --- where the placeholder goes ---------------------------------------------------------------


OWN = {7: "<|open|>", 8: "<|close|>", 9: "<|pad|>"}


class WordTokenizer:
    """Just enough of a tokenizer: it renders templates with Jinja and knows a few tokens."""

    def __init__(self) -> None:
        self.chat_template = (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}bot:"
        )
        self.added_tokens_decoder = {
            number: SimpleNamespace(content=text, special=True) for number, text in OWN.items()
        }

    def convert_ids_to_tokens(self, number: int) -> str | None:
        return OWN.get(number)

    def apply_chat_template(
        self, messages: list[object], chat_template: str, **more: object
    ) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        more.pop("tokenize")
        return render_jinja_template([messages], chat_template=chat_template, **more)[0][0]


def chat_of(config: dict[str, object], processor: object = None) -> ChatFormat:
    tokenizer = WordTokenizer()
    return ChatFormat("own", processor or tokenizer, tokenizer, SimpleNamespace(**config), True)


@pytest.mark.parametrize(
    ("config", "processor", "placeholder"),
    [
        ({}, SimpleNamespace(image_token="<img>"), "<img>\n"),
        ({"image_token_index": 9}, None, "<|pad|>\n"),
        ({"image_token_id": 9, "vision_start_token_id": 7, "vision_end_token_id": 8}, None,
         "<|open|><|pad|><|close|>"),
        ({"image_start_token_id": 7, "image_end_token_id": 8},
         SimpleNamespace(image_token="<|pad|>"), "<|open|><|pad|><|close|>"),
        ({"image_token_id": 9, "vision_start_token_id": 7}, None, "<|pad|>\n"),
        ({}, None, "<image>\n"),
        ({"image_token_id": 99}, None, "<image>\n"),
    ],
)  # fmt: skip
def test_the_placeholder_is_the_processor_s_in_the_brackets_that_the_config_names(
    config, processor, placeholder
):
    prompt = render_chat(chat_of(config, processor), [Message("user", "What?", (PICTURE,))]).text
    assert prompt == f"user: {placeholder}What?\nbot:"


def test_a_list_template_with_another_placeholder_than_the_processor_s_is_not_trusted():
    chat = chat_of({}, SimpleNamespace(image_token="<img>"))
    chat.tokenizer.chat_template = template(PARTS)  # writes <image>
    prompt = render_chat(chat, [Message("user", "What?", (PICTURE,))]).text
    assert prompt == "USER: <img>\nWhat? ASSISTANT:"


# --- texts are never control tokens ----------------------------------------------------------

SPELLED = [
    "<image>", "a <image> b <image>", "</s>", "<s><s>", "<pad>", "<<image>>", "</s></s> 2",
    "\uf8f00\uf8f1", "<image>\uf8f00\uf8f1", "x<s>\n\ny",
]  # fmt: skip


@pytest.mark.parametrize("text", SPELLED)
@pytest.mark.parametrize("name", [None, *TEMPLATES])
def test_a_control_token_in_a_question_is_text(mllm, name, text):
    use(mllm, name and TEMPLATES[name])
    ids = tokens(mllm, f"What is {text}?", PICTURE)
    plain = tokens(mllm, "What is it?", PICTURE)
    for number in mllm.tokenizer.all_special_ids:
        assert ids.count(number) == plain.count(number)
    assert f"What is {text}?" in mllm.decode(ids, skip_special_tokens=False)


def test_every_message_of_a_conversation_may_spell_control_tokens(mllm):
    before = [
        Message("system", "Never write </s>."),
        Message("user", "a <image> b", (PICTURE,)),
        Message("assistant", "</s> is the end."),
    ]
    for name in TEMPLATES:
        use(mllm, TEMPLATES[name])
        inputs = mllm.encode([*before, Message("user", "And <pad>?")])
        text = mllm.decode(inputs["input_ids"][0].tolist(), skip_special_tokens=False)
        for message in [*before, Message("user", "And <pad>?")]:
            assert message.text in text, name
        assert inputs["attention_mask"].shape == inputs["input_ids"].shape
        assert inputs["attention_mask"].all()
        ids = inputs["input_ids"][0].tolist()
        assert ids.count(mllm.tokenizer.convert_tokens_to_ids("<image>")) == 16


@pytest.mark.parametrize("text", ["</s>", "2 <s> 3", "<image>"])
def test_a_sample_s_answer_is_text_too(mllm, text):
    ids = mllm.encode_text(text)
    assert not set(ids) & set(mllm.tokenizer.all_special_ids)
    assert mllm.decode(ids) == text


VISIBLE = [*string.ascii_letters, *string.digits, *string.punctuation]


def sentencepiece(prepend: str) -> object:
    """A tokenizer as Llama's: pieces of BPE, and a prefix of every word."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "▁", *VISIBLE, "▁W", "▁<", "</"]
    merges = [("▁", "W"), ("▁", "<"), ("<", "/")]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    if prepend == "normalizer":
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return made


def byte_level() -> object:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *alphabet, "<|im_end|>"]  # the last one in the model itself
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def unigram() -> object:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "▁", *VISIBLE, "<|im_end|>"]
    scores = [(word, -1.0 - 0.01 * number) for number, word in enumerate(words)]
    made = Tokenizer(models.Unigram(scores, unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    return made


FAMILIES = {
    "SentencePiece, legacy": lambda: sentencepiece("normalizer"),
    "SentencePiece, prefix of every piece": lambda: sentencepiece("always"),
    "SentencePiece, prefix of the text": lambda: sentencepiece("first"),
    "bytes": byte_level,
    "unigram": unigram,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "said", ["What is </s>?", "</s>", "<s></s><s>", "a <|im_end|> b </s> c", "<|im_end|></s>"]
)
def test_no_tokenizer_family_reads_a_control_token_in_a_question(math, tmp_path, family, said):
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=FAMILIES[family](), bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<|im_end|>"],
        chat_template=template("{{ m['content'] }}").replace("{% for", "{{ bos_token }}{% for", 1),
    )  # fmt: skip
    made.save_pretrained(tmp_path / "own")
    shutil.copy(DEMO / "math" / "config.json", tmp_path / "own")
    own = ModelProcessor(tmp_path / "own", takes_images=False)
    ids = tokens(own, said)
    control = set(own.tokenizer.all_special_ids)
    assert [number for number in ids if number in control] == [own.tokenizer.bos_token_id]
    shown = own.tokenizer.decode([number for number in ids if number not in control])
    assert said in shown


@pytest.mark.parametrize("said", ["What is </s>?", "<extra_id_3> é </s><pad>", "\uf8f00\uf8f1"])
def test_a_tokenizer_written_in_python_reads_none_either(tmp_path, said):
    from transformers import ByT5Tokenizer

    made = ByT5Tokenizer(chat_template=template("{{ m['content'] }}"))
    made.save_pretrained(tmp_path)
    shutil.copy(DEMO / "math" / "config.json", tmp_path)
    own = ModelProcessor(tmp_path, takes_images=False)
    ids = tokens(own, said)
    assert not set(ids) & set(own.tokenizer.all_special_ids)
    assert own.decode(ids, skip_special_tokens=False) == f"USER: {said} ASSISTANT:"


def test_tokens_that_overlap_are_all_hidden_from_the_template():
    chat = chat_of({})
    chat.tokenizer.added_tokens_decoder = {
        number: SimpleNamespace(content=token, special=True)
        for number, token in enumerate(["<|a|>", "|><|", "<|ab"])
    }
    prompt = render_chat(chat, [Message("user", "x <|a|><|ab y")])
    assert prompt.text == "user: x \uf8f00\uf8f1\nbot:"
    assert prompt.verbatim == {"\uf8f00\uf8f1": "<|a|><|ab y"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["<", "|", "open", "pad", ">", "x", " ", "\uf8f0"]), max_size=24))
def test_no_spelling_of_a_control_token_reaches_a_template(parts):
    text = f"q{''.join(parts)}q"
    prompt = render_chat(chat_of({}), [Message("user", text)])
    said = prompt.text.removeprefix("user: ").removesuffix("\nbot:")
    assert not any(token in said for token in OWN.values())
    for mark, hidden in prompt.verbatim.items():
        assert said.count(mark) == 1
        said = said.replace(mark, hidden)
    assert said == text


# --- templates that cannot be used -----------------------------------------------------------


BAD = {
    "{% for m in messages %}{{ m['content'] }}": "TemplateSyntaxError",
    "{{ raise_exception('Only tools may speak') }}": "TemplateError: Only tools may speak",
    "{{ messages[7]['content'] }}": "UndefinedError",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ messages.nothing.at.all }}": "UndefinedError",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ range(10**9) | list }}": "OverflowError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{% include 'other' %}": "cannot be rendered",
    "no question at all": "omits the text or the image of a message from the prompt",
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("side", ["mllm", "math"])
def test_a_template_that_cannot_be_used_is_told_with_a_remedy(request, bad, side):
    loaded = request.getfixturevalue(side)
    use(loaded, bad)
    with pytest.raises(ModelLoadError, match=f"The chat template of '{side}'") as caught:
        tokens(loaded, "What is it?", PICTURE if loaded.takes_images else None)
    assert BAD[bad] in str(caught.value)
    assert "Fix chat_template.jinja" in str(caught.value)


@pytest.mark.parametrize("side", ["mllm", "math"])
def test_named_templates_without_a_default_are_named(request, side):
    loaded = request.getfixturevalue(side)
    use(loaded, {"rag": "r", "tool_use": "t"})
    with pytest.raises(ModelLoadError, match="named 'rag', 'tool_use' but none named 'default'"):
        tokens(loaded, "What is it?", None)


def test_named_templates_with_a_default_use_it(mllm):
    use(mllm, {"rag": "r", "default": TEMPLATES["list"]})
    expected = tokens_of(mllm, "USER: What is it? ASSISTANT:")
    assert tokens(mllm, "What is it?", None) == expected


def test_a_template_that_is_no_text_is_refused(mllm):
    use(mllm, ["a", "b"])
    with pytest.raises(ModelLoadError, match="is a list; expected a Jinja template string"):
        tokens(mllm, "What is it?", None)


def test_a_processor_that_raises_anything_is_told(mllm, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("odd patch size\nmore")

    monkeypatch.setattr(type(mllm.processor), "__call__", fail)
    with pytest.raises(ModelLoadError, match=r"cannot encode.*AssertionError: odd patch size\)"):
        tokens(mllm, "What is it?", PICTURE)


# --- templates as files ----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Copies of the demo models without a template."""

    def copy(name: str) -> Path:
        own = Path(shutil.copytree(DEMO / name, tmp_path / name))
        (own / "chat_template.jinja").unlink()
        return own

    return copy


def in_tokenizer_config(folder: Path, found: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": found}))


@pytest.mark.parametrize("side", ["mllm", "math"])
def test_a_template_in_tokenizer_config_alone_is_used(folder, side):
    own = folder(side)
    in_tokenizer_config(own, TEMPLATES["string, joined"])
    loaded = ModelProcessor(own, takes_images=side == "mllm")
    image = PICTURE if loaded.takes_images else None
    mark = "<image>\n" if image else ""
    expected = tokens_of(loaded, f"USER: {mark}What? ASSISTANT:", *([image] if image else []))
    assert tokens(loaded, "What?", image) == expected


@pytest.mark.parametrize("side", ["mllm", "math"])
def test_named_templates_in_tokenizer_config_without_a_default_are_told(folder, side):
    own = folder(side)
    in_tokenizer_config(own, [{"name": "rag", "template": "r"}])
    with pytest.raises(ModelLoadError, match="'rag'"):
        tokens(ModelProcessor(own, takes_images=side == "mllm"), "What is it?")


def test_a_template_in_chat_template_json_is_used(folder):
    own = folder("mllm")
    found = {"chat_template": TEMPLATES["list"]}
    (own / "chat_template.json").write_text(json.dumps(found))
    loaded = ModelProcessor(own, takes_images=True)
    expected = tokens_of(loaded, "USER: <image>\nWhat? ASSISTANT:", PICTURE)
    assert tokens(loaded, "What?", PICTURE) == expected


# transformers 5.24 leaves these files for the garbage collector to close.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("side", ["mllm", "math"])
def test_additional_templates_are_used_only_as_named(folder, side):
    own = folder(side)
    (own / "additional_chat_templates").mkdir()
    (own / "additional_chat_templates" / "rag.jinja").write_text("rag")
    with pytest.raises(ModelLoadError, match=r"named 'rag'|'rag'|omits|Cannot load"):
        tokens(ModelProcessor(own, takes_images=side == "mllm"), "What?")
    (own / "chat_template.jinja").write_text(TEMPLATES["both"])
    loaded = ModelProcessor(own, takes_images=side == "mllm")
    assert tokens(loaded, "What?") == tokens_of(loaded, "USER: What? ASSISTANT:")


def test_a_tokenizer_without_its_vocabulary_is_refused(folder):
    own = folder("math")
    (own / "tokenizer.json").unlink()
    path = own / "tokenizer_config.json"
    other = {"tokenizer_class": "LlamaTokenizer", "vocab_file": "/etc/passwd"}
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    with pytest.raises(ModelLoadError, match="has . tokens, and the model has 512"):
        ModelProcessor(own, takes_images=False)


@pytest.mark.parametrize("found", [7, [7], [{"name": "a"}], {"a": {"b": 1}}, [[]]])
def test_a_chat_template_of_another_type_never_escapes_the_tree(folder, found):
    own = folder("math")
    in_tokenizer_config(own, found)
    with pytest.raises(ModelLoadError):
        tokens(ModelProcessor(own, takes_images=False), "What is it?")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00", b'{"version": "9", "model": 3}'])
def test_a_damaged_file_never_escapes_the_tree(tmp_path, name, content):
    own = Path(shutil.copytree(DEMO / "math", tmp_path / "math"))
    (own / name).write_bytes(content)
    with contextlib.suppress(ModelLoadError):  # a list of tokens may do without its config
        tokens(ModelProcessor(own, takes_images=False), "What is it?")


# --- questions -------------------------------------------------------------------------------


def test_a_question_is_measured_before_anything_else_looks_at_it():
    class Measured(str):
        """A text that only its length may be taken of."""

        def strip(self, *_: object) -> str:
            raise AssertionError("looked at")

    with pytest.raises(RunError, match=f"has {LONGEST_QUESTION + 1} characters"):
        check_question(Measured(" " * (LONGEST_QUESTION + 1)))
    assert check_question(f" {'x' * (LONGEST_QUESTION - 2)} ") == "x" * (LONGEST_QUESTION - 2)


# --- several images, long conversations ---


def test_every_image_of_a_conversation_is_encoded(mllm: ModelProcessor) -> None:
    per_image = tokens(mllm, "What is it?", PICTURE).count(
        mllm.tokenizer.convert_tokens_to_ids("<image>")
    )
    messages = [
        Message("user", "First?", (PICTURE, PICTURE)), Message("assistant", "A box."),
        Message("user", "And these?", (PICTURE,)),
    ]  # fmt: skip
    inputs = mllm.encode(messages)
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(mllm.tokenizer.convert_tokens_to_ids("<image>")) == 3 * per_image
    assert len(inputs["pixel_values"]) == 3


def test_images_that_a_processor_refuses_are_counted(
    mllm: ModelProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_only(texts: list[str], images: list[object]) -> dict[str, object]:
        raise ValueError(f"expected 1 image, got {len(images)}")

    monkeypatch.setattr(mllm, "call", one_only)
    with pytest.raises(ModelLoadError, match=r"with 2 images .* not every model takes several"):
        mllm.encode([Message("user", "Which?", (PICTURE, PICTURE))])
    with pytest.raises(ModelLoadError, match="files those of this model"):
        mllm.encode([Message("user", "Which?", (PICTURE,))])


def test_a_conversation_must_end_with_a_question_of_a_bounded_length() -> None:
    question = Message("user", "What?")
    check_conversation([Message("system", "Be brief."), question])
    for messages in ([], [question, Message("assistant", "That.")]):
        with pytest.raises(RunError, match="does not end with a question"):
            check_conversation(messages)
    with pytest.raises(RunError, match="16001 characters; the maximum is 16000"):
        check_conversation([Message("assistant", "a" * 16_001), question])
    with pytest.raises(RunError, match="100000 characters; the maximum is 16000"):
        check_conversation([Message("user", "a" * 100_000)])
