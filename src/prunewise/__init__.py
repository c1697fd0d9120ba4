"""What a neural network needs, at three grains, and a smaller network under a budget.

The public names of prunewise, and nothing else. They are imported on first use, so that `import prunewise`
costs no import of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunewise.channels.attach import attach_gates
    from prunewise.channels.budget import Budget
    from prunewise.channels.oneshot import plan_channels
    from prunewise.channels.session import GateSession
    from prunewise.core.cost import Cost, measure
    from prunewise.core.errors import (
        AlreadyGatedError,
        BudgetError,
        CheckpointError,
        DataError,
        MethodError,
        NonFiniteError,
        NoPrunableGroupError,
        PlanError,
        PrunewiseError,
        SharedParameterError,
        SparsityError,
        TraceError,
        VerificationError,
    )
    from prunewise.core.groups import ChannelGroup, channel_groups
    from prunewise.core.optimizer import migrate_optimizer
    from prunewise.core.plan import ChannelPlan
    from prunewise.core.sparsity import SparsityPlan
    from prunewise.core.surgery import apply_plan
    from prunewise.io import load_pruned, save_pruned
    from prunewise.layers.allocate import allocate
    from prunewise.layers.compactness import compactness
    from prunewise.layers.profile import Compactness
    from prunewise.layers.semi_structured import to_semi_structured_
    from prunewise.layers.sparsify import attach_masks_, make_permanent_, sparsify_
    from prunewise.recipes import CompressReport, CompressResult, allocate_channels, compress
    from prunewise.samples.agreement import Agreement, agreement
    from prunewise.samples.galleries import Gallery, gallery
    from prunewise.samples.pictures import plot_agreement, plot_cohorts, plot_data_map, plot_histogram
    from prunewise.samples.recorder import LearnabilityRecorder
    from prunewise.samples.sampling import CurriculumSampler, InfoBatchSampler, WeightedSampler
    from prunewise.samples.scores import SampleScores
    from prunewise.samples.selection import Triage, select_subset, triage
    from prunewise.samples.selector import SampleSelector
    from prunewise.samples.suspecting import Suspects, suspects
    from prunewise.samples.tracking import track
    from prunewise.scoring import score_samples
    from prunewise.sparse_io import SparseSize, load_sparse, save_sparse, sparse_size

__version__ = "0.1.0"

__all__ = [
    "Agreement",
    "AlreadyGatedError",
    "Budget",
    "BudgetError",
    "ChannelGroup",
    "ChannelPlan",
    "CheckpointError",
    "Compactness",
    "CompressReport",
    "CompressResult",
    "Cost",
    "CurriculumSampler",
    "DataError",
    "Gallery",
    "GateSession",
    "InfoBatchSampler",
    "LearnabilityRecorder",
    "MethodError",
    "NoPrunableGroupError",
    "NonFiniteError",
    "PlanError",
    "PrunewiseError",
    "SampleScores",
    "SampleSelector",
    "SharedParameterError",
    "SparseSize",
    "SparsityError",
    "SparsityPlan",
    "Suspects",
    "TraceError",
    "Triage",
    "VerificationError",
    "WeightedSampler",
    "__version__",
    "agreement",
    "allocate",
    "allocate_channels",
    "apply_plan",
    "attach_gates",
    "attach_masks_",
    "channel_groups",
    "compactness",
    "compress",
    "gallery",
    "load_pruned",
    "load_sparse",
    "make_permanent_",
    "measure",
    "migrate_optimizer",
    "plan_channels",
    "plot_agreement",
    "plot_cohorts",
    "plot_data_map",
    "plot_histogram",
    "save_pruned",
    "save_sparse",
    "score_samples",
    "select_subset",
    "sparse_size",
    "sparsify_",
    "suspects",
    "to_semi_structured_",
    "track",
    "triage",
]

# Which module holds which of these names; what is not listed here is an error class.
_HOMES = {
    "channels.attach": ("attach_gates",),
    "channels.budget": ("Budget",),
    "channels.oneshot": ("plan_channels",),
    "channels.session": ("GateSession",),
    "core.cost": ("Cost", "measure"),
    "core.groups": ("ChannelGroup", "channel_groups"),
    "core.plan": ("ChannelPlan",),
    "core.optimizer": ("migrate_optimizer",),
    "core.sparsity": ("SparsityPlan",),
    "core.surgery": ("apply_plan",),
    "io": ("load_pruned", "save_pruned"),
    "sparse_io": ("SparseSize", "load_sparse", "save_sparse", "sparse_size"),
    "samples.agreement": ("Agreement", "agreement"),
    "samples.galleries": ("Gallery", "gallery"),
    "samples.pictures": ("plot_agreement", "plot_cohorts", "plot_data_map", "plot_histogram"),
    "samples.recorder": ("LearnabilityRecorder",),
    "samples.sampling": ("CurriculumSampler", "InfoBatchSampler", "WeightedSampler"),
    "samples.scores": ("SampleScores",),
    "samples.selection": ("Triage", "select_subset", "triage"),
    "samples.selector": ("SampleSelector",),
    "samples.suspecting": ("Suspects", "suspects"),
    "samples.tracking": ("track",),
    "layers.allocate": ("allocate",),
    "layers.compactness": ("compactness",),
    "layers.profile": ("Compactness",),
    "layers.semi_structured": ("to_semi_structured_",),
    "layers.sparsify": ("attach_masks_", "make_permanent_", "sparsify_"),
    "scoring": ("score_samples",),
    "recipes": ("CompressReport", "CompressResult", "allocate_channels", "compress"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

if not TYPE_CHECKING:  # a type checker would take any name for a public one

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'prunewise' has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(f"prunewise.{_HOME.get(name, 'core.errors')}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
