"""Small copies of public benchmarks in the layout of their data sets, with made-up questions."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image


def picture(shade: int = 0, side: int = 24) -> dict[str, Any]:
    """An image as data sets store it: the bytes of a file."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (shade % 256, 80, 120)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def broken_picture() -> dict[str, Any]:
    return {"bytes": b"not a picture", "path": None}


def write_split(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    split: str,
    config: str = "",
    images: Sequence[str] = (),
) -> Path:
    """Write rows as one parquet file of a split, with the metadata of a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(list(rows))
    for column in images:
        table = table.cast_column(column, datasets.Image(decode=False))
    file = f"{config or 'data'}/{split}-00000-of-00001.parquet"
    (folder / file).parent.mkdir(exist_ok=True)
    table.to_parquet(folder / file)
    if config:
        card = (
            f"---\nconfigs:\n- config_name: {config}\n  data_files:\n"
            f"  - split: {split}\n    path: {file}\n---\n"
        )
        (folder / "README.md").write_text(card)
    return folder


def mathvista_rows() -> list[dict[str, Any]]:
    """Questions of all answer types, both categories, and faulty rows."""

    def row(pid: int, **more: Any) -> dict[str, Any]:
        own = {
            "pid": str(pid), "question": f"Question {pid}?", "image": f"images/{pid}.jpg",
            "decoded_image": picture(pid), "choices": None, "unit": None, "precision": None,
            "answer": "7", "question_type": "free_form", "answer_type": "integer",
            "metadata": {"category": "math-targeted-vqa", "task": "geometry problem solving"},
            "query": f"Hint: give a value.\nQuestion: Question {pid}?",
        }  # fmt: skip
        return {**own, **more}

    general = {"category": "general-vqa", "task": "visual question answering"}
    return [
        row(1),
        row(2, answer="1.5", answer_type="float", precision=1.0),
        row(3, answer="[1, 2]", answer_type="list"),
        row(4, answer="blue", answer_type="text", question_type="multi_choice",
            choices=["red", "blue"], metadata=general),
        row(5, metadata=general),
        row(6, answer="green", answer_type="text", question_type="multi_choice",
            choices=["red", "blue"]),
        row(7, answer=None),
        row(8, decoded_image=broken_picture()),
        row(9, decoded_image=None, metadata=general),
    ]  # fmt: skip


def write_mathvista(folder: Path) -> Path:
    return write_split(folder, mathvista_rows(), "testmini", images=["decoded_image"])


def write_mathverse(folder: Path) -> Path:
    versions = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")
    rows = [
        {
            "sample_index": str(number), "problem_index": str(number // 5),
            "problem_version": version, "question": "Find x.\nChoices:\nA:60\nB:70\nC:80",
            "image": picture(number), "answer": answer, "question_type": kind,
            "metadata": {"subject": "Plane Geometry", "subfield": "Angle"},
            "query_wo": "According to the question shown in the image, answer.",
            "question_for_eval": "Find x.\nChoices:\nA:60\nB:70\nC:80",
        }
        for number, (version, answer, kind) in enumerate(
            (version, *rest)
            for rest in (("B", "multi-choice"), ("12", "free-form"), ("y=2x", "free-form"))
            for version in versions
        )
    ]  # fmt: skip
    return write_split(folder, rows, "testmini", "testmini", images=["image"])


def write_mmmu(folder: Path) -> Path:
    def row(name: str, **more: Any) -> dict[str, Any]:
        own: dict[str, Any] = {
            "id": name, "question": "Which is it in <image 1>?", "options": "['red', 'blue']",
            "explanation": "", "answer": "B", "question_type": "multiple-choice",
        }  # fmt: skip
        pictures = {f"image_{number}": None for number in range(1, 8)}
        return {**own, **pictures, "image_1": picture(1), **more}

    rows = [
        row("validation_Accounting_1"),
        row("validation_Accounting_2", question_type="open", options="[]", answer="42"),
        row("validation_Art_Theory_1", question_type="open", options="[]",
            answer="['Monet', 'Claude Monet']"),
        row("validation_Math_1", question="<image 1> or <image 2>?", image_2=picture(2)),
        row("validation_Math_2", options="['red', "),
        row("validation_Math_3", answer="?"),
    ]  # fmt: skip
    images = [f"image_{number}" for number in range(1, 8)]
    return write_split(folder, rows, "validation", images=images)
