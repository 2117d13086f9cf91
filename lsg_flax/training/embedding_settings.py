"""What a run is told that trains embeddings: fields of `Settings` for this task alone."""

import dataclasses
from typing import Annotated

from lsg_flax.models import Pooling
from lsg_flax.training.help import Help

SCALE = 20.0  # as sentence-transformers' MultipleNegativesRankingLoss
EMBEDDING = "embedding"  # the task
COSINE = "cosine"  # the score of a student beside its teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingSettings:
    """Texts as vectors: pairs by contrast, or a teacher's vectors where there is one."""

    pooling: Annotated[
        Pooling | None,
        Help("model", "embedding: how states become a vector", "as the model's folder says"),
    ] = None
    teacher: Annotated[
        str | None,
        Help("training", "embedding: model whose vectors are learned", "none, learn from pairs"),
    ] = None
    teacher_length: Annotated[
        int | None,
        Help("training", "tokens of the parts that the teacher reads", "as its folder says"),
    ] = None
    similarity_scale: Annotated[
        float | None, Help("training", "embedding: times cosines, for pairs", f"{SCALE:g}")
    ] = None

    def _check_embedding(self) -> None:
        """Raises ValueError for fields that do not fit the task, or each other."""
        task: str = self.task  # type: ignore[attr-defined]
        given = [name for name in EMBEDDING_NAMES if getattr(self, name) is not None]
        if task != EMBEDDING:
            if given:
                raise ValueError(
                    f"{given[0]}={getattr(self, given[0])!r} is for task='embedding', not {task}; "
                    "leave it out."
                )
            return
        if self.teacher is None and self.teacher_length is not None:
            raise ValueError(f"teacher_length={self.teacher_length} needs a teacher.")
        if self.teacher is not None and self.similarity_scale is not None:
            raise ValueError(
                f"similarity_scale={self.similarity_scale} is for pairs, whose cosines are ranked; "
                "with a teacher leave it out."
            )
        if self.similarity_scale is not None and self.similarity_scale <= 0:
            raise ValueError(f"similarity_scale={self.similarity_scale} must be above 0.")
        if self.train_only == "head":  # type: ignore[attr-defined]
            raise ValueError(
                "train_only='head': embeddings have no head, so nothing would learn; choose 'all' "
                "or 'global_tokens_and_head', or name what stays by frozen."
            )


EMBEDDING_NAMES = tuple(field.name for field in dataclasses.fields(EmbeddingSettings))
