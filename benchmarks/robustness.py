"""How far a concept is gone from the weights, and not from the prompts alone."""


def m_score(host, weights, kind, names):
    """The Memorization Score of the concept under the edited model (arXiv 2303.17591, section 4); None: not measured."""


def recovery(host, weights, kind, names, judge):
    """The share of pictures recognised again after a learned word calls for the concept; None: not measured."""
