"""REALM: a BERT whose heads embed texts, compare them, and read answers in them."""

from dataclasses import replace

from lsg_flax.models import heads, realm, task
from lsg_flax.models.config import ModelConfig
from lsg_flax.models.config_realm import RealmConfig
from lsg_flax.models.families import bert
from lsg_flax.models.families.family import Family, HeadTable, Row
from lsg_flax.models.layout import BUFFER, DENSE, DENSE_WITHOUT_BIAS, NORM, TENSOR

_WORDS = "cls.predictions"
_TRANSFORM = f"{_WORDS}.transform"
_KEPT = tuple(
    Row(f"{_WORDS}.{name}", f"head/{name.replace('.', '_')}", BUFFER) for name in realm.KEPT
)
_ONE_BIAS = {f"{_WORDS}.decoder.bias": f"{_WORDS}.bias"}


def _embedders(config: ModelConfig) -> tuple[str, ...]:
    own = isinstance(config, RealmConfig) and config.own_query_embedder
    return ("embedder", "query_embedder") if own else ("embedder",)


REALM = Family(
    model_type="realm",
    class_prefix="Realm",
    prefix="realm",
    encoder=bert.ENCODER,
    pooler=bert.POOLER,
    tables=(
        replace(bert.BASE, class_suffix="BertModel"),
        HeadTable(
            task.EMBEDDER,
            "Embedder",
            realm.ProjectionHead,
            (
                *_KEPT,
                Row("cls.dense", "head/dense", DENSE),
                Row("cls.LayerNorm", "head/layer_norm", NORM),
            ),
            pooled=True,
            tied=_ONE_BIAS,
            part="embedder",
        ),
        HeadTable(task.SCORER, "Scorer", realm.ProjectionHead, embedders=_embedders),
        HeadTable(
            task.KNOWLEDGE_AUGMENTED_ENCODER,
            "KnowledgeAugEncoder",
            heads.LanguageModelHead,
            (
                Row(f"{_TRANSFORM}.dense", "head/transform", DENSE),
                Row(f"{_TRANSFORM}.LayerNorm", "head/layer_norm", NORM),
                Row(f"{_WORDS}.bias", "head/bias", TENSOR),
            ),
            pooled=True,
            tied=_ONE_BIAS
            | {f"{_WORDS}.decoder.weight": "realm.embeddings.word_embeddings.weight"},
            untied_rows=(Row(f"{_WORDS}.decoder", "head", DENSE_WITHOUT_BIAS),),
            finish=realm.marginal_likelihood,
        ),
        HeadTable(
            task.READER,
            "Reader",
            realm.SpanHead,
            (
                *_KEPT,
                Row("qa_outputs.dense_intermediate", "head/dense_intermediate", DENSE),
                Row("qa_outputs.dense_output", "head/dense_output", DENSE),
                Row("qa_outputs.layer_normalization", "head/span_norm", NORM),
            ),
            pooled=True,
            tied=_ONE_BIAS,
            part="reader",
            finish=realm.best_spans,
        ),
    ),
    to_lsg=replace(bert.WITH_SEGMENTS, lengths=("reader_seq_len",)),
    lsg_type="lsg-realm",
    config_type=RealmConfig,
    # As in the checkpoints of TensorFlow (load_tf_weights_in_realm).
    tf_names=(
        (r"^reader/module/bert/", "reader/realm/"),
        (r"^reader/module/cls/", "reader/cls/"),
        (r"^reader/dense/", "reader/qa_outputs/dense_intermediate/"),
        (r"^reader/dense_1/", "reader/qa_outputs/dense_output/"),
        (r"^reader/layer_normalization", "reader/qa_outputs/layer_normalization"),
        (r"^(module/){3,4}bert/", "embedder/realm/"),
        (r"^(module/){3,4}cls/predictions/", "embedder/cls/predictions/"),
        (r"^(module/){2,3}(LayerNorm|dense)/", r"embedder/cls/\2/"),
        (r"^bert/", "realm/"),
    ),
)
