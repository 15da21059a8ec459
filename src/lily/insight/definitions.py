"""What the page's words mean, for readers who do not have the documentation at hand."""

from __future__ import annotations

from lily.html.markup import Html, details, el

TERMS = {
    "A, B, expert": (
        "An update is scaling \u00b7 (\u03a3 w_e B_e)\u1d40 A. A reads r directions of the input; the experts "
        "B_e write to the output; the weights w come from the layer's router."
    ),
    "expected update": "The update at the layer's mean weights. Its rank is at most r.",
    "union over tokens": (
        "All tokens' updates side by side. Its singular values are the roots of the eigenvalues of E[D D\u1d40]; "
        "its rank is at most experts \u00d7 r. It tells the output directions that the tokens reach together; the "
        "input directions remain those of A."
    ),
    "numerical rank": "Singular values above a stated share of the largest.",
    "effective rank": "exp of the entropy of the singular values as shares of their sum.",
    "stable rank": "Squared Frobenius norm over squared spectral norm.",
    "overlap": (
        "Mean squared cosine of the principal angles of two layers' subspaces; by chance it is the larger "
        "rank over the dimension."
    ),
    "what weights depend on": (
        "The variance of the weights over tokens, summed over experts, is the exact sum of a part between "
        "tokens of a sample, between samples of a class, and between classes. The part of the class is never "
        "quite zero in finite data, so it is held against 200 random labellings."
    ),
    "specialisation": (
        "Mutual information of token and expert: entropy of the mean weights less the mean entropy of a "
        "token's weights."
    ),
    "limits": (
        "The spectra know nothing of how often inputs point where A reads. Expert weights say how an expert "
        "is mixed, not how large it is. With one seed, a difference is one observation."
    ),
}


def definitions() -> Html:
    """Terms and limits."""
    pairs = (el(tag, said) for term in TERMS.items() for tag, said in zip(("dt", "dd"), term, strict=True))
    return details("Definitions and limits", el("dl", *pairs), open="")
