"""Beam search and the rules on tokens, slow and obvious: one row, one step, one candidate after the
other.
"""

import numpy as np


def slow_rules(rules, text, scores, *, start, limit, source=(), first=None):
    """The scores (float32) of the token behind a text, a list."""
    scores, length = np.array(scores, np.float32), len(text)
    ends, banned = list(rules.eos_token_id), []
    penalty = np.float32(rules.repetition_penalty)
    for token in set(text):
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    sizes = (rules.no_repeat_ngram_size, rules.encoder_no_repeat_ngram_size)
    for seen, size in zip((text, list(source)), sizes, strict=True):
        if size and length >= size - 1:
            runs = [seen[i : i + size] for i in range(len(seen) - size + 1)]
            banned += [run[-1] for run in runs if run[:-1] == text[length - size + 1 :]]
    for word in map(list, rules.bad_words_ids):
        long = len(word) > 1 and len(word) <= length and text[1 - len(word) :] == word[:-1]
        if long or (len(word) == 1 and word[0] not in ends):
            banned.append(word[-1])
    if length < rules.min_length or length - start < rules.min_new_tokens:
        banned += ends
    scores[banned] = -np.inf
    for forced, now in (
        ([] if first is None else [first], length == 1),
        (list(rules.forced_eos_token_id), length == limit - 1),
    ):
        if forced and now:
            scores[:] = -np.inf
            scores[forced] = 0
    scores[list(rules.suppress_tokens)] = -np.inf
    if length == start + (first is not None and start <= 1):
        scores[list(rules.begin_suppress_tokens)] = -np.inf
    return scores


def slow_search(scores_of, prompt, *, beams, ends, limit, penalty=1.0, early=False, margins=None):
    """The kept texts of one row, best first: pairs of a score and of the tokens without an end.
    By how little decisions are made is added to `margins`."""
    margins = [] if margins is None else margins
    texts = [(np.float32(-1e9 if i else 0), list(prompt)) for i in range(beams)]
    kept = []  # in the order of being added

    def divide(score, length):
        return score / np.float32(float(length - len(prompt)) ** penalty)

    def note(*scores):
        margins.extend(np.abs(np.diff([score for score in scores if score > -1e8])))

    def keep(score, tokens):
        for other, _ in kept:
            note(score, other)
        if len(kept) < beams or score > min(kept)[0]:
            kept.append((score, tokens))
        if len(kept) > beams:
            worst = min(score for score, _ in kept)
            del kept[[score for score, _ in kept].index(worst)]

    done = False
    while not done and len(texts[0][1]) < limit:
        length = len(texts[0][1]) + 1
        candidates = [
            (score + more, tokens, token)
            for score, tokens in texts
            for token, more in enumerate(scores_of(tokens))
        ]
        candidates.sort(key=lambda c: -c[0])  # stable
        count = max(2, 1 + len(ends)) * beams
        note(*(score for score, _, _ in candidates[: count + 1]))
        candidates = candidates[:count]
        for score, tokens, token in candidates[:beams]:
            if token in ends:
                keep(divide(score, length), tokens)
        texts = [(score, [*tokens, t]) for score, tokens, t in candidates if t not in ends][:beams]
        best = divide(candidates[0][0], limit if early == "never" and penalty > 0 else length)
        worst = min([score for score, _ in kept], default=-np.inf)
        if worst != best:  # else they are one and the same
            note(worst, best)
        done = len(kept) == beams and (early is True or worst >= best)
    for score, tokens in () if done else texts:
        keep(divide(score, length), tokens)
    order = sorted(range(beams), key=lambda i: (-kept[i][0], -i))
    return [kept[i] for i in order]


def laid_out(found, *, ends, limit, pad):
    """The texts as rows of one width."""
    width = min(max(len(tokens) for _, tokens in found) + 1, limit)
    rows = [[*tokens, *ends[:1], *[pad] * width][:width] for _, tokens in found]
    return np.asarray(rows), np.asarray([score for score, _ in found])
