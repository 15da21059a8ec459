"""Subject-driven generation (DreamBooth): a diffusion model learns to draw one subject from a few images."""
