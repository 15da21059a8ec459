"""Commands that change keys of a recipe by `key=value`, and say so to somebody who writes `--key value`."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class RecipeCommand(TyperCommand):
    """A command whose unknown options are explained, where they are called as a recipe's key."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; the error about an unknown option names the key that may be meant."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # Click's NoSuchOption, of which newer versions of typer have a copy
            option, near = str(getattr(error, "option_name", "")), getattr(error, "possibilities", None) or ()
            misspelt = any(name.startswith(option) for name in near)
            if type(error).__name__ == "NoSuchOption" and not misspelt and (hint := _hint(option)):
                error.message = f"{getattr(error, 'message', '')}. {hint}"  # type: ignore[attr-defined]
            raise


def _hint(option: str) -> str:
    """How a key of a recipe is changed; empty where no key is called like the option."""
    from lily.recipes.spec.explain import keys_like
    from lily.recipes.spec.schema import Recipe

    keys = keys_like(tuple(option.lstrip("-").replace("-", "_").split(".")), Recipe)
    written = " or ".join(f"{'.'.join(key)}=..." for key in keys)
    return f"A recipe's keys have no dashes: {written}" if keys else ""
