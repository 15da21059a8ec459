"""Subject-driven generation (DreamBooth): a few images of one thing, and a diffusion model that learns to draw it."""
