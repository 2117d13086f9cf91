"""Settings that many runs do without: LoRA, averages, rates by layer, weights of labels, an early
stop, reports. They are fields of `Settings`, whose first part this is."""

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

_MODEL = "^([a-z_]*embedder/)?"  # a scorer is made of models
# What stays as it is, by what is trained; searched in paths such as "encoder/layers/mlp_up/kernel".
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
        of_refinements("how much labels count, such as rare=4,usual=0.5", "1 each"),
    ] = dataclasses.field(default_factory=dict)
    layerwise_lr_decay: Annotated[
        float | None,
        of_refinements("learning rate of a layer, as a share of that of the layer above", "1"),
    ] = None
    ema_decay: Annotated[
        float | None,
        of_refinements("keep, evaluate and save a moving average of the model, such as 0.999"),
    ] = None
    lora_r: Annotated[
        int | None,
        of_refinements("train adapters of this rank (LoRA) and the head; merged when saved"),
    ] = None
    lora_alpha: Annotated[
        float | None, of_refinements("adapters count alpha / r times", f"{LoRA.alpha:g}")
    ] = None
    lora_target_modules: Annotated[
        tuple[str, ...] | None,
        of_refinements("projections with adapters", " ".join(LoRA.target_modules)),
    ] = None
    early_stopping_patience: Annotated[
        int | None, of_refinements("stop after so many evaluations in which --best is no better")
    ] = None
    early_stopping_threshold: Annotated[
        float, of_refinements("by how much more than this it has to be better")
    ] = 0.0
    report_to: Annotated[
        str | tuple[str, ...] | None,
        of_run("report the run there too, by packages that are installed", choices=lambda: REPORTS),
    ] = None
    run_name: Annotated[str | None, of_run("what it is called there", "the package's choice")] = (
        None
    )

    def check_refinements(self, frozen: str | None, *, has_classes: bool, evaluates: bool) -> None:
        """Raises ValueError for values that exclude each other.

        Args:
            frozen: the pattern, if there is one.
            has_classes: each text or word has one of the labels, which have names.
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
                f"class_weights={weights} must be at least 0, and one of them above it."
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
                raise ValueError(f"{given} does nothing without {other}; give that too.")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha={self.lora_alpha} must be above 0.")
        if self.lora_r is not None and frozen is not None:
            raise ValueError(
                f"frozen={frozen!r} and lora_r={self.lora_r}: of the model's own parameters LoRA "
                "trains the head, or what train_only says; leave frozen out."
            )

    @property
    def lora(self) -> LoRA | None:
        """The adapters, if there are to be some."""
        if self.lora_r is None:
            return None
        given = {"alpha": self.lora_alpha, "target_modules": self.lora_target_modules}
        options: Any = {name: value for name, value in given.items() if value is not None}
        return LoRA(self.lora_r, **options)

    def stays(self, train_only: Trained) -> str | None:
        """The pattern of the parameters that stay as they are; with LoRA all but the head, if
        nothing else is said."""
        pattern = FROZEN[train_only]
        return pattern if self.lora is None else frozen_beside(pattern or str(FROZEN["head"]))

    def stopping(self, metric: str | None, mode: BestMode) -> EarlyStopping | None:
        """When the run stops early, by its score."""
        if self.early_stopping_patience is None or metric is None:
            return None
        rule = self.early_stopping_patience, self.early_stopping_threshold
        return EarlyStopping(metric, *rule, mode)

    @property
    def reported_to(self) -> tuple[str, ...]:
        """The names in `report_to`."""
        to = self.report_to
        return (to,) if isinstance(to, str) else to or ()

    def reporting(self) -> Reporting:
        """Where the run is reported to; raises ImportError for a package that is not installed."""
        return Reporting(self.reported_to, self.run_name, dataclasses.asdict(self))

    def weights_of(self, labels: tuple[str, ...] | None) -> tuple[float, ...] | None:
        """How much each of the labels counts, None where all count alike; raises ValueError for a
        name that is none of them."""
        if not self.class_weights or labels is None:
            return None
        unknown = [name for name in self.class_weights if name not in labels]
        if unknown:
            raise ValueError(
                f"class_weights={self.class_weights}: {', '.join(map(repr, unknown))} is none of "
                f"the labels {', '.join(labels)}; give names of these, the others weigh 1."
            )
        return tuple(self.class_weights.get(name, 1.0) for name in labels)
