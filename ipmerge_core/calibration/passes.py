"""One model and its samples: forward passes that watch inputs, backward passes for slopes.

In: a loaded model, the layers to watch, `Sample`s one at a time (so there is no padding to mask).
Out: for each layer the sum of x x^T over tokens, or of squared gradients over samples. Sums are in
fp32; a forward pass stops where its last watched layer has been reached. Reads and writes no files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ipmerge_core.calibration.samples import Sample
from ipmerge_core.calibration.store import Kind
from ipmerge_core.errors import ModelLoadError
from ipmerge_core.inference.generation import encode_prompt
from ipmerge_core.inference.loading import LoadedModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ipmerge_core.models.checkpoint import Checkpoint

Estimator: TypeAlias = Literal["sampled", "empirical"]
_FP16_SCALE = 1024.0
MEMORY = 4 << 30  # bytes of measurements held at a time


@dataclass(frozen=True)
class Settings:
    """How to measure; two runs with the same settings give the same numbers on one device type.

    `estimator` is for "fisher": "sampled" draws one answer token per position from the model
    itself (unbiased), "empirical" takes the sample's answer. `image_tokens` is for "gram": whether
    positions of the image count. `wide` keeps the Gram matrices of down projections as "full" or
    only their "diagonal".
    """

    kind: Kind
    estimator: Estimator = "sampled"
    image_tokens: bool = True
    wide: Literal["full", "diagonal"] = "full"
    seed: int = 0
    memory: int = MEMORY


class _Enough(Exception):  # noqa: N818 (a signal, not a fault)
    """Every matrix of the group has seen the sample: the rest of the forward pass is not needed."""


class Passes:
    """One model, one group of targets, all samples."""

    def __init__(
        self,
        loaded: LoadedModel,
        layers: Sequence[torch.nn.Module],
        shapes: Sequence[tuple[int, ...]],
        settings: Settings,
        role: str,
    ) -> None:
        import torch

        self.loaded, self.layers, self.settings, self.role = loaded, layers, settings, role
        device = loaded.model.device
        self.sums = [torch.zeros(shape, device=device) for shape in shapes]
        self.tokens = self.count = 0

    def add(self, number: int, sample: Sample) -> None:
        """Run one sample through the model and add up what it gives."""
        inputs, answer = encode_sample(self.loaded, sample)
        if self.settings.kind == "gram":
            self._gram(inputs)
        else:
            self._fisher(number, inputs, answer)
        self.count += 1

    def means(self) -> list[Tensor]:
        """Per token for Gram matrices, per sample for the Fisher information."""
        count = self.tokens if self.settings.kind == "gram" else self.count
        return [(total / max(count, 1)).cpu() for total in self.sums]

    def _gram(self, inputs: Any) -> None:  # noqa: ANN401
        import torch

        counted = self._counted(inputs)
        left = set(range(len(self.layers)))

        def hook(place: int) -> Any:  # noqa: ANN401
            def add(_module: object, arguments: tuple[Tensor, ...]) -> None:
                x = arguments[0].reshape(-1, arguments[0].shape[-1])
                if len(x) != len(counted):
                    raise ModelLoadError(
                        f"'{self.loaded.folder.name}' turns {len(counted)} tokens into {len(x)} "
                        f"positions, so image and text cannot be told apart. Update the processor."
                    )
                x = x[counted].float()
                if self.sums[place].ndim == 1:
                    self.sums[place] += x.square().sum(0)
                else:
                    self.sums[place].addmm_(x.T, x)
                left.discard(place)
                if not left:
                    raise _Enough

            return add

        handles = [m.register_forward_pre_hook(hook(i)) for i, m in enumerate(self.layers)]
        try:
            with torch.inference_mode():
                self._forward(inputs)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        self.tokens += int(counted.sum())

    def _counted(self, inputs: Any) -> Tensor:  # noqa: ANN401
        """Which positions count."""
        import torch

        ids: Tensor = inputs["input_ids"][0]
        config = self.loaded.model.config
        image = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        if self.settings.image_tokens or image is None:
            return torch.ones_like(ids, dtype=torch.bool)
        counted: Tensor = ids != image
        return counted

    def _fisher(self, number: int, inputs: Any, answer: int) -> None:  # noqa: ANN401
        import torch

        model = self.loaded.model.requires_grad_(False)
        weights: list[Tensor] = [layer.get_parameter("weight") for layer in self.layers]
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            logits = self._forward(inputs).logits[0, -answer - 1 : -1].float()
            wanted = inputs["input_ids"][0, -answer:]
            if self.settings.estimator == "sampled":
                wanted = self._draw(number, logits)
            loss = torch.nn.functional.cross_entropy(logits, wanted)
            # Slopes of 1e-5 are near the end of fp16; a power of two changes no digit of them.
            scale = _FP16_SCALE if weights[0].dtype == torch.float16 else 1.0
            gradients = torch.autograd.grad(scale * loss, weights)
        for total, gradient in zip(self.sums, gradients, strict=True):
            total.add_((gradient.float() / scale).square())
        self.tokens += answer
        model.requires_grad_(False)

    def _draw(self, number: int, logits: Tensor) -> Tensor:
        """Draw one token per position from the model, by a stream of the sample's own."""
        import torch

        key = hashlib.sha256(f"{self.settings.seed}|{self.role}|{number}".encode()).digest()
        stream = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
        chances = logits.detach().cpu().double().softmax(-1)  # in fp64, which not all GPUs have
        return torch.multinomial(chances, 1, generator=stream)[:, 0].to(logits.device)

    def _forward(self, inputs: Any) -> Any:  # noqa: ANN401
        try:
            return self.loaded.model(**inputs, use_cache=False)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ModelLoadError(
                f"'{self.loaded.folder.name}' stopped on a calibration sample "
                f"({type(error).__name__}: {error}). Does the sample fit the model?"
            ) from error


def encode_sample(loaded: LoadedModel, sample: Sample) -> tuple[Any, int]:
    """Encode prompt and answer as one sequence; also say how many tokens the answer has.

    Raises: as `encode_prompt`: RunError for an empty question, ModelLoadError for an image that the
        model cannot take.
    """
    import torch

    inputs = dict(encode_prompt(loaded, sample.question, sample.image))
    prompt = inputs["input_ids"]
    tokens = loaded.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
    end = loaded.tokenizer.eos_token_id
    answer = torch.tensor([tokens + ([end] if tokens and end is not None else [])]).long()
    for name, value in inputs.items():  # what goes along with the tokens grows with them
        if isinstance(value, torch.Tensor) and value.shape == prompt.shape:
            more = answer if name == "input_ids" else torch.zeros_like(answer)
            more = torch.ones_like(answer) if name == "attention_mask" else more
            inputs[name] = torch.cat([value, more.to(value.dtype)], dim=1)
    device = loaded.model.device
    moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    return moved, answer.shape[1]


def find_module(loaded: LoadedModel, checkpoint: Checkpoint, stored: str) -> torch.nn.Module:
    """Find the module of a loaded model that holds a stored matrix.

    Names differ between files and classes, and vision towers have projections of the same names,
    so the end of the name has to match and the numbers have to be the same.

    Raises: ModelLoadError when there is none.
    """
    import torch

    if "[" not in stored:
        end = stored[stored.rindex("layers.") :].removesuffix(".weight")
        weight = checkpoint.read_matrix(stored)
        for name, module in loaded.model.named_modules():
            if name == end or name.endswith("." + end):
                found = getattr(module, "weight", None)
                if found is not None and found.shape == weight.shape:
                    same = torch.equal(found.detach().cpu(), weight.to(found.dtype))
                    if same and isinstance(module, torch.nn.Module):
                        return module
    raise ModelLoadError(
        f"'{stored}' of '{checkpoint.id}' has no layer of its own in the loaded model, so its "
        f"inputs cannot be measured. Models that store several matrices as one are not calibrated; "
        f"choose a method that needs no data."
    )
