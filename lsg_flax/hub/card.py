"""The text of a model card, with the metadata at its beginning that the Hugging Face hub reads."""

import dataclasses
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax

from lsg_flax.hub.card_files import CARD, SOURCE_CARD
from lsg_flax.hub.checkpoint import Checkpoint
from lsg_flax.hub.pytorch_code import in_pytorch
from lsg_flax.models import Model, family_of

# Our tasks -> the hub's names.
_HUB_TASKS = {
    "base": "feature-extraction",
    "masked_lm": "fill-mask",
    "sequence_classification": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
    "multiple_choice": "multiple-choice",
    "causal_lm": "text-generation",
    "conditional_generation": "summarization",
}
# Metadata of the source's card that is also true of converted or further trained weights.
_INHERITED = ("language", "license", "license_name", "license_link")


@dataclasses.dataclass(frozen=True)
class Card:
    """The contents of a card beside those that are derived from the model.

    Attributes:
        about: the first sentences.
        sections: Markdown texts by their headings.
        scores: scores of the model by their names.
        data: name of the data that the model was scored on.
    """

    about: str
    sections: Mapping[str, str]
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    data: str = ""


def card_text(card: Card, name: str, made: Checkpoint, source: Checkpoint, base: str) -> str:
    """Returns the text of a card in the format of huggingface_hub.

    Args:
        card: its contents.
        name: name of the model: of its folder or repository.
        made: the checkpoint that the card describes.
        source: the checkpoint that it was made from; licence and language come from its card.
        base: the source as the user named it; a hub id becomes `base_model`.
    """
    import huggingface_hub

    known = _metadata_of(source.root)
    scored: dict[str, Any] = {}
    if card.scores:
        scored = {"model_name": name, "eval_results": _results(card, made)}
    data = huggingface_hub.ModelCardData(
        base_model=known.get("base_model") if pathlib.Path(base).exists() else base,
        library_name="lsg_flax",
        pipeline_tag=_HUB_TASKS.get(made.task),
        tags=["jax", "flax", "long-context", made.config.model_type],
        **{field: known[field] for field in _INHERITED if known.get(field)},
        **scored,
    )
    parts = {"Model": _model_table(made), "How to load it": _loading(name, made), **card.sections}
    if (made.folder / SOURCE_CARD).is_file():
        parts["What it was made of"] = f"Its card: [{SOURCE_CARD}]({SOURCE_CARD})."
    body = "".join(f"\n## {heading}\n\n{text}\n" for heading, text in parts.items())
    text = f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{card.about}\n{body}"
    return str(huggingface_hub.ModelCard(text))


def table(rows: Mapping[str, object], head: tuple[str, str] = ("", "")) -> str:
    """Returns names and values as a Markdown table."""
    cells = (
        [" ".join(str(part).split()).replace("|", "\\|") for part in row] for row in rows.items()
    )
    lines = (f"| {name} | {value} |" for name, value in cells)
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines])


def _metadata_of(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the metadata of the card in a folder; empty if there is no card."""
    import huggingface_hub
    import yaml

    file = folder / CARD
    if not file.is_file():
        return {}
    try:
        card = huggingface_hub.ModelCard(file.read_text("utf-8"), ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        warnings.warn(
            f"the metadata of {file} cannot be read, so the new card has no licence and no "
            f"language: {error}",
            stacklevel=2,
        )
        return {}
    return card.data.to_dict()


def _model_table(made: Checkpoint) -> str:
    model, lsg = Model(made.config_for(made.task), made.task), made.config.lsg
    sizes = (leaf.size for leaf in jax.tree.leaves(model.abstract_params()))
    rows: dict[str, object] = {
        "task": made.task,
        "class": family_of(made.config.model_type).class_name(made.task, lsg=lsg is not None),
        "tokens it reads": f"{model.max_length:,}",
        "parameters": f"{sum(sizes):,}",
        "attention": made.config.attention,
    }
    rows |= {} if lsg is None else {f"`{n}`": v for n, v in dataclasses.asdict(lsg).items()}
    if model.task_record.named_labels:
        rows["labels"] = ", ".join(made.config.labels)
    return table(rows)


def _loading(name: str, made: Checkpoint) -> str:
    return "\n".join(
        [
            "```python",
            "import lsg_flax",
            "",
            f'model, params = lsg_flax.from_pretrained("{name}")  # its folder, or name on the hub',
            "```",
            "",
            f"In PyTorch: `{in_pytorch(made, name)}`",
        ]
    )


def _results(card: Card, made: Checkpoint) -> list[Any]:
    import huggingface_hub

    task = _HUB_TASKS.get(made.task, made.task)
    where = (task, pathlib.Path(card.data).suffix[1:] or "dataset", card.data)
    return [huggingface_hub.EvalResult(*where, name, value) for name, value in card.scores.items()]
