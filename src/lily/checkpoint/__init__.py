"""What is in an adapter's file, and is it safe to load?"""

import peft  # noqa: F401  first, since `import lily` registers as soon as PEFT is imported, and that needs this package
