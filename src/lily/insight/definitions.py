"""The glossary of the page: every term has one meaning, here and on the page."""

from lily.analysis.routing import PERMUTATIONS
from lily.layers.routing_statistics import DEAD_EXPERT

TERMS = {
    "A, B, expert": (
        "An update is scaling \u00b7 (\u03a3 w_e B_e)\u1d40 A. A reads r directions of the input; the experts "
        "B_e write to the output; the weights w come from the layer's router."
    ),
    "expected update": "The update at the layer's mean weights. Its rank is at most r.",
    "union over tokens": (
        "All tokens' updates side by side. Its singular values are the square roots of the eigenvalues of "
        "E[D D\u1d40]; its rank is at most experts \u00d7 r. It shows the output directions that the tokens reach "
        "together; the input directions remain those of A."
    ),
    "numerical rank": "The number of singular values above a stated share of the largest.",
    "effective rank": "exp of the entropy of the singular values as shares of their sum.",
    "stable rank": "Squared Frobenius norm over squared spectral norm.",
    "overlap": (
        "Mean squared cosine of the principal angles of two layers' subspaces; for random subspaces it is the larger "
        "rank over the dimension (the column by chance)."
    ),
    "what weights depend on": (
        "The variance of the weights over tokens, summed over experts, is the exact sum of a part between "
        "tokens of a sample, between samples of a class, and between classes. The part of the class is never "
        f"exactly zero in finite data, so it is compared with {PERMUTATIONS} random labelings."
    ),
    "specialization": (
        "Mutual information of token and expert: entropy of the mean weights minus the mean entropy of a "
        "token's weights."
    ),
    "dead expert": f"An expert whose mean weight in a layer is less than {DEAD_EXPERT:.0%} of an equal share.",
    "degenerate router": "A router that always picks the same expert.",
    "collapse": "Replacing a routing that depends on the data by constant weights (`lily collapse`).",
    "limits": (
        "The spectra do not show how often inputs point where A reads. Expert weights show how an expert "
        "is mixed, not how large it is. With one seed, a difference is one observation."
    ),
}
