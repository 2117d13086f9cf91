"""Settings of runs that train embeddings: fields of `Settings` for this task only."""

import dataclasses
from typing import Annotated

from lsg_flax.models import Pooling
from lsg_flax.training.help import Help

SCALE = 20.0  # as sentence-transformers' MultipleNegativesRankingLoss
EMBEDDING = "embedding"  # the task
COSINE = "cosine"  # the score of a student beside its teacher


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingSettings:
    """Settings of the task "embedding": pairs with a contrastive loss, or a teacher's vectors."""

    pooling: Annotated[
        Pooling | None,
        Help("model", "embedding: how hidden states become a vector", "as in the model's folder"),
    ] = None
    teacher: Annotated[
        str | None,
        Help("training", "embedding: model whose vectors are learned", "none, learn from pairs"),
    ] = None
    teacher_length: Annotated[
        int | None,
        Help("training", "tokens of the parts that the teacher reads", "as in its folder"),
    ] = None
    similarity_scale: Annotated[
        float | None, Help("training", "embedding: cosines are multiplied by it", f"{SCALE:g}")
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
                f"similarity_scale={self.similarity_scale} is for learning from pairs; with a "
                "teacher leave it out."
            )
        if self.similarity_scale is not None and self.similarity_scale <= 0:
            raise ValueError(f"similarity_scale={self.similarity_scale} must be above 0.")
        if self.train_only == "head":  # type: ignore[attr-defined]
            raise ValueError(
                "train_only='head': embeddings have no head, so nothing would be trained; choose "
                "'all' or 'global_tokens_and_head', or set frozen to what shall not be trained."
            )


EMBEDDING_NAMES = tuple(field.name for field in dataclasses.fields(EmbeddingSettings))
