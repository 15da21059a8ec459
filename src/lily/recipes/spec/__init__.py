"""What is a recipe? Its keys, their checks, and the methods beside it."""
