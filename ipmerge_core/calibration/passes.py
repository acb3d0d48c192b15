"""Run samples through a model and accumulate layer input products or squared gradients.

In: a loaded model, the layers to observe, `Sample`s one at a time (so that no padding is needed).
Out: for each layer the sum of x x^T over tokens, or of squared gradients over samples. Sums are in
fp32; a forward pass ends after its last observed layer. No IO.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ipmerge_core.calibration.samples import Sample
from ipmerge_core.calibration.store import Kind
from ipmerge_core.errors import ModelLoadError, PlanError
from ipmerge_core.inference.generation import encode_prompt, on_device
from ipmerge_core.inference.loading import LoadedModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ipmerge_core.models.checkpoint import Checkpoint

Estimator: TypeAlias = Literal["sampled", "empirical"]
_FP16_SCALE = 1024.0
MEMORY = 4 << 30  # bytes of measurements in memory at once


@dataclass(frozen=True)
class CalibrationSettings:
    """Calibration settings; the same settings give the same results on one device type.

    `estimator` applies to "fisher": "sampled" samples one answer token per position from the model
    (unbiased), "empirical" uses the sample's answer. `image_tokens` applies to "gram": whether
    image positions are included. `wide` stores the Gram matrices of down projections as "full" or
    only their "diagonal".

    Raises: PlanError for a setting that the kind does not use.
    """

    kind: Kind
    estimator: Estimator = "sampled"
    image_tokens: bool = True
    wide: Literal["full", "diagonal"] = "full"
    seed: int = 0
    memory: int = MEMORY

    def __post_init__(self) -> None:
        """Reject settings that would be ignored. Raises: PlanError."""
        of_kind = {"estimator": "fisher", "image_tokens": "gram", "wide": "gram"}
        for setting in fields(self):
            kind, value = of_kind.get(setting.name, self.kind), getattr(self, setting.name)
            if kind != self.kind and value != setting.default:
                raise PlanError(
                    f"{setting.name} is {value!r}, but a calibration of kind {self.kind} does not "
                    f"use it. Omit it, or calibrate with kind {kind}."
                )


class _Enough(Exception):  # noqa: N818 (a signal, not a fault)
    """Raised to end a forward pass after the last observed layer."""


class Passes:
    """Accumulates measurements of one model for one group of targets."""

    def __init__(
        self,
        loaded: LoadedModel,
        layers: Sequence[torch.nn.Module],
        shapes: Sequence[tuple[int, ...]],
        settings: CalibrationSettings,
        role: str,
    ) -> None:
        import torch

        self.loaded, self.layers, self.settings, self.role = loaded, layers, settings, role
        device = loaded.model.device
        self.sums = [torch.zeros(shape, device=device) for shape in shapes]
        self.tokens = self.count = 0

    def add(self, number: int, sample: Sample) -> None:
        """Run one sample through the model and accumulate its measurements."""
        inputs, answer = encode_sample(self.loaded, sample)
        if self.settings.kind == "gram":
            self._gram(inputs)
        else:
            self._fisher(number, inputs, answer)
        self.count += 1

    def means(self) -> list[Tensor]:
        """Return means: per token for Gram matrices, per sample for the Fisher information."""
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
                        f"'{self.loaded.folder.name}' expands {len(counted)} tokens to {len(x)} "
                        f"positions, so that image positions are unknown. Update the processor."
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
        """Return a mask of the positions to include."""
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
            # Gradients of 1e-5 are near the fp16 underflow; scaling by a power of two is exact.
            scale = _FP16_SCALE if weights[0].dtype == torch.float16 else 1.0
            gradients = torch.autograd.grad(scale * loss, weights)
        for total, gradient in zip(self.sums, gradients, strict=True):
            total.add_((gradient.float() / scale).square())
        self.tokens += answer
        model.requires_grad_(False)

    def _draw(self, number: int, logits: Tensor) -> Tensor:
        """Sample one token per position from the model with a random stream per sample."""
        import torch

        key = hashlib.sha256(f"{self.settings.seed}|{self.role}|{number}".encode()).digest()
        stream = torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))
        chances = logits.detach().cpu().double().softmax(-1)  # in fp64, which not all GPUs support
        return torch.multinomial(chances, 1, generator=stream)[:, 0].to(logits.device)

    def _forward(self, inputs: Any) -> Any:  # noqa: ANN401
        try:
            return self.loaded.model(**inputs, use_cache=False)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ModelLoadError(
                f"'{self.loaded.folder.name}' failed on a calibration sample "
                f"({type(error).__name__}: {error}). Does the model support this input?"
            ) from error


def encode_sample(loaded: LoadedModel, sample: Sample) -> tuple[Any, int]:
    """Encode prompt and answer as one sequence; also return the number of answer tokens.

    Raises: as `encode_prompt`: RunError for an empty question, ModelLoadError for an image with a
        text model.
    """
    import torch

    inputs = encode_prompt(loaded, sample.question, sample.image)
    prompt = inputs["input_ids"]
    tokens = loaded.processor.encode_text(sample.answer)
    end = loaded.special_ids.eos
    answer = torch.tensor([tokens + ([end] if tokens and end is not None else [])]).long()
    for name, value in inputs.items():  # extend inputs of the same length as the tokens
        if isinstance(value, torch.Tensor) and value.shape == prompt.shape:
            more = answer if name == "input_ids" else torch.zeros_like(answer)
            more = torch.ones_like(answer) if name == "attention_mask" else more
            inputs[name] = torch.cat([value, more.to(value.dtype)], dim=1)
    return on_device(inputs, loaded.model.device), answer.shape[1]


def find_module(loaded: LoadedModel, checkpoint: Checkpoint, stored: str) -> torch.nn.Module:
    """Find the module of a loaded model that contains a stored matrix.

    Names differ between files and classes, and vision towers have projections with the same names,
    so that the end of the name must match and the layer numbers must be equal.

    Raises: ModelLoadError if there is none.
    """
    import torch

    if "[" not in stored and "layers." in stored:
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
        f"'{stored}' of '{checkpoint.id}' has no separate layer in the loaded model, so that its "
        f"inputs cannot be observed. Calibration does not support fused matrices; choose a method "
        f"that needs no calibration data."
    )
