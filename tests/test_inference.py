"""Running models: the demo trio answers, bad folders and bad pictures get one sentence."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import random
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from ipmerge_core.errors import CheckpointError, IPMergeError, ModelLoadError, RunError
from ipmerge_core.evaluation.batched_answers import answer_all
from ipmerge_core.inference.encoding import ModelProcessor
from ipmerge_core.inference.generation import (
    GenerationSettings,
    answer,
    encode_prompt,
    stream_answer,
)
from ipmerge_core.inference.images import open_image
from ipmerge_core.inference.loading import LoadedModel, ModelCache, load_model
from ipmerge_core.inference.sampling import Sampler
from ipmerge_core.models.pairing import open_pair
from ipmerge_core.tasks.demo import problems

DEMO = Path(__file__).parents[1] / "assets" / "demo"


@pytest.fixture(scope="module")
def mllm() -> LoadedModel:
    return load_model(DEMO / "mllm")


@pytest.fixture(scope="module")
def math() -> LoadedModel:
    return load_model(DEMO / "math")


@pytest.fixture
def own_mllm(tmp_path: Path) -> Path:
    """A copy of the demo MLLM that the test may damage."""
    return Path(shutil.copytree(DEMO / "mllm", tmp_path / "mllm"))


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder: Path, **change: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors")
    for name, tensor in change.items():
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# --- answers ---------------------------------------------------------------------------------


def test_a_vision_model_answers_as_the_evaluation_measures_it(mllm):
    asked = problems("sides", 2, seed=5) + problems("shape", 2, seed=5)
    processor = ModelProcessor(DEMO / "mllm", takes_images=True).processor
    expected = answer_all(mllm.model, processor, asked)
    assert [answer(mllm, problem.question, problem.image) for problem in asked] == expected


def test_a_text_model_answers_as_the_evaluation_measures_it(math):
    asked = problems("area", 3, seed=5)
    tokenizer = ModelProcessor(DEMO / "math", takes_images=False).processor
    expected = answer_all(math.model, tokenizer, asked)
    assert [answer(math, f"{p.words}\n{p.question}") for p in asked] == expected


def test_a_vision_model_answers_without_a_picture(mllm):
    assert answer(mllm, "What shape is this?")


def test_models_and_pictures_may_be_given_by_path(tmp_path):
    problem = problems("shape", 1, seed=2)[0]
    problem.image.save(tmp_path / "shape.png")
    assert answer(str(DEMO / "mllm"), problem.question, tmp_path / "shape.png") == answer(
        DEMO / "mllm", problem.question, problem.image
    )


def test_the_pieces_of_a_stream_make_the_whole_answer(mllm):
    problem = problems("sides", 1, seed=1)[0]
    slow = mllm.model.register_forward_pre_hook(lambda *_: time.sleep(0.1))  # longer than a tick
    with contextlib.closing(stream_answer(mllm, problem.question, problem.image)) as stream:
        pieces = list(stream)
    slow.remove()
    assert len(pieces) > 1
    assert "".join(pieces).strip() == answer(mllm, problem.question, problem.image)


def test_the_longest_answer_is_kept_to(mllm):
    problem = problems("sides", 1, seed=1)[0]
    whole = answer(mllm, problem.question, problem.image)
    short = answer(mllm, problem.question, problem.image, max_new_tokens=2)
    assert short
    assert whole.startswith(short)
    assert len(short) < len(whole)


def test_sampling_repeats_for_a_seed_and_varies_between_seeds(mllm):
    problem = problems("written", 1, seed=1)[0]

    def sampled(seed: int) -> str:
        return answer(mllm, problem.question, problem.image, temperature=2.0, seed=seed)

    before = torch.get_rng_state()
    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(6)}) > 1
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"


def test_sampling_at_a_tiny_temperature_is_greedy(mllm):
    problem = problems("sides", 1, seed=1)[0]
    cold = answer(mllm, problem.question, problem.image, temperature=1e-4, seed=3)
    assert cold == answer(mllm, problem.question, problem.image)


def test_two_answers_at_once_do_not_disturb_each_other(mllm, math):
    problem = problems("area", 1, seed=4)[0]
    settings = GenerationSettings(temperature=1.0, seed=9)
    alone = "".join(stream_answer(mllm, problem.question, problem.image, settings))
    streams = [
        stream_answer(mllm, problem.question, problem.image, settings),
        stream_answer(math, problem.words, None, settings),
    ]
    together = ["", ""]
    for pieces in itertools.zip_longest(*streams, fillvalue=""):
        together = [text + piece for text, piece in zip(together, pieces, strict=True)]
    assert together[0] == alone


def test_the_caller_s_event_stops_the_model_and_is_not_set_by_us(mllm):
    cancelled = threading.Event()
    list(stream_answer(mllm, "What shape is this?", None, None, cancelled))
    assert not cancelled.is_set()
    cancelled.set()
    assert "".join(stream_answer(mllm, "Name the sides.", None, None, cancelled)).strip() != (
        answer(mllm, "Name the sides.")
    )


def test_closing_the_stream_stops_the_model(mllm):
    before = threading.active_count()
    stream = stream_answer(
        mllm, "What is written here?", None, GenerationSettings(max_new_tokens=200)
    )
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_a_prompt_starts_with_one_begin_token(mllm, math):
    for loaded, image in ((mllm, Image.new("RGB", (64, 64))), (math, None)):
        ids = encode_prompt(loaded, "Hello?", image)["input_ids"][0].tolist()
        assert ids.count(loaded.special_ids.bos) == 1


def test_a_model_without_a_chat_template_gets_a_plain_prompt(own_mllm):
    (own_mllm / "chat_template.jinja").unlink()
    loaded = load_model(own_mllm)
    prompt = encode_prompt(loaded, "Name it.", Image.new("RGB", (64, 64)))
    text = loaded.processor.decode(prompt["input_ids"][0], skip_special_tokens=False)
    assert text.startswith("<s>")
    assert text.endswith("Name it. ASSISTANT:")
    assert "<image>" in text


# --- what cannot be asked --------------------------------------------------------------------


@pytest.mark.parametrize("question", ["", "  \n "])
def test_no_question_gets_a_sentence(mllm, question):
    with pytest.raises(RunError, match="The question is empty"):
        answer(mllm, question)


def test_a_question_that_is_too_long_is_refused_with_its_length(mllm):
    with pytest.raises(RunError, match="100000 characters; the maximum is 16000, and less if"):
        answer(mllm, "a" * 100_000)


def test_a_question_beyond_the_context_is_refused_with_both_lengths(mllm):
    assert answer(mllm, "9 " * 50, max_new_tokens=2)
    with pytest.raises(RunError, match=r"has 1\d\d\d tokens; the context of 'mllm' is 256 tokens"):
        answer(mllm, "9 " * 500)


def test_a_token_without_an_embedding_is_refused_before_the_model_sees_it(tmp_path):
    folder = Path(shutil.copytree(DEMO / "math", tmp_path / "math"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    more = {**tokenizer["added_tokens"][0], "id": 5000, "content": "<|new|>"}
    tokenizer["added_tokens"].append(more)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}<|new|>")
    with pytest.raises(ModelLoadError, match="produces the token .* has embeddings for 512"):
        answer(folder, "What is it?")


def test_a_text_model_refuses_a_picture(math):
    with pytest.raises(ModelLoadError, match="'math' is a text model and does not support images"):
        answer(math, "What is this?", Image.new("RGB", (8, 8)))


def test_a_failure_inside_the_model_is_told(mllm, monkeypatch):
    def fail(**_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(mllm.model, "generate", fail)
    with pytest.raises(ModelLoadError, match="failed while generating.*out of memory"):
        answer(mllm, "What shape is this?")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"max_new_tokens": 0}, "new tokens is 0"),
        ({"max_new_tokens": 10_000}, "new tokens is 10000"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range_are_refused_with_the_value(values, words):
    with pytest.raises(RunError, match=words):
        GenerationSettings(**values)


def test_any_temperature_above_zero_gives_finite_scores():
    scores = torch.linspace(-80, 80, 1000)[None]
    greedy = int(scores.argmax())
    for temperature in (5e-324, 1e-39, 1e-30, 1e-3, 5.0):
        sampler = Sampler(GenerationSettings(temperature=temperature, seed=2**63 - 1))
        found = sampler(scores)
        assert bool(found.isfinite().all())
        assert temperature > 0.001 or int(found.argmax()) == greedy


# --- folders that cannot be used -------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="model folder .* does not exist"):
        load_model(tmp_path / "nothing")


def test_a_missing_weight_is_named(own_mllm):
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    change_weights(own_mllm, **{name: None})
    with pytest.raises(ModelLoadError, match=r"lacks the weight '.*q_proj"):
        load_model(own_mllm)


def test_a_weight_without_a_place_is_named(own_mllm):
    change_weights(own_mllm, stray=torch.zeros(2))
    with pytest.raises(ModelLoadError, match="unexpected weight: 'stray'"):
        load_model(own_mllm)


def test_a_weight_of_another_shape_is_refused(own_mllm):
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    change_weights(own_mllm, **{name: torch.zeros(3, 3)})
    with pytest.raises(ModelLoadError, match="q_proj"):
        load_model(own_mllm)


def test_code_in_a_model_folder_is_never_run(own_mllm):
    change_json(
        own_mllm / "config.json", model_type="own_llava", auto_map={"AutoModel": "model.py--Model"}
    )
    with pytest.raises(ModelLoadError, match="requires custom code"):
        load_model(own_mllm)


def test_code_for_a_type_that_transformers_knows_is_ignored(own_mllm):
    (own_mllm / "model.py").write_text("raise SystemExit('run')")
    mapped = {"auto_map": {"AutoModel": "model.Model", "AutoConfig": "model.Config"}}
    change_json(own_mllm / "config.json", **mapped)
    change_json(own_mllm / "tokenizer_config.json", auto_map={"AutoTokenizer": ["model.T", None]})
    change_json(own_mllm / "processor_config.json", auto_map={"AutoProcessor": "model.P"})
    loaded = load_model(own_mllm)
    assert answer(loaded, "What shape is this?", Image.new("RGB", (64, 64), "white"))


BEAMS = {
    "num_beams": 4, "num_return_sequences": 3, "do_sample": True, "temperature": 0.0, "top_k": 1,
    "stop_strings": ["e"], "prompt_lookup_num_tokens": 3, "min_new_tokens": 40, "max_length": 2,
    "repetition_penalty": 9.0, "bad_words_ids": [[5]], "guidance_scale": 3.0, "max_time": 0.0,
    "cache_implementation": "nothing", "custom": {"a": 1}, "suppress_tokens": list(range(300)),
    "forced_eos_token_id": 9, "watermarking_config": {"bias": 9.0}, "num_assistant_tokens": -1,
}  # fmt: skip


def test_only_the_special_tokens_of_a_generation_config_are_used(own_mllm, mllm):
    change_json(own_mllm / "generation_config.json", **BEAMS)
    image = Image.new("RGB", (64, 64), "white")
    expected = answer(mllm, "What shape is this?", image)
    assert answer(own_mllm, "What shape is this?", image) == expected
    change_json(own_mllm / "generation_config.json", eos_token_id=[2, 40, 41], pad_token_id=7)
    settings = load_model(own_mllm).model.generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == ([2, 40, 41], 7)


def test_the_end_token_is_found_where_the_model_has_it(own_mllm):
    found = []
    for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
        found.append(load_model(own_mllm).model.generation_config.eos_token_id)
        file = json.loads((own_mllm / name).read_text())
        for part in (file, file.get("text_config", {})):
            part.pop("eos_token_id", None)
            part.pop("eos_token", None)
        (own_mllm / name).write_text(json.dumps(file))
        change_json(own_mllm / name, **({"eos_token_id": None} if "gen" in name else {}))
    assert found == [[2], [2], [2]]
    settings = load_model(own_mllm).model.generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == (None, 0)


@pytest.mark.parametrize("value", ["</s>", [], [2, "x"], -7, 2.5, True, {"a": 1}, 10**12])
def test_an_end_token_that_is_no_token_is_told(own_mllm, value):
    change_json(own_mllm / "generation_config.json", eos_token_id=value)
    with pytest.raises(ModelLoadError, match="eos_token_id of .* expected the id of a token"):
        load_model(own_mllm)


@pytest.mark.parametrize("content", ["{", "[]", "\xff", '{"eos_token_id": 1e999}', ""])
def test_a_damaged_generation_config_is_told(own_mllm, content):
    (own_mllm / "generation_config.json").write_text(content)
    with pytest.raises((ModelLoadError, CheckpointError)):
        load_model(own_mllm)


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        (
            "text_config",
            "num_hidden_layers",
            10**9,
            "num_hidden_layers = 1000000000, and its files",
        ),
        ("vision_config", "num_hidden_layers", 10**6, "num_hidden_layers = 1000000, and its files"),
        ("text_config", "intermediate_size", 10**9, "describes a model of .* parameters, and its"),
        ("text_config", "vocab_size", 10**11, "describes a model of .* parameters, and its files"),
    ],
)
def test_a_config_of_a_larger_model_than_the_files_is_refused(own_mllm, part, key, value, words):
    config = json.loads((own_mllm / "config.json").read_text())
    config[part][key] = value
    (own_mllm / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=words):
        load_model(own_mllm)


def test_an_unknown_architecture_is_told(own_mllm):
    change_json(own_mllm / "config.json", model_type="nobody_knows_this")
    with pytest.raises(ModelLoadError, match="Cannot load"):
        load_model(own_mllm)


def test_a_missing_processor_is_told(own_mllm):
    (own_mllm / "processor_config.json").unlink()
    (own_mllm / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match="Cannot load the processor"):
        load_model(own_mllm)


def test_a_processor_that_needs_torchvision_says_so(monkeypatch):
    import transformers

    def fail(*_: object, **__: object) -> None:
        raise ImportError("FancyImageProcessor requires the torchvision library\nbut it is missing")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", fail)
    with pytest.raises(ModelLoadError, match="requires torchvision, which"):
        ModelProcessor(DEMO / "mllm", takes_images=True)


ODD = [None, [], {}, "x", -1, 0, 1e999, True, "\ud800", 10**30, [[]], {"a": 1}, 3.5, ""]


def places(config: dict, before: tuple = ()) -> Iterator[tuple]:
    for key, value in config.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from places(value, (*before, key))


@pytest.mark.parametrize("seed", range(3))
def test_no_value_in_a_config_escapes_the_tree(own_mllm, seed):
    chance = random.Random(seed)
    for _ in range(8):
        changed = []
        for name in ("config.json", "generation_config.json"):
            config = json.loads((DEMO / "mllm" / name).read_text())
            *outer, key = chance.choice(list(places(config)))
            part = functools.reduce(dict.__getitem__, outer, config)
            part[key] = chance.choice(ODD)
            changed.append((*outer, key, part[key]))
            (own_mllm / name).write_text(json.dumps(config))
        try:
            open_pair(own_mllm, DEMO / "math", DEMO / "base").check()
            load_model(own_mllm)
        except IPMergeError:
            continue
        except Exception as error:
            raise AssertionError(f"{changed} escaped") from error


# --- the cache -------------------------------------------------------------------------------


def test_the_cache_keeps_a_model_until_others_need_the_room():
    cache = ModelCache(most_models=2)
    base, math = cache.get(DEMO / "base"), cache.get(DEMO / "math")
    assert cache.get(str(DEMO / "base")) is base
    cache.get(DEMO / "mllm")  # the math model was used longest ago and leaves
    assert cache.get(DEMO / "base") is base
    assert cache.get(DEMO / "math") is not math


def test_a_model_that_changed_on_disk_is_loaded_again(own_mllm):
    cache = ModelCache()
    before = cache.get(own_mllm)
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    weights = load_file(own_mllm / "model.safetensors")
    change_weights(own_mllm, **{name: weights[name] + 1})
    assert cache.get(own_mllm) is not before


def test_a_model_whose_template_or_settings_changed_is_loaded_again(own_mllm):
    cache = ModelCache()
    seen = [cache.get(own_mllm)]
    (own_mllm / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    seen.append(cache.get(own_mllm))
    change_json(own_mllm / "generation_config.json", eos_token_id=[2, 3])
    seen.append(cache.get(own_mllm))
    assert len({id(model) for model in seen}) == 3
    assert cache.get(own_mllm) is seen[-1]


# --- pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_usual_pictures_open_as_rgb(tmp_path, form):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "x.dat", form)
    picture = open_image(tmp_path / "x.dat")
    assert (picture.mode, picture.size) == ("RGB", (20, 10))


def test_a_picture_with_transparency_opens_as_rgb(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png").mode == "RGB"


def test_a_picture_lying_on_its_side_is_put_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    Image.new("RGB", (20, 10)).save(tmp_path / "x.jpg", exif=exif)
    assert open_image(tmp_path / "x.jpg").size == (10, 20)


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused(tmp_path, form):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", form)
    with pytest.raises(RunError, match=r"'x.png' is not a readable image. Expected a PNG"):
        open_image(tmp_path / "x.png")


def test_text_and_truncated_pictures_are_refused(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    (tmp_path / "half.png").write_bytes(whole.getvalue()[:200])
    (tmp_path / "empty.png").touch()
    for name in ("text.png", "half.png", "empty.png", "missing.png"):
        with pytest.raises(RunError, match=f"'{name}' is not a readable image"):
            open_image(tmp_path / name)


def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (5000, 5000)).save(tmp_path / "large.png")
    with pytest.raises(RunError, match="5000 x 5000 pixels; the maximum is 20 million"):
        open_image(tmp_path / "large.png")


def test_a_decompression_bomb_is_refused(tmp_path):
    Image.new("1", (14_000, 14_000)).save(tmp_path / "bomb.png")
    with pytest.raises(RunError, match="is too large"):
        open_image(tmp_path / "bomb.png")


LONG, THIN = "the maximum per side is 20000", "the longer side can be at most 100 times the shorter"


@pytest.mark.parametrize(
    ("form", "size", "limit"),
    [
        ("PNG", (19_000_000, 1), LONG),
        ("PNG", (1, 20_001), LONG),
        ("PNG", (49, 5_000), THIN),
        ("JPEG", (5_000, 49), THIN),
        ("JPEG", (65_000, 300), LONG),
    ],
)
def test_an_elongated_picture_is_refused_before_it_is_decoded(tmp_path, form, size, limit):
    small = (64, 32)
    Image.new("L", small).save(tmp_path / "x", form)
    content = (tmp_path / "x").read_bytes()
    if form == "PNG":
        header = b"IHDR" + struct.pack(">II", *size) + content[24:29]
        content = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    else:  # at most 65535 per side
        content = content.replace(struct.pack(">HH", 32, 64), struct.pack(">HH", *size[::-1]), 1)
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(RunError, match=f"{size[0]} x {size[1]} pixels; {limit}"):
        open_image(tmp_path / "x")


def test_the_most_elongated_pictures_that_are_accepted_open(tmp_path):
    for size in ((2_000, 20), (20, 2_000), (1, 1), (20_000, 1_000)):
        Image.new("1", size).save(tmp_path / "x.png")
        assert open_image(tmp_path / "x.png").size == size


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.data())
def test_a_damaged_picture_opens_or_gets_a_sentence(form, data):
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = io.BytesIO()
    Image.radial_gradient("L").crop((90, 90, 114, 106)).convert("RGB").save(whole, form, exif=exif)
    content = bytearray(whole.getvalue())
    places = st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=6)
    for place, value in data.draw(places):
        content[place] = value
    with contextlib.suppress(RunError):
        assert open_image(io.BytesIO(content)).mode == "RGB"
