"""IPMerge: compare and merge the weights of a vision-language model and related text models.

Public names are imported lazily on first use, so that `import ipmerge_core` is fast and the app can
render before torch is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ipmerge_core.runtime.host import check_platform
from ipmerge_core.version import __version__

if TYPE_CHECKING:
    from ipmerge_core.adapters.export import export_adapter
    from ipmerge_core.analysis.analyse import analyse, iter_analysis
    from ipmerge_core.analysis.records import Analysis, LayerRecord
    from ipmerge_core.merging.merge import iter_merge, merge
    from ipmerge_core.methods import METHODS
    from ipmerge_core.models.pairing import ModelPair, open_pair
    from ipmerge_core.planning.plan import MergePlan, make_plan
    from ipmerge_core.spectral.spectrum import Spectrum, svd

_HOMES = {
    "open_pair": "models.pairing",
    "ModelPair": "models.pairing",
    "svd": "spectral.spectrum",
    "Spectrum": "spectral.spectrum",
    "analyse": "analysis.analyse",
    "iter_analysis": "analysis.analyse",
    "Analysis": "analysis.records",
    "LayerRecord": "analysis.records",
    "METHODS": "methods",
    "make_plan": "planning.plan",
    "MergePlan": "planning.plan",
    "merge": "merging.merge",
    "iter_merge": "merging.merge",
    "export_adapter": "adapters.export",
}

__all__ = [
    "open_pair",
    "ModelPair",
    "svd",
    "Spectrum",
    "analyse",
    "iter_analysis",
    "Analysis",
    "LayerRecord",
    "METHODS",
    "make_plan",
    "MergePlan",
    "merge",
    "iter_merge",
    "export_adapter",
    "__version__",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 (a module attribute can be anything)
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ipmerge_core' has no attribute '{name}'")
    check_platform()
    value = getattr(import_module(f"ipmerge_core.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
