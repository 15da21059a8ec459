"""The path that model cards of earlier versions import; the model is in `lily.recipes.offline.vision_mamba`."""

from lily.recipes.offline.vision_mamba import VisionMambaConfig, VisionMambaForImageClassification

__all__ = ["VisionMambaConfig", "VisionMambaForImageClassification"]
