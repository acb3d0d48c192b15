"""Recognise quantised weights, and name the format.

In: a config and the tensors of a model by their headers. Out: the name of the format and the first
quantised tensor. Weights count, not the config: models that were dequantised often keep a stale
`quantization_config`, which only names the format here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ipmerge_core.errors import CheckpointError, PairingError
from ipmerge_core.models.headers import FLOAT_DTYPES, UNSUPPORTED_BITS, TensorSpec
from ipmerge_core.runtime.input_files import one_line

CONFIG_KEYS = ("quantization_config", "compression_config")
REMEDY = (
    "Differences of quantised weights are mostly rounding errors: use the original float weights "
    "(F32, F16, BF16)."
)
_LABELS = {  # by quant_method
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fbgemm_fp8": "fp8",
    "fp8": "fp8",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "quanto": "quanto",
    "torchao": "torchao",
}
_NAMES = (  # of tensors that only a quantised model has
    (re.compile(r"\.g_idx$"), "GPTQ"),
    (re.compile(r"\.(weight_global_scale|weight_scale_2)$"), "NVFP4"),
    (re.compile(r"\.(weight_packed|weight_zero_point)$"), "compressed-tensors"),
    (re.compile(r"\.(SCB|weight\.(absmax|quant_map|quant_state\..+))$"), "bitsandbytes"),
    (re.compile(r"_blocks$"), "MXFP4"),
    (re.compile(r"\.weight\._(data|scale|shift)$"), "quanto"),
    (re.compile(r"\.(_weight_|weight[._:])qdata$"), "torchao"),
    (re.compile(r"\.W_q$"), "HQQ"),
    (re.compile(r"\.q(weight|zeros)$"), "AWQ"),  # as GPTQ, without `g_idx`
)
_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32"})
_BUFFERS = _INTEGERS | {"I64", "U64", "BOOL", "C64"}  # indices, masks, rotary embeddings
_FP8 = frozenset({"F8_E4M3", "F8_E5M2"})


class Quantised(NamedTuple):
    """The name of a format, and the first tensor that is stored in it."""

    format: str
    spec: TensorSpec

    def __str__(self) -> str:
        """Return the format and the dtype, for messages."""
        return ", ".join(dict.fromkeys((self.format, self.spec.dtype)))


def find_quantised(
    config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> Quantised | None:
    """Return the format of a model with quantised weights; None if all weights are floats."""
    settings = settings_of(config)
    named = next(_by_names(tensors), None)
    declared = bool(settings) or named is not None
    packed = (spec for spec in tensors.values() if _is_packed(spec, declared=declared))
    spec = next(packed, named.spec if named else None)
    if spec is None:
        return None
    by_dtype = "fp8 without scales" if spec.dtype in _FP8 else spec.dtype
    return Quantised(_declared(settings) or (named.format if named else by_dtype), spec)


def _by_names(tensors: Mapping[str, TensorSpec]) -> Iterator[Quantised]:
    for pattern, label in _NAMES:
        for name, spec in tensors.items():
            if pattern.search(name):
                yield Quantised(label, spec)


def refuse_quantised(
    model: str, config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> None:
    """Raise PairingError for a model with quantised weights, with the name of the format."""
    found = find_quantised(config, tensors)
    if found is not None:
        raise PairingError(f"'{found.spec.name}' of '{model}' is quantised ({found}). {REMEDY}")


def refuse_unsupported_dtypes(
    model: str, config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> None:
    """Raise CheckpointError for tensors in a dtype of safetensors that is not read."""
    spec = next((spec for spec in tensors.values() if spec.dtype in UNSUPPORTED_BITS), None)
    if spec is None:
        return
    found = find_quantised(config, tensors)
    cause = f" The model is quantised ({found})." if found is not None else ""
    raise CheckpointError(
        f"'{spec.name}' of '{model}' is stored as {spec.dtype}, which is not supported.{cause} Use "
        f"a release with float weights (F32, F16, BF16)."
    )


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config's quantisation settings, also those inside the config of a part."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    found = (part.get(key) for part in parts for key in CONFIG_KEYS)
    return next((settings for settings in found if settings and isinstance(settings, dict)), {})


def _declared(settings: Mapping[str, Any]) -> str | None:
    """Name the format that the settings declare."""
    method = settings.get("quant_method")
    if not isinstance(method, str):
        return None
    label = _LABELS.get(method, one_line(method)[:40])
    bits = [f"{n}-bit" for n in (4, 8) if settings.get(f"load_in_{n}bit") is True]
    details = [settings.get("format"), settings.get("quant_algo"), *bits]
    more = [one_line(detail)[:40] for detail in details if isinstance(detail, str)]
    return " ".join([label, *more])


def _is_packed(spec: TensorSpec, *, declared: bool) -> bool:
    """Return whether a tensor holds weights in another dtype than floats.

    Integer matrices that are no `weight` are buffers, unless the config declares a quantisation.
    """
    if len(spec.shape) < 2 or spec.dtype in FLOAT_DTYPES:
        return False
    return (
        spec.name.endswith(".weight")
        or spec.dtype not in _BUFFERS
        or (declared and spec.dtype in _INTEGERS)
    )
