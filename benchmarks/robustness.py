"""How far a concept is gone from the weights, and not from the prompts alone."""


def learned_back(host, weights, kind, names, judge):
    """What words learned on the edited model from pictures of the first name bring back: `m_score`, the Memorization
    Score (arXiv 2303.17591, section 4), and `recovery`, the share of pictures recognised again; None: not measured."""
    return {"m_score": None, "recovery": None}
