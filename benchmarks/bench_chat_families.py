"""Print which families of vision-language models chat, with and without torchvision.

    python benchmarks/bench_chat_families.py [--only NAME ...]

In: tiny random models of every family, made here. Out: a table of families with the image processor
and the largest change of the next token's logits by another image, or the reason of the refusal; a
table of the other model types whose processor has a video part, or an image part for torchvision
only; and, where torchvision works, both image processors compared on the same picture.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from chat_families import CHAT_FAMILIES, VIDEO_ONLY, WITHOUT_PILLOW, ChatFamily  # noqa: E402
from chat_models import (  # noqa: E402
    NEEDS_TORCHVISION,
    build_chat,
    chat_support,
    processor_family,
    server_without_torchvision,
)
from PIL import Image, ImageDraw  # noqa: E402
from report import machine, table  # noqa: E402

from ipmerge_core.errors import IPMergeError  # noqa: E402
from ipmerge_core.inference.generation import answer, encode_prompt, on_device  # noqa: E402
from ipmerge_core.inference.loading import load_model  # noqa: E402
from ipmerge_core.inference.processor_process import (  # noqa: E402
    ProcessorServer,
    RemoteProcessor,
    default_server,
)
from ipmerge_core.inference.prompts import Message  # noqa: E402
from ipmerge_core.runtime.imports import find_torchvision  # noqa: E402

QUESTION = "What is it?"
LONGEST = 110  # characters of a reason in the table


def picture(color: str) -> Image.Image:
    """Draw a disk with sharp edges, 90 x 60 pixels: resizing shows at its edge."""
    image = Image.new("RGB", (90, 60), "white")
    ImageDraw.Draw(image).ellipse((20, 10, 60, 50), fill=color)
    return image


def noise() -> Image.Image:
    """Return random pixels, 300 x 200: resizing shows everywhere."""
    pixels = torch.randint(256, (200, 300, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def result(folder: Path, server: ProcessorServer) -> str:
    """Chat with a model with an image; return the processor and the effect, or the refusal."""
    processor = RemoteProcessor(folder, takes_images=True, server=server)
    try:
        processor.load()
        if not (folder / "model.safetensors").is_file():
            return f"{processor.image_processor}, model not built"
        loaded = replace(load_model(folder), processor=processor)
        logits = []
        for color in ("black", "red"):
            inputs = encode_prompt(loaded, QUESTION, picture(color))
            with torch.inference_mode():
                found = loaded.model(**on_device(inputs, loaded.model.device))
            logits.append(found.logits[0, -1].float())
        answer(loaded, QUESTION, picture("red"), max_new_tokens=4)
        change = float((logits[0] - logits[1]).abs().max())
        return f"{processor.image_processor}, {change:.2g}"
    except IPMergeError as error:
        return shortened(str(error))
    except Exception as error:  # noqa: BLE001 (what transformers raises is the result)
        return shortened(f"transformers: {type(error).__name__}: {error}")
    finally:
        processor.close()


def shortened(reason: str) -> str:
    """Return the start of a reason."""
    return reason if len(reason) <= LONGEST else f"{reason[:LONGEST]}..."


def other_types(families: dict[str, ChatFamily]) -> Iterator[str]:
    """List further types with a video part, or an image part for torchvision only."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    from transformers.models.auto.processing_auto import (
        PROCESSOR_MAPPING_NAMES,
        processor_class_from_name,
    )

    built = {
        family.model_type or getattr(transformers, family.config).model_type
        for family in families.values()
    }
    for model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        name = PROCESSOR_MAPPING_NAMES.get(model_type)
        if name is None or model_type in built:
            continue
        without_pillow = chat_support(model_type) == NEEDS_TORCHVISION
        if without_pillow or "video_processor" in processor_class_from_name(name).get_attributes():
            yield model_type


def processor_result(model_type: str, folder: Path, server: ProcessorServer) -> str:
    """Build the processor of a type; return its image processor, or the refusal."""
    try:
        build_chat(processor_family(model_type), folder)
        processor = RemoteProcessor(folder, takes_images=True, server=server)
        processor.load()
    except IPMergeError as error:
        return shortened(str(error))
    except Exception as error:  # noqa: BLE001 (what transformers raises is the result)
        return shortened(f"transformers: {type(error).__name__}: {error}")
    processor.close()
    return str(processor.image_processor)


def compared(folder: Path, absent: ProcessorServer, image: Image.Image) -> list[str]:
    """Compare the inputs of both image processors: equal values, largest difference of pixels."""
    found: list[dict[str, Any]] = []
    for server in (absent, default_server()):
        processor = RemoteProcessor(folder, takes_images=True, server=server)
        found.append(processor.encode([Message("user", QUESTION, (image,))]))
        processor.close()
    left, right = found
    shapes = all(left[key].shape == right[key].shape for key in left)
    exact = [key for key in left if not left[key].is_floating_point()]
    same = shapes and all(torch.equal(left[key], right[key]) for key in exact)
    pixels = next(key for key in left if key.startswith("pixel_values"))
    largest = float((left[pixels] - right[pixels]).abs().max()) if shapes else float("nan")
    spread = float(left[pixels].max() - left[pixels].min())
    tokens = f"{left['input_ids'].shape[1]}, {right['input_ids'].shape[1]}"
    return [
        "yes" if shapes else "no",
        "yes" if same else "no",
        tokens,
        f"{255 * largest / spread:.2g}",
    ]


def main() -> None:
    """Parse the arguments, build, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="families or model types; all by default")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    print(machine(), f"\ntorch {torch.__version__}, {find_torchvision()}\n")
    families = {**CHAT_FAMILIES, **WITHOUT_PILLOW, **VIDEO_ONLY}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        absent = server_without_torchvision(root / "site")
        servers = {"without torchvision": absent}
        if find_torchvision().works:
            servers["with torchvision"] = default_server()
        rows, pixels = [], []
        for name, family in families.items():
            if only and name not in only:
                continue
            folder = build_chat(family, root / "models" / name, torch.bfloat16)
            rows.append([name, *(result(folder, server) for server in servers.values())])
            if len(servers) > 1 and name in CHAT_FAMILIES:
                for what, image in (("disk", picture("red")), ("noise", noise())):
                    pixels.append([name, what, *compared(folder, absent, image)])
        print(table(["family", *servers], rows), "\n")
        rest = [
            [each, chat_support(each), processor_result(each, root / "types" / each, absent)]
            for each in other_types(families)
            if not only or each in only
        ]
        print(table(["model type", "by its classes", "processor without torchvision"], rest))
        if pixels:
            head = "same shapes", "same grid and tokens", "tokens", "largest difference, range 255"
            print("\n" + table(["both image processors", "picture", *head], pixels))
        absent.close()


if __name__ == "__main__":
    main()
