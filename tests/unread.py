"""Fields of config.json that a family's PyTorch classes do not read, with values that would change
a lot, or stop everything, if they were read."""

STRANGE = {
    "embedding_size": 6,
    "num_hidden_groups": 2,
    "inner_group_num": "x",
    "is_decoder": True,
    "add_cross_attention": True,
    "layer_norm_eps": 3.0,
    "type_vocab_size": None,
    "position_embedding_type": "relative_key",
    "intermediate_size": -3,
    "hidden_act": "relu",
    "hidden_dropout_prob": 7,
    "attention_probs_dropout_prob": [1],
    "classifier_dropout": "x",
    "classifier_dropout_prob": "x",
    "seq_classif_dropout": 9,
    "dim": 3,
    "n_layers": 7,
    "summary_type": "mean",
    "summary_last_dropout": "x",
    "qa_dropout": "x",
    "block_size": "x",
}
UNREAD = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "realm"),
        "embedding_size num_hidden_groups inner_group_num classifier_dropout_prob "
        "seq_classif_dropout dim n_layers summary_type summary_last_dropout qa_dropout block_size",
    ),
    **dict.fromkeys(
        ("bart", "mbart", "pegasus"),
        "embedding_size num_hidden_groups inner_group_num add_cross_attention layer_norm_eps "
        "type_vocab_size position_embedding_type intermediate_size hidden_act hidden_dropout_prob "
        "attention_probs_dropout_prob classifier_dropout_prob seq_classif_dropout dim n_layers "
        "summary_type summary_last_dropout qa_dropout block_size",
    ),
    "electra": "num_hidden_groups inner_group_num classifier_dropout_prob seq_classif_dropout dim "
    "n_layers qa_dropout block_size",
    "albert": "is_decoder add_cross_attention classifier_dropout seq_classif_dropout dim n_layers "
    "summary_type summary_last_dropout qa_dropout block_size",
    "squeezebert": "num_hidden_groups inner_group_num add_cross_attention position_embedding_type "
    "classifier_dropout classifier_dropout_prob seq_classif_dropout dim n_layers summary_type "
    "summary_last_dropout qa_dropout block_size",
    "distilbert": "embedding_size num_hidden_groups inner_group_num is_decoder add_cross_attention "
    "layer_norm_eps type_vocab_size position_embedding_type intermediate_size hidden_act "
    "hidden_dropout_prob attention_probs_dropout_prob classifier_dropout classifier_dropout_prob "
    "summary_type summary_last_dropout block_size",
}


def unread_by(family: str, *, lsg: bool = False) -> dict:
    """Those of a family; its LSG classes read two more."""
    read = {"block_size", "is_decoder"} if lsg else set()
    return {name: STRANGE[name] for name in UNREAD[family].split() if name not in read}
