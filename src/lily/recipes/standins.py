"""The path that model cards of earlier versions import; the stand-ins are in `lily.recipes.offline.standins`."""

from lily.recipes.offline.standins import standin

__all__ = ["standin"]
