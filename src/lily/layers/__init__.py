"""What sits in the model? The bank of shared tensors, and one adapted layer of each kind."""

import peft  # noqa: F401  first, since `import lily` registers as soon as PEFT is imported, and that needs this package
