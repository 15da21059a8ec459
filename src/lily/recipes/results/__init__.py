"""What does a run leave? Its result, its card, and reading both back."""
