"""Settings that many runs do not need: LoRA, moving average, layer-wise learning-rate decay, class
weights, early stopping, reports. `Settings` inherits them."""

import dataclasses
from typing import Annotated, Any, Literal

from lsg_flax.training.coerce import check_names
from lsg_flax.training.help import of_refinements, of_run
from lsg_flax.training.lora import LoRA, frozen_beside
from lsg_flax.training.optimizers import check_decay
from lsg_flax.training.reports import REPORTS, Reporting
from lsg_flax.training.states import BestMode
from lsg_flax.training.stopping import EarlyStopping

Trained = Literal["all", "head", "global_tokens_and_head"]

_MODEL = "^([a-z_]*embedder/)?"  # REALM's scorer contains whole models
# Pattern of frozen parameters for each `train_only`; searched in paths such as
# "encoder/layers/mlp_up/kernel".
FROZEN: dict[str, str | None] = {
    "all": None,
    "head": f"{_MODEL}(shared|encoder|decoder)/",
    "global_tokens_and_head": f"{_MODEL}(shared|decoder|encoder(?!/embeddings/global_embeddings))/",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refinements:
    """See `Settings`."""

    class_weights: Annotated[
        dict[str, float],
        of_refinements("weights of labels in the loss, such as rare=4,usual=0.5", "1 each"),
    ] = dataclasses.field(default_factory=dict)
    layerwise_lr_decay: Annotated[
        float | None,
        of_refinements("learning rate of a layer, as a share of that of the layer above it", "1"),
    ] = None
    ema_decay: Annotated[
        float | None,
        of_refinements(
            "keep, evaluate and save a moving average; share kept in a step, such as 0.999"
        ),
    ] = None
    lora_r: Annotated[
        int | None,
        of_refinements("train adapters of this rank (LoRA) and the head; merged when saved"),
    ] = None
    lora_alpha: Annotated[
        float | None, of_refinements("adapters are multiplied by alpha / r", f"{LoRA.alpha:g}")
    ] = None
    lora_target_modules: Annotated[
        tuple[str, ...] | None,
        of_refinements("projections that get adapters", " ".join(LoRA.target_modules)),
    ] = None
    early_stopping_patience: Annotated[
        int | None, of_refinements("stop after N evaluations without a better score of --best")
    ] = None
    early_stopping_threshold: Annotated[
        float, of_refinements("a score is better only if it improves by more than this")
    ] = 0.0
    report_to: Annotated[
        str | tuple[str, ...] | None,
        of_run("also report to these, if their packages are installed", choices=lambda: REPORTS),
    ] = None
    run_name: Annotated[
        str | None, of_run("name of the run in --report-to", "the package's choice")
    ] = None

    def check_refinements(self, frozen: str | None, *, has_classes: bool, evaluates: bool) -> None:
        """Raises ValueError for values that exclude each other.

        Args:
            frozen: pattern of frozen parameters, if there is one.
            has_classes: labels have names, and each text or word has one label.
            evaluates: there is held-out data.
        """
        check_names("report_to", self.reported_to, REPORTS)
        for name in ("layerwise_lr_decay", "ema_decay"):
            if (decay := getattr(self, name)) is not None:
                check_decay(name, decay)
        weights = self.class_weights
        if weights and not has_classes:
            raise ValueError(
                f"class_weights={weights} are for sequence_classification with one label per text "
                "and token_classification; leave them out."
            )
        if weights and not (min(weights.values()) >= 0 and max(weights.values()) > 0):
            raise ValueError(
                f"class_weights={weights} must be at least 0, and one of them above 0."
            )
        if self.early_stopping_patience is not None and not evaluates:
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} counts evaluations; give "
                "eval_data to evaluate on."
            )
        for name, other in (
            ("lora_alpha", "lora_r"),
            ("lora_target_modules", "lora_r"),
            ("early_stopping_threshold", "early_stopping_patience"),
            ("run_name", "report_to"),
        ):
            if getattr(self, name) and not getattr(self, other):
                given = f"{name}={getattr(self, name)!r}"
                raise ValueError(f"{given} has no effect without {other}; give {other} too.")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha={self.lora_alpha} must be above 0.")
        if self.lora_r is not None and frozen is not None:
            raise ValueError(
                f"frozen={frozen!r} and lora_r={self.lora_r}: with LoRA only adapters and the "
                "head are trained, or what train_only says; leave frozen out."
            )

    @property
    def lora(self) -> LoRA | None:
        """The adapters; None without LoRA."""
        if self.lora_r is None:
            return None
        given = {"alpha": self.lora_alpha, "target_modules": self.lora_target_modules}
        options: Any = {name: value for name, value in given.items() if value is not None}
        return LoRA(self.lora_r, **options)

    def stays(self, train_only: Trained) -> str | None:
        """Returns the pattern of frozen parameters; with LoRA by default all but the head."""
        pattern = FROZEN[train_only]
        return pattern if self.lora is None else frozen_beside(pattern or str(FROZEN["head"]))

    def stopping(self, metric: str | None, mode: BestMode) -> EarlyStopping | None:
        """Returns the rule of early stopping for a score; None if the run never stops early."""
        if self.early_stopping_patience is None or metric is None:
            return None
        rule = self.early_stopping_patience, self.early_stopping_threshold
        return EarlyStopping(metric, *rule, mode)

    @property
    def reported_to(self) -> tuple[str, ...]:
        """The names in `report_to`, always as a tuple."""
        to = self.report_to
        return (to,) if isinstance(to, str) else to or ()

    def reporting(self) -> Reporting:
        """Returns where the run is reported; raises ImportError if a package is not installed."""
        return Reporting(self.reported_to, self.run_name, dataclasses.asdict(self))

    def weights_of(self, labels: tuple[str, ...] | None) -> tuple[float, ...] | None:
        """Returns the weight of each label, None if all count the same; raises ValueError for a
        name in `class_weights` that is not a label."""
        if not self.class_weights or labels is None:
            return None
        unknown = [name for name in self.class_weights if name not in labels]
        if unknown:
            raise ValueError(
                f"class_weights={self.class_weights}: {', '.join(map(repr, unknown))} is none of "
                f"the labels {', '.join(labels)}; give some of these, the others have weight 1."
            )
        return tuple(self.class_weights.get(name, 1.0) for name in labels)
