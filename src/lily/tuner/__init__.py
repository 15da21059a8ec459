"""How does PEFT meet it? Injection, loading, and the registration in PEFT."""

import peft  # noqa: F401  first, since `import lily` registers as soon as PEFT is imported, and that needs this package
