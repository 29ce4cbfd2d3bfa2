"""Vision Mamba with token fusion."""
